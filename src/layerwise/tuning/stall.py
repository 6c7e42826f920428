"""When a validation metric has stopped to improve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from layerwise.errors import PlanError

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
