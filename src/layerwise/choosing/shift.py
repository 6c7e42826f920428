"""`shift`: how far a target domain lies from the one a network was pretrained on, group by group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from layerwise.choosing import distances
from layerwise.choosing.depths import Transferability, score_depths
from layerwise.choosing.distances import Array, Estimate, interval
from layerwise.choosing.features import Features, NormInputs, collect_features, map_for
from layerwise.choosing.signature import FLOOR, Signature, check_belongs, project, spread, summarise
from layerwise.choosing.tables import text_table
from layerwise.errors import DataError, MissingExtraError, ModelError
from layerwise.layers.layermap import LayerMap

Method = Literal["norms", "signature", "source"]
Where = Literal["none", "early", "late", "throughout"]
EARLY, LATE = 0.6, 0.4
"""Shares of the shift in the first third of the groups (against the last third) that count as one-sided."""
MOVED = 0.5
"""Standardised difference of an input dimension from which on it is named."""


@dataclass(frozen=True)
class GroupShift:
    """The shift at one layer group; what was not measured is None.

    Attributes:
        group: its name.
        depth: groups between it and the head; the head is 0.
        norms: what its batch-norms receive against their running statistics: per channel, the squared
            differences of mean and of standard deviation as a share of the source's variance, averaged.
        frechet: the same figure of its output, pooled over positions, against a source: the Fréchet
            distance of diagonal Gaussians in units of the source's own spread.
        kl: mean over channels of KL(target || source) in nats, of the norm inputs where there is no source.
        mmd: unbiased, of the sketches.
        proxy_a: proxy A-distance, of the sketches: 0 cannot be told apart, 2 always can.
        cka: linear CKA between the source's and the target's arrangement of features; 1 is the same.
    """

    group: str
    depth: int
    norms: Estimate | None = None
    frechet: Estimate | None = None
    kl: Estimate | None = None
    mmd: Estimate | None = None
    proxy_a: Estimate | None = None
    cka: Estimate | None = None

    @property
    def main(self) -> Estimate:
        """The figure that stands for the group: `frechet` against a source, else `norms`."""
        found = self.frechet or self.norms
        assert found is not None  # a group without either is not listed
        return found


@dataclass(frozen=True)
class InputShift:
    """One measurable property of the raw input.

    Attributes:
        name: ``"contrast"``, ``"colour"``, ... of images (`layerwise.choosing.inputs`), ``"length"``,
            ``"fertility"``, ``"unknown"`` of texts (`layerwise.choosing.tokens`).
        target: mean over the target's samples.
        source: mean over the source's, or None without a source.
        effect: difference of the means in standard deviations, positive when the target has more of it;
            None without a source.
    """

    name: str
    target: float
    source: float | None = None
    effect: Estimate | None = None

    @property
    def moved(self) -> bool:
        """Whether the difference is shown and at least half a standard deviation."""
        return self.effect is not None and not self.effect.nothing and abs(self.effect.value) >= MOVED


@dataclass(frozen=True)
class LabelSide:
    """What the labels say.

    Attributes:
        counts: samples of each class in the drawn sample, by label.
        imbalance: largest class over smallest.
        transfer: how well frozen features separate the classes at each depth.
    """

    counts: dict[int, int]
    imbalance: float
    transfer: Transferability

    @property
    def separable(self) -> float:
        """Share of the errors of naming the most frequent class that a probe at the last depth avoids."""
        chance = self.transfer.chance
        return (float(np.nan_to_num(self.transfer.last.probe, nan=chance)) - chance) / max(1 - chance, 1e-9)


@dataclass(frozen=True)
class Shift:
    """How far a target lies from the source, and where.

    Attributes:
        method: what it was compared with: ``"norms"`` (running statistics), ``"signature"`` or ``"source"``.
        groups: from input to output.
        overall: mean of the groups' main figures.
        input_side: mean over the first two thirds of the groups: how strange the images themselves are.
        label_side: mean over the last third, where features follow the classes. A target of few classes is
            narrow there and lies far from the source even when its images are quite ordinary.
        where: in which third of the groups it sits: ``"early"`` speaks for a change of the inputs,
            ``"late"`` for a change of what they mean; ``"none"`` when the interval of `overall` holds 0.
        early_share: mean of the first third as a share of the sum of first and last third's means.
        inputs: properties of the raw images or texts; empty for other inputs.
        labels: the label side, or None for data without labels.
        samples: number of target samples measured.
        total: number there are, or None.
        level: of all intervals.
        notes: what could not be measured, for people.
    """

    method: Method
    groups: tuple[GroupShift, ...]
    overall: Estimate
    input_side: Estimate
    label_side: Estimate
    where: Where
    early_share: float
    inputs: tuple[InputShift, ...]
    labels: LabelSide | None
    samples: int
    total: int | None
    level: float
    notes: tuple[str, ...] = ()

    @property
    def moved(self) -> tuple[InputShift, ...]:
        """The input properties that moved, the most moved first.

        Noise is fine detail: where there is more of it, sharpness and resolution rise with it and are not
        named on their own.
        """
        found = [(abs(i.effect.value), i) for i in self.inputs if i.moved and i.effect is not None]
        signs = {i.name: np.sign(i.effect.value) for _, i in found if i.effect is not None}
        if signs.get("noise") == 1:
            found = [pair for pair in found if signs[pair[1].name] < 0 or pair[1].name not in _DETAIL]
        return tuple(entry for _, entry in sorted(found, key=lambda pair: -pair[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        data = dataclasses.asdict(self)
        if self.labels is not None:
            data["labels"]["transfer"] = self.labels.transfer.to_dict()
            data["labels"]["separable"] = self.labels.separable
        data["moved"] = [entry.name for entry in self.moved]
        return data

    def __str__(self) -> str:
        figures = ["norms", "frechet", "kl", "mmd", "proxy_a", "cka"]
        shown = [f for f in figures if any(getattr(g, f) is not None for g in self.groups)]
        rows = [
            [g.group, str(g.depth), *("-" if getattr(g, f) is None else str(getattr(g, f)) for f in shown)]
            for g in self.groups
        ]
        parts = [
            f"shift against {_AGAINST[self.method]}: {self.overall} "
            f"({self.level:.0%} interval, {self.samples} samples)\n"
            f"input side (first two thirds): {self.input_side}; label side (last third): {self.label_side}; "
            f"sits: {self.where}",
            text_table(["group", "depth", *shown], rows),
        ]
        if self.inputs:
            rows = [
                [
                    i.name,
                    f"{i.target:.3g}",
                    "-" if i.source is None else f"{i.source:.3g}",
                    "-" if i.effect is None else str(i.effect),
                    "moved" if i.moved else "",
                ]
                for i in self.inputs
            ]
            parts.append(text_table(["input", "target", "source", "effect (sd)", ""], rows))
        if self.labels is not None:
            parts.append(
                f"labels: {len(self.labels.counts)} classes, largest {self.labels.imbalance:.3g} times the "
                f"smallest\n{self.labels.transfer}"
            )
        return "\n\n".join([*parts, *self.notes])


_DETAIL = ("sharpness", "resolution")
_AGAINST = {"norms": "running statistics", "signature": "a signature", "source": "a source sample"}


def shift(
    model: nn.Module,
    target: Any,
    source: Any = None,
    *,
    layers: LayerMap | None = None,
    example_input: Any = None,
    max_samples: int | None = 512,
    batch_size: int = 32,
    collate: Any = None,
    draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> Shift:
    """Return how far `target` lies from what `model` was pretrained on, per layer group, with intervals.

    Without a source, a network with batch-norm carries one: its running means and variances. With a
    source sample, or a signature of one, every network can be measured, in more ways. Figures of the two
    kinds are on different scales: running statistics count variation over positions as well.

    The model runs in eval mode over at most `max_samples` of the target (and of the source); it and the
    random state are afterwards as they were.

    Args:
        model: the pretrained network; unchanged.
        target: data set, loader, tensor, or pair of tensors; labels are used if there are any. See
            `layerwise.choosing.features.collect_features`.
        source: None; a `Signature` or the path of a saved one; or data like `target`.
        layers: the layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from; None takes two samples of the target.
        max_samples: so many samples of each side are drawn; None takes all.
        batch_size: of data that is no loader.
        collate: makes a batch of samples, of data that is no loader.
        draws: bootstrap draws of each interval, at least 20.
        level: of the intervals, above 0 and below 1.
        seed: of sampling, draws and folds; with it the result is a function of the arguments.

    Raises:
        ModelError: neither a source nor a layer with running statistics; or a signature of another model.
        DataError: fewer than two samples, or a source of another modality or input size. (Labels that tell
            nothing, such as of one class only, are a note in the result.)

    Source: running statistics as a summary of the source, Schneider et al. 2020 (section 2 there uses the
    same Gaussians); where a shift sits decides what to tune, Lee et al. 2023 (surgical fine-tuning).
    """
    if draws < 20 or not 0 < level < 1:
        raise DataError(f"draws is {draws} and level {level}; expected at least 20, and between 0 and 1.")
    layers = map_for(model, target, layers, example_input, batch_size=batch_size, collate=collate)
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "batch_size": batch_size,
        "collate": collate,
        "seed": seed,
    }
    found = collect_features(model, target, layers, norms=source is None, **options)
    method: Method = "source"
    if source is None:
        method, reference = "norms", None
    elif isinstance(source, Signature | str | Path):
        method = "signature"
        reference = source if isinstance(source, Signature) else Signature.load(source)
    else:
        reference = summarise(
            collect_features(model, source, layers, norms=False, **options), layers, seed=seed
        )
    return measure(found, reference, layers, method=method, draws=draws, level=level, seed=seed)


def measure(
    target: Features,
    reference: Signature | None,
    layers: LayerMap,
    *,
    method: Method,
    draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> Shift:
    """Return the shift of features that are collected already; `shift` says the rest.

    Args:
        target: features of the target.
        reference: the source, or None for the running statistics in `target`.
        layers: the map both were collected with.
        method: what `reference` is, for people.
        draws: bootstrap draws.
        level: of the intervals.
        seed: of draws and folds.

    Raises:
        ModelError: nothing to compare with.
        DataError: fewer than two samples, or reference and target do not belong together.
    """
    if target.samples < 2:
        raise DataError(f"a shift needs at least two samples, better some hundred; got {target.samples}.")
    if reference is None and not target.norms:
        raise ModelError(
            f"{layers.model_class or 'this model'} has no layer with running statistics (batch-norm), so it "
            "carries no summary of its source domain, and no source was given. Give a sample of the source, "
            "shift(model, target, source), or a signature made where the source is: "
            "layerwise signature MODEL --data SOURCE -o sig.safetensors"
        )
    if reference is not None:
        check_belongs(reference, target, layers)
    rng = np.random.default_rng(seed)
    main: list[tuple[float, Array]] = []
    groups: list[GroupShift] = []
    for name in layers.names:
        norms = [entry for entry in target.norms.values() if entry.group == name]
        if reference is None:
            if norms:
                figures = _norm_figures(norms, draws, seed)
                main.append(figures[0])
                groups.append(
                    GroupShift(
                        name,
                        layers.depth_of(name),
                        norms=interval(*figures[0], level=level),
                        kl=interval(*figures[1], level=level),
                    )
                )
        elif name in reference.groups and name in target.groups:
            entry, figure = _against(reference, target, name, draws, level, seed, rng)
            main.append(figure)
            groups.append(dataclasses.replace(entry, depth=layers.depth_of(name)))
    overall = _mean(main, level)
    cut = max(1, round(len(main) * 2 / 3))
    share = _early_share([group.main.value for group in groups])
    labels, notes = None, list(target.notes)
    if target.labels is not None:
        try:
            labels = label_side(target, seed=seed)
        except (DataError, MissingExtraError) as error:  # the shift of the inputs needs no labels
            notes.append(f"label side not measured: {error}")
    where: Where = "none" if overall.nothing else _where(share)
    return Shift(
        method=method,
        groups=tuple(groups),
        overall=overall,
        input_side=_mean(main[:cut], level),
        label_side=_mean(main[cut:] or main, level),
        where=where,
        early_share=share,
        inputs=_input_shifts(target, reference, draws, level, seed),
        labels=labels,
        samples=target.samples,
        total=target.total,
        level=level,
        notes=tuple(notes),
    )


def label_side(features: Features, *, seed: int = 0) -> LabelSide:
    """Return class counts and transferability of labelled features.

    Raises:
        DataError: no labels, one class only, or only single samples.
    """
    transfer = score_depths(features, seed=seed)
    classes, counts = np.unique(np.asarray(features.labels), return_counts=True)
    return LabelSide(
        counts=dict(zip(classes.tolist(), counts.tolist())),
        imbalance=float(counts.max() / counts.min()),
        transfer=transfer,
    )


def _mean(figures: list[tuple[float, Array]], level: float) -> Estimate:
    """Return the mean of several groups' figures; their draws belong together, row by row."""
    value = float(np.mean([value for value, _ in figures]))
    return interval(value, np.mean([drawn for _, drawn in figures], axis=0), level=level)


def _where(share: float) -> Where:
    return "early" if share >= EARLY else "late" if share <= LATE else "throughout"


def _early_share(values: list[float]) -> float:
    third = max(1, round(len(values) / 3))
    early, late = float(np.mean(values[:third])), float(np.mean(values[-third:]))
    return early / (early + late) if early + late > 0 else 0.5


def _weights(samples: int, draws: int, seed: int) -> Array:
    """Return bootstrap weights, float64[draws, samples], rows summing to 1; the same for every group."""
    drawn = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=draws)
    return drawn / samples


def _gap(mean: Array, var: Array, ref_mean: Array, ref_var: Array, unit: Array) -> Array:
    """Return the Fréchet distance of diagonal Gaussians per channel in units of `unit`, averaged."""
    spread_gap = (np.sqrt(np.maximum(var, 0)) - np.sqrt(np.maximum(ref_var, 0))) ** 2
    result: Array = (((mean - ref_mean) ** 2 + spread_gap) / unit).mean(-1)
    return result


def _norm_figures(
    norms: list[NormInputs], draws: int, seed: int
) -> tuple[tuple[float, Array], tuple[float, Array]]:
    """Return (value, draws) of the Fréchet figure and of KL, averaged over the norms of a group."""
    gaps: list[Array] = []
    divergences: list[Array] = []
    for entry in norms:
        weights = np.vstack(
            [np.full((1, len(entry.mean)), 1 / len(entry.mean)), _weights(len(entry.mean), draws, seed)]
        )
        mean = weights @ entry.mean.astype(np.float64)
        var = np.maximum(weights @ entry.square.astype(np.float64) - mean**2, 0)
        ref_mean, ref_var = entry.running_mean.astype(np.float64), entry.running_var.astype(np.float64)
        gaps.append(_gap(mean, var, ref_mean, ref_var, spread(ref_var)))
        divergences.append(_kl(mean, var, ref_mean, ref_var))
    gap, divergence = np.mean(gaps, axis=0), np.mean(divergences, axis=0)
    return (float(gap[0]), gap[1:]), (float(divergence[0]), divergence[1:])


def _kl(mean: Array, var: Array, ref_mean: Array, ref_var: Array) -> Array:
    floor = max(
        FLOOR * float(np.mean(ref_var)), 1e-12
    )  # as for the Fréchet figure: dead channels count little
    result: Array = distances.kl_per_channel(mean, var, ref_mean, ref_var, eps=floor).mean(-1)
    return result


def _against(
    reference: Signature,
    target: Features,
    name: str,
    draws: int,
    level: float,
    seed: int,
    rng: np.random.Generator,
) -> tuple[GroupShift, tuple[float, Array]]:
    """Return the shift at one group against a source, and (value, draws) of its main figure."""
    values, source = target.groups[name].astype(np.float64), reference.groups[name]
    ref_mean, ref_var = source.mean.astype(np.float64), source.var.astype(np.float64)
    n, m = len(values), reference.samples
    weights = _weights(n, draws, seed)
    mean = np.vstack([values.mean(0), weights @ values])
    centre = mean[0]
    square = np.vstack([((values - centre) ** 2).mean(0), weights @ (values - centre) ** 2])
    var = np.maximum(square - (mean - centre) ** 2, 0) * n / max(n - 1, 1)
    # The source's samples are gone; its moments are drawn as a Gaussian's would be. Row 0 is the estimate.
    noise = rng.standard_normal((2, draws, len(ref_mean)))
    ref_means = np.vstack([ref_mean, ref_mean + noise[0] * np.sqrt(ref_var / m)])
    ref_vars = np.vstack([ref_var, ref_var * np.maximum(1 + noise[1] / np.sqrt(2 * m), 0) ** 2])
    gap = _gap(mean, var, ref_means, ref_vars, spread(ref_var))
    kl = _kl(mean, var, ref_means, ref_vars)
    drawn = np.sort(np.random.default_rng(seed + 1).permutation(n)[: max(len(source.sketch), 2)])
    ours, theirs = project(values[drawn], ref_mean, ref_var), source.sketch.astype(np.float64)
    enough = min(len(ours), len(theirs)) >= 10
    main = (float(gap[0]), gap[1:])
    return (
        GroupShift(
            name,
            0,
            frechet=interval(*main, level=level),
            kl=interval(float(kl[0]), kl[1:], level=level),
            mmd=distances.mmd_estimate(theirs, ours, draws=draws, level=level, seed=seed),
            proxy_a=distances.proxy_a_distance(theirs, ours, draws=draws, level=level, seed=seed)
            if enough
            else None,
            cka=_cka(theirs, ours, draws, level, seed) if enough and ours.shape[1] > 2 else None,
        ),
        main,
    )


def _cka(theirs: Array, ours: Array, draws: int, level: float, seed: int) -> Estimate:
    """Return linear CKA of the two arrangements of features: rows are the features, columns the samples."""
    estimate = distances.bootstrap(
        lambda a, b: distances.linear_cka(a.T, b.T),
        theirs,
        ours,
        draws=min(draws, 100),
        level=level,
        seed=seed,
    )
    return Estimate(min(estimate.value, 1.0), min(estimate.low, 1.0), min(estimate.high, 1.0))


def _input_shifts(
    target: Features, reference: Signature | None, draws: int, level: float, seed: int
) -> tuple[InputShift, ...]:
    found = []
    for name, ours in target.inputs.items():
        theirs = None if reference is None else reference.inputs.get(name)
        if theirs is None or len(theirs) < 2:
            found.append(InputShift(name, float(ours.mean())))
            continue
        found.append(
            InputShift(
                name,
                float(ours.mean()),
                float(theirs.mean()),
                distances.bootstrap(_effect, ours, theirs, draws=draws, level=level, seed=seed, floor=None),
            )
        )
    return tuple(found)


def _effect(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    """Return the difference of means over the pooled standard deviation (Cohen's d, capped at 20)."""
    pooled = float(np.sqrt((ours.var() + theirs.var()) / 2))
    scale = max(pooled, 1e-3 * (abs(float(ours.mean())) + abs(float(theirs.mean()))), 1e-12)
    return float(np.clip((ours.mean() - theirs.mean()) / scale, -20, 20))
