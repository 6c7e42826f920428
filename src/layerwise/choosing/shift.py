"""`shift`: how far a target domain lies from the one a network was pretrained on, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from layerwise.choosing import distances
from layerwise.choosing.depths import score_depths
from layerwise.choosing.features import Features, collect_features, mapped_features
from layerwise.choosing.group_shift import Drawn, mean_figure, shift_from_source, shift_of_norms
from layerwise.choosing.shift_result import GroupShift, InputShift, LabelSide, Method, Shift, Where
from layerwise.choosing.signature import Signature, shared_groups, summarise
from layerwise.errors import DataError, MissingExtraError, ModelError
from layerwise.layers.layermap import LayerMap

EARLY, LATE = 0.6, 0.4
"""Shares of the shift in the first third of the groups (against the last third) that count as one-sided."""


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
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "batch_size": batch_size,
        "collate": collate,
        "seed": seed,
    }
    found, layers = mapped_features(model, target, layers, example_input, norms=source is None, **options)
    method, reference = open_reference(model, source, layers, found, **options)
    return measure(found, reference, layers, method=method, draws=draws, level=level, seed=seed)


def open_reference(
    model: nn.Module, source: Any, layers: LayerMap, target: Features, *, seed: int = 0, **options: Any
) -> tuple[Method, Signature | None]:
    """Return what a shift is measured against, and what kind of thing it is.

    Args:
        model: the network; unchanged.
        source: as for `shift`.
        layers: the map that the target's features are collected with.
        target: these features.
        seed: of the draw of the source's samples.
        options: of `layerwise.choosing.features.collect_features`.

    Raises:
        DataError: there is no signature at that path, or the source's data cannot be used or are of another
            kind or size than the target's.
    """
    if source is None:
        return "norms", None
    if isinstance(source, Signature):
        return "signature", source
    if isinstance(source, str | Path):
        return "signature", Signature.load(source)
    features = collect_features(model, source, layers, norms=False, seed=seed, target=target, **options)
    return "source", summarise(features, layers, seed=seed)


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
        name = layers.model_class.rpartition(".")[2] or "this model"
        raise ModelError(
            f"{name} has no layer with running statistics (batch-norm), so it "
            "carries no summary of its source domain, and no source was given. Give a sample of the source "
            "(--source; in Python source=), or a signature made where the source is (--signature): "
            "layerwise signature MODEL --data SOURCE -o sig.safetensors"
        )
    shared = set() if reference is None else shared_groups(reference, target, layers)
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"draws": draws, "level": level, "seed": seed}
    main: list[Drawn] = []
    groups: list[GroupShift] = []
    for name in layers.names:
        figures: dict[str, Any]
        if reference is None:
            norms = [entry for entry in target.norms.values() if entry.group == name]
            if not norms:
                continue
            figure, figures = shift_of_norms(norms, **options)
        elif name in shared:
            source = reference.groups[name]
            figure, figures = shift_from_source(
                target.groups[name], source, reference.samples, **options, rng=rng
            )
        else:
            continue
        main.append(figure)
        groups.append(GroupShift(name, layers.depth_of(name), **figures))
    overall = mean_figure(main, level=level)
    cut = max(1, round(len(main) * 2 / 3))
    share = early_share([group.main.value for group in groups])
    labels, notes = None, list(target.notes)
    if target.labels is not None:
        try:
            labels = label_side(target, seed=seed)
        except (DataError, MissingExtraError) as error:  # the shift of the inputs needs no labels
            notes.append(f"label side not measured: {error}")
    where: Where = "none" if overall.nothing else where_of(share)
    return Shift(
        method=method,
        groups=tuple(groups),
        overall=overall,
        input_side=mean_figure(main[:cut], level=level),
        label_side=mean_figure(main[cut:] or main, level=level),
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


def where_of(share: float) -> Where:
    """Return in which third of the groups a shift sits, of which so much is in the first third."""
    return "early" if share >= EARLY else "late" if share <= LATE else "throughout"


def early_share(values: list[float]) -> float:
    """Return the share of the first third's mean figure in its sum with the last third's."""
    third = max(1, round(len(values) / 3))
    early, late = float(np.mean(values[:third])), float(np.mean(values[-third:]))
    return early / (early + late) if early + late > 0 else 0.5


def _input_shifts(
    target: Features, reference: Signature | None, draws: int, level: float, seed: int
) -> tuple[InputShift, ...]:
    options: dict[str, Any] = {
        "draws": draws,
        "level": level,
        "seed": seed,
        "unbiased": True,
        "floor": -np.inf,
    }
    found = []
    for name, ours in target.inputs.items():
        theirs = None if reference is None else reference.inputs.get(name)
        if theirs is None or len(theirs) < 2:
            found.append(InputShift(name, float(ours.mean())))
            continue
        effect = distances.bootstrap(_effect, ours, theirs, **options)
        found.append(InputShift(name, float(ours.mean()), float(theirs.mean()), effect))
    return tuple(found)


def _effect(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> float:
    """Return the difference of means over the pooled standard deviation (Cohen's d, capped at 20)."""
    pooled = float(np.sqrt((ours.var() + theirs.var()) / 2))
    scale = max(pooled, 1e-3 * (abs(float(ours.mean())) + abs(float(theirs.mean()))), 1e-12)
    return float(np.clip((ours.mean() - theirs.mean()) / scale, -20, 20))
