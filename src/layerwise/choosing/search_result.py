"""What a search has found: the best setting of each choice, the winner, every trial."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerwise.choosing.space import Space
from layerwise.choosing.study import TrialRow
from layerwise.choosing.tables import text_table
from layerwise.choosing.terms import mean_and_error
from layerwise.errors import figure, plural
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.shown import Shown
from layerwise.training.result import Result
from layerwise.tuning.stall import Mode

CURVE_COLUMNS = ("trained", "from", "metric", "error", "seeds", "lr", "decay")


@dataclass(frozen=True)
class CurvePoint:
    """The best setting of one choice, over its seeds.

    Attributes:
        choice: ``"last 3"``, or a named strategy.
        trained_groups: how many groups learn, or None for a named strategy.
        first: the first group that learns, or the strategy.
        lr: base rate of the best setting.
        decay: its decay.
        mean: metric, averaged over seeds.
        error: standard error of that mean; 0 with one seed.
        seeds: how many different ones there are.
    """

    choice: str
    trained_groups: int | None
    first: str
    lr: float
    decay: float
    mean: float
    error: float
    seeds: int

    @property
    def setting(self) -> tuple[str, float, float]:
        """Choice, rate and decay: what all seeds of a point share."""
        return self.choice, self.lr, self.decay

    @property
    def described(self) -> str:
        """The choice, and for a depth the first group that learns."""
        return self.choice if self.trained_groups is None else f"{self.choice} (from {self.first})"

    def cells(self) -> list[str]:
        """Return the point as a row under `CURVE_COLUMNS`; a single seed has no error, a probe no decay."""
        return [
            self.choice,
            "-" if self.trained_groups is None else self.first,
            figure(self.mean),
            figure(self.error) if self.seeds > 1 else "-",
            str(self.seeds),
            f"{self.lr:.2g}",
            "-" if self.trained_groups in (None, 1) else f"{self.decay:.2f}",
        ]


@dataclass(frozen=True)
class SearchResult(Shown):
    """What a search has found so far.

    Attributes:
        metric: that was compared, on the validation data.
        mode: whether more of it is better.
        best: the winning choice.
        plan: its plan.
        lr: its base rate.
        curve: the best setting of each choice: metric against depth.
        trials: every trial of the study, of all workers.
        run: the winner's run, its model tuned; None where another worker makes it, or none was asked for.
        notes: for people.
    """

    metric: str
    mode: Mode
    best: CurvePoint
    plan: Plan
    lr: float
    curve: tuple[CurvePoint, ...]
    trials: tuple[TrialRow, ...]
    run: Result | None
    notes: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """How many trials there are, and how they ended."""
        states = Counter(
            "interrupted" if trial.state == "failed" and not trial.error else trial.state
            for trial in self.trials
        )
        ended = ", ".join(f"{n} {state}" for state, n in states.items())
        return f"{plural(len(self.trials), 'trial')}: {ended}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tuned model as plain data for JSON."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "best": dataclasses.asdict(self.best),
            "plan": self.plan.to_dict(),
            "lr": self.lr,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "trials": [dataclasses.asdict(row) for row in self.trials],
            "run": None if self.run is None else self.run.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        columns = [self.metric if name == "metric" else name for name in CURVE_COLUMNS]
        return "\n".join(
            [
                f"best: {self.best.described} at lr {self.lr:.2g}: {self.metric} {figure(self.best.mean)}",
                text_table(columns, [point.cells() for point in self.curve]),
                self.counted,
                *self.notes,
            ]
        )


def values_by_seed(rows: Sequence[TrialRow], choice: str) -> dict[tuple[float, float], dict[int, float]]:
    """Return rate and decay -> seed -> value, of the complete trials of a choice.

    A sampler may draw a setting again, with the seed that all its trials have: that is no second seed.
    """
    found: dict[tuple[float, float], dict[int, float]] = {}
    for row in rows:
        if row.choice == choice and row.value is not None:
            found.setdefault((row.lr, row.decay), {}).setdefault(row.seed, row.value)
    return found


def depth_curve(
    rows: Sequence[TrialRow], space: Space, layers: LayerMap, mode: Mode, *, seeds: int
) -> tuple[CurvePoint, ...]:
    """Return the best setting of each choice that has a complete trial, in order of the space.

    Only settings that ran with all seeds are compared, or with the most where none did: one lucky run does
    not beat a mean.

    Args:
        rows: trials.
        space: that they are of.
        layers: the layer map.
        mode: whether more of the metric is better.
        seeds: how many a setting is run with.
    """
    sign = 1 if mode == "max" else -1
    found = []
    for choice in space.choices:
        settings = {setting: list(own.values()) for setting, own in values_by_seed(rows, choice).items()}
        if not settings:
            continue
        wanted = min(seeds, max(map(len, settings.values())))
        compared = {setting: own for setting, own in settings.items() if len(own) >= wanted}
        (lr, decay), values = max(compared.items(), key=lambda item: sign * float(np.mean(item[1])))
        k = space.trained_groups(choice)
        mean, error = mean_and_error(values)
        found.append(
            CurvePoint(
                choice=choice,
                trained_groups=k,
                first=choice if k is None else layers.names[len(layers) - k],
                lr=lr,
                decay=decay,
                mean=mean,
                error=error,
                seeds=len(values),
            )
        )
    return tuple(found)


def best_point(curve: Sequence[CurvePoint], mode: Mode, *, seeds: int) -> CurvePoint:
    """Return the best of the points with `seeds` seeds, or with the most; `curve` is not empty."""
    sign = 1 if mode == "max" else -1
    wanted = min(seeds, max(point.seeds for point in curve))
    return max((point for point in curve if point.seeds >= wanted), key=lambda point: sign * point.mean)
