"""What a search tries: freeze depths, rates, decays and named strategies, as plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.errors import PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.parsing import check_strategy, parse_strategy
from layerwise.plans.plan import Plan
from layerwise.plans.settings import NormKind, Schedule
from layerwise.plans.strategies import discriminative

_HEAD_ALONE = ("last 1", "linear_probe")


@dataclass(frozen=True)
class Space:
    """The options of a search.

    Attributes:
        depths: numbers of groups that learn, from the output on, ascending.
        strategies: named strategies to try besides, as `layerwise.parse_strategy` reads them.
        lr: lowest and highest base rate; drawn on a logarithmic scale.
        decay: lowest and highest decay a group; 1 is the same rate for all groups that learn.
        epochs: length of every plan.
        norms: the normalisation policy of every plan.
        begin_with: choices that are tried before all others, each with its base rate.
    """

    depths: tuple[int, ...]
    strategies: tuple[str, ...]
    lr: tuple[float, float]
    decay: tuple[float, float]
    epochs: int
    norms: NormKind = "follow"
    begin_with: tuple[tuple[str, float], ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """What is trained, by name: ``"last 1"`` is a linear probe."""
        return (*(f"last {k}" for k in self.depths), *self.strategies)

    def trained_groups(self, choice: str) -> int | None:
        """Return how many groups learn by a choice, or None for a named strategy."""
        return None if choice in self.strategies else int(choice.removeprefix("last "))

    def plan(self, layers: LayerMap, choice: str, decay: float) -> Plan:
        """Return the plan of one choice.

        Args:
            layers: the map of the model.
            choice: one of `choices`.
            decay: used where several groups learn and `choice` is a depth.
        """
        options: dict[str, Any] = {
            "epochs": self.epochs,
            "schedule": Schedule(shape="cosine", warmup_frac=0.05),
            "norms": self.norms,
        }
        k, groups, decay = self.trained_groups(choice), len(layers), round(decay, 4)
        if k is None:
            return parse_strategy(choice, layers, **options)
        if k == 1:
            return parse_strategy("linear_probe", layers, **options)
        if decay >= 1:
            return parse_strategy("full" if k == groups else f"top_k(k={k})", layers, **options)
        # not by its text: a group of an nn.Sequential is called "1", and there "frozen=1" could mean both
        return discriminative(layers, decay=decay, frozen=groups - k or None, **options)

    def first(self) -> list[dict[str, Any]]:
        """Return the trials that every search begins with: each depth and strategy once, mid-range.

        The middle of the rates is geometric; the head alone gets the upper quarter, as it bears more. What
        `begin_with` names comes first, at the rate that it says.
        """
        low, high = self.lr
        middle = (low * high) ** 0.5
        decay = min(max(0.9, self.decay[0]), self.decay[1])
        rates = {c: (middle * high) ** 0.5 if c in _HEAD_ALONE else middle for c in self.choices}
        begun = dict(self.begin_with)
        ordered = [*self.begin_with, *((c, rate) for c, rate in rates.items() if c not in begun)]
        return [{"choice": choice, "lr": rate, "decay": decay} for choice, rate in ordered]


def make_space(
    layers: LayerMap,
    *,
    depths: Sequence[int] | None = None,
    strategies: Sequence[str] = (),
    lr: tuple[float, float] = (1e-4, 1e-2),
    decay: tuple[float, float] = (0.7, 1.0),
    epochs: int = 5,
    norms: NormKind = "follow",
    begin_with: Sequence[tuple[str, float]] = (),
) -> Space:
    """Return a checked search space; see `layerwise.search` for the arguments.

    Raises:
        PlanError: a depth, range or strategy cannot be used; all are listed.
    """
    groups = len(layers)
    found: list[str] = []
    chosen = spread_depths(groups) if depths is None else tuple(sorted(set(depths)))
    for k in chosen:
        if not 1 <= k <= groups:
            found.append(f"depth {k} is not between 1 and the {groups} groups of the layer map")
    if not chosen and not strategies:
        found.append("there is no depth and no strategy to try")
    found += _wrong_ranges(lr, decay)
    if epochs < 1:
        found.append(f"epochs is {epochs}; expected at least 1")
    space = Space(chosen, tuple(strategies), lr, decay, max(epochs, 1), norms, tuple(begin_with))
    for text in strategies:
        try:
            space.plan(layers, text, 1.0)
        except PlanError as error:
            found.append(str(error))
    known = list(space.choices)
    for choice, rate in begin_with:
        if choice not in known or not lr[0] <= rate <= lr[1]:
            found.append(f"begin_with has {choice!r} at {rate:g}; expected one of {known}, at a rate in {lr}")
    _raise(found)
    return space


def check_space(*, strategies: Sequence[str], lr: tuple[float, float], decay: tuple[float, float]) -> None:
    """Look at a search space as far as that needs no layer map; see `make_space`.

    Raises:
        PlanError: a range cannot be used, or a strategy is not known; all are listed.
    """
    found = _wrong_ranges(lr, decay)
    for text in strategies:
        try:
            check_strategy(text)
        except PlanError as error:
            found.append(str(error))
    _raise(found)


def _wrong_ranges(lr: tuple[float, float], decay: tuple[float, float]) -> list[str]:
    found = []
    if not 0 < lr[0] <= lr[1] < float("inf"):
        found.append(f"lr is {lr}; expected two rates above 0, the lower first")
    if not 0 < decay[0] <= decay[1] <= 1:
        found.append(f"decay is {decay}; expected two numbers above 0 and at most 1, the lower first")
    return found


def _raise(found: Sequence[str]) -> None:
    if found:
        raise PlanError("the search space cannot be used:" + "".join(f"\n  - {problem}" for problem in found))


def names_by_depth(layers: LayerMap, depths: Sequence[int], *, epochs: int) -> dict[frozenset[str], int]:
    """Return the parameters that learn at each depth -> `epochs`, as a `CachePool` is told beforehand."""
    groups = list(layers)
    return {
        frozenset(name for group in groups[len(groups) - k :] for name in group.parameters): epochs
        for k in depths
    }


def spread_depths(groups: int, *, count: int = 6) -> tuple[int, ...]:
    """Return about `count` numbers of groups that learn, denser at the output.

    Always 1 (a linear probe) and all; between them evenly on a logarithmic scale, since accuracy gains most
    from the first groups unfrozen (masked-autoencoder ViT-L: 73.5 with none, 81.0 with one block, 84.9 with
    all; He et al. 2022).

    >>> spread_depths(14), spread_depths(6), spread_depths(2)
    ((1, 2, 3, 5, 8, 14), (1, 2, 3, 4, 6), (1, 2))
    """
    raw = {round(groups ** (i / (count - 1))) for i in range(count)} if groups > 1 else {1}
    return tuple(sorted(raw))
