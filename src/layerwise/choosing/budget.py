"""`Budget`: when a search stops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerwise.choosing.study import TrialRow

SEARCH_SHARE = 0.6
"""Share of a budget in minutes that finds settings; the rest confirms them with more seeds."""
OVERRUN = 0.1
"""Share of a budget in minutes by which a trial may outlast it, before it is cut off and queued again."""


@dataclass(frozen=True)
class Budget:
    """When to stop: by the number of trials in the study, and by the clock of this process.

    Attributes:
        trials: of the search itself, confirming ones not counted; None for any number.
        minutes: from the making of this object on; None for any time.
        seeds: runs of the best setting of each choice.
        began_s: by the monotonic clock.
    """

    trials: int | None
    minutes: float | None
    seeds: int
    began_s: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return self._over(1.0)

    @property
    def overrun(self) -> bool:
        """Whether the time has been over for so long that a trial under way is not waited for."""
        return self._over(1.0 + OVERRUN)

    def allows(self, rows: Sequence[TrialRow]) -> bool:
        """Return whether another trial of the search (not a confirming one) may begin."""
        if self._over(SEARCH_SHARE if self.seeds > 1 else 1.0):
            return False
        if self.trials is None:
            return True
        first_seed = min((row.seed for row in rows), default=0)
        # one that was cut off is run again; one that failed by an error is not, and counts
        begun = [row for row in rows if row.state in ("complete", "pruned", "running") or row.error]
        return sum(row.seed == first_seed for row in begun) < self.trials

    def _over(self, share: float) -> bool:
        return self.minutes is not None and time.monotonic() - self.began_s >= share * self.minutes * 60
