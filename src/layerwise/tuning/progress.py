"""Where a run stands in its plan: counters alone, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from layerwise.plans.plan import Plan


@dataclass
class Progress:
    """The counters of a `Tuner`; everything in it is saved.

    Attributes:
        phase: number of the phase.
        epoch: number of the epoch, which is that of finished epochs.
        step: optimiser steps so far.
        step_in_phase: of these, in the phase.
        step_in_epoch: of these, in the epoch.
        epochs_in_phase: finished epochs of the phase.
        whole_epochs: whether the phase is counted in epochs and began with one, so that it ends with one.
        stalls: how often validation stalled, for a plateau of the phase.
        run_stalls: the same for a plateau that spans the run: in all phases that have one.
        joined: group -> (step at which it joined, length of its warm-up in steps).
        drawn: trunk groups that learn now, for LISA; None where all of the phase do.
        begun: whether the phase's groups were started anew and its reference weights taken.
        done: whether the plan is over.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    step_in_phase: int = 0
    step_in_epoch: int = 0
    epochs_in_phase: int = 0
    whole_epochs: bool = True
    stalls: int = 0
    run_stalls: int = 0
    joined: dict[str, tuple[int, int]] = field(default_factory=dict)
    drawn: list[str] | None = None
    begun: bool = False
    done: bool = False

    def enter(self, phase: int, plan: Plan) -> None:
        """Stand at the start of phase number `phase`."""
        self.phase = phase
        self.step_in_phase = self.epochs_in_phase = self.stalls = 0
        self.whole_epochs = plan.phases[phase].epochs is not None and self.step_in_epoch == 0
        self.drawn, self.begun = None, False

    def steps_left(self, plan: Plan, steps_per_epoch: int) -> int:
        """Return the optimiser steps until the end of the plan, no phase ending early."""
        if self.done:
            return 0
        later = sum(phase.length_steps(steps_per_epoch) for phase in plan.phases[self.phase + 1 :])
        return self._left(plan, steps_per_epoch) - (self.step_in_epoch if self.whole_epochs else 0) + later

    def epochs_left(self, plan: Plan, steps_per_epoch: int) -> int:
        """Return the epochs until then, the running one included, a last partial one counted as one."""
        if self.done:
            return 1 if self.step_in_epoch else 0
        later = sum(phase.length_steps(steps_per_epoch) for phase in plan.phases[self.phase + 1 :])
        steps = self._left(plan, steps_per_epoch) + (0 if self.whole_epochs else self.step_in_epoch) + later
        return math.ceil(steps / steps_per_epoch)

    def _left(self, plan: Plan, steps_per_epoch: int) -> int:
        """Return the steps left in the phase: from the start of the epoch where it ends with one."""
        phase = plan.phases[self.phase]
        if self.whole_epochs and phase.epochs is not None:
            return (phase.epochs - self.epochs_in_phase) * steps_per_epoch
        return max(0, phase.length_steps(steps_per_epoch) - self.step_in_phase)

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain data; ``Progress.from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """Build the counters from what `to_dict` returned, once with one count of stalls for both spans."""
        joined = {name: (int(step), int(size)) for name, (step, size) in data["joined"].items()}
        return cls(**{"run_stalls": data["stalls"], **data, "joined": joined})
