"""When a validation metric has stopped to improve, and what of a plan ends or falls then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from layerwise.errors import PlanError
from layerwise.tuning.progress import Progress

Mode = Literal["max", "min"]


@dataclass
class Stall:
    """Counts the epochs since the best value of a metric. NaN never improves.

    Attributes:
        best: the best value so far, None before the first.
        bad_epochs: epochs since then.
    """

    best: float | None = None
    bad_epochs: int = 0

    def update(self, metric: float, mode: Mode) -> int:
        """Take in the metric of one epoch and return the epochs without improvement, 0 for a new best.

        >>> stall = Stall()
        >>> [stall.update(value, "max") for value in (0.5, 0.4, 0.6, 0.6)]
        [0, 1, 0, 1]
        """
        if mode not in ("max", "min"):
            raise PlanError(f"mode is {mode!r}; expected 'max' (more is better) or 'min'")
        better = not math.isnan(metric) and (
            self.best is None or (metric > self.best if mode == "max" else metric < self.best)
        )
        if better:
            self.best = float(metric)  # not numpy's or torch's: it is saved
        self.bad_epochs = 0 if better else self.bad_epochs + 1
        return self.bad_epochs

    def runs_out(self, metric: float, mode: Mode, patience_epochs: int) -> bool:
        """Take in the metric of one epoch; return whether patience is over, and then count anew.

        >>> stall = Stall()
        >>> [stall.runs_out(0.5, "max", 1) for _ in range(6)]
        [False, False, True, False, True, False]
        """
        over = self.update(metric, mode) > patience_epochs
        if over:
            self.bad_epochs = 0
        return over


@dataclass
class Stalls:
    """What of a plan waits for validation: the end of a phase, and the falls of plateau schedules.

    Attributes:
        stall: epochs of the phase without improvement, for its patience.
        plateau: those since the last fall, for a plateau of the phase.
        run_plateau: the same for a plateau that spans the run.
    """

    stall: Stall = field(default_factory=Stall)
    plateau: Stall = field(default_factory=Stall)
    run_plateau: Stall = field(default_factory=Stall)

    def start_phase(self) -> None:
        """Count anew what is counted in a phase."""
        self.stall, self.plateau = Stall(), Stall()

    def take_in(self, progress: Progress, metric: float, mode: Mode) -> bool:
        """Take in the metric of the epoch that has just ended; return whether the phase is to end for it.

        An epoch whose last step ended a phase counts for a plateau of the run alone.

        Args:
            progress: where the run stands; its counts of stalls move on.
            metric: of the epoch.
            mode: whether more of it is better (``"max"``) or less.
        """
        phase, schedule = progress.row, progress.row.schedule
        before = progress.step_in_phase == 0
        if schedule.shape == "plateau" and schedule.span == "run":
            progress.run_stalls += self.run_plateau.runs_out(metric, mode, schedule.patience_epochs)
        if before:
            return False
        if schedule.shape == "plateau" and schedule.span == "phase":
            progress.stalls += self.plateau.runs_out(metric, mode, schedule.patience_epochs)
        return self.stall.update(metric, mode) >= (phase.patience_epochs or math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain data; ``Stalls.from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stalls:
        """Build what `to_dict` was called on, once with one count for the plateaus of both spans."""
        run_plateau = data.get("run_plateau", data["plateau"])
        return cls(Stall(**data["stall"]), Stall(**data["plateau"]), Stall(**run_plateau))
