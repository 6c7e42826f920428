"""What a measured shift is: figures of groups, inputs and labels, for print and JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from layerwise.choosing.depths import Transferability
from layerwise.choosing.distances import Estimate
from layerwise.choosing.tables import text_table
from layerwise.shown import Shown

Method = Literal["norms", "signature", "source"]
Where = Literal["none", "early", "late", "throughout"]
MOVED = 0.5
"""Standardised difference of an input dimension from which on it is named."""


@dataclass(frozen=True)
class GroupShift:
    """The shift at one layer group; what was not measured is None.

    Attributes:
        group: its name.
        depth: groups between it and the head; the head is 0.
        norms: what its batch-norms receive against their running statistics: per channel, the squared
            differences of mean and of standard deviation as a share of the source's variance plus 10 % of
            the channels' mean variance, averaged. One standard deviation off is 0.91.
        frechet: the same figure of its output, pooled over positions, against a source: the Fréchet
            distance of diagonal Gaussians in units of the source's own spread.
        kl: mean over channels of KL(target || source) in nats, of the norm inputs where there is no source;
            10 % of the source's mean variance is added to both variances.
        mmd: unbiased, of the sketches; a negative estimate is given as 0.
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
        effect: difference of the means over ``sqrt((target variance + source variance) / 2)``, between -20
            and 20, positive when the target has more of it; None without a source.
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
class Shift(Shown):
    """How far a target lies from the source, and where.

    Attributes:
        method: what it was compared with: ``"norms"`` (running statistics), ``"signature"`` or ``"source"``.
        groups: from input to output.
        overall: mean of the groups' main figures.
        input_side: mean over the first two thirds of the groups, ``round(2 n / 3)`` of n: how strange the
            images themselves are.
        label_side: mean over the others, where features follow the classes. A target of few classes is
            narrow there and lies far from the source even when its images are quite ordinary.
        where: in which third of the groups it sits: ``"early"`` (`early_share` 0.6 or more) speaks for a
            change of the inputs; ``"late"`` (0.4 or less) for one of what they mean, unless `moved` names
            something: blur and lost colour show late too; ``"throughout"`` between them; ``"none"`` when the
            interval of `overall` holds 0.
        early_share: mean of the first third as a share of the sum of first and last third's means, 0.5 where
            both are 0; a third is ``round(n / 3)`` groups, at least one.
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

    @property
    def moved_most(self) -> str:
        """The first three of `moved` with their effects, in words; empty where nothing moved."""
        return ", ".join(f"{m.name} {m.effect.value:+.1f} sd" for m in self.moved[:3] if m.effect is not None)

    @property
    def summary(self) -> str:
        """The three means and where the shift sits, in three lines; a fourth of what moved in the inputs."""
        return (
            f"input side (first two thirds): {self.input_side}\n"
            f"label side (last third): {self.label_side}\n"
            f"overall: {self.overall}; {_SITS[self.where]}"
            + (f"\nthe inputs changed, wherever that shows: {self.moved_most}" if self.moved else "")
        )

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
            f"shift against {_AGAINST[self.method]} ({self.samples} samples, {self.level:.0%} intervals)\n"
            f"{self.summary}",
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
_SITS: dict[Where, str] = {
    "none": "no shift is shown, as the interval holds 0",
    "early": "more in the first third of the groups than in the last",
    "late": "more in the last third of the groups than in the first",
    "throughout": "in early and late groups alike",
}
_AGAINST = {"norms": "running statistics", "signature": "a signature", "source": "a source sample"}
