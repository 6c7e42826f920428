"""Where a run stands in its plan: counters, as plain data, and how they move on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.timeline import joining, learning


@dataclass
class Progress:
    """The counters of a `Tuner`; all but the plan and the length of an epoch are saved.

    Attributes:
        plan: what is carried out.
        steps_per_epoch: optimiser steps in an epoch, as the Tuner was told.
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

    plan: Plan = field(repr=False)
    steps_per_epoch: int
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

    @property
    def row(self) -> Phase:
        """The phase itself."""
        return self.plan.phases[self.phase]

    @property
    def phase_over(self) -> bool:
        """Whether the phase had all its epochs, or all its steps."""
        if self.whole_epochs:
            return self.epochs_in_phase >= (self.row.epochs or 0)
        return self.step_in_phase >= self.row.length_steps(self.steps_per_epoch)

    @property
    def steps_left(self) -> int:
        """Optimiser steps until the end of the plan, no phase ending early."""
        if self.done:
            return 0
        return self._left() - (self.step_in_epoch if self.whole_epochs else 0)

    @property
    def epochs_left(self) -> int:
        """Epochs until then, the running one included, a last partial one counted as one."""
        if self.done:
            return 1 if self.step_in_epoch else 0
        steps = self._left() + (0 if self.whole_epochs else self.step_in_epoch)
        return math.ceil(steps / self.steps_per_epoch)

    def enter(self, phase: int) -> None:
        """Stand at the start of phase number `phase`."""
        self.phase = phase
        self.step_in_phase = self.epochs_in_phase = self.stalls = 0
        self.whole_epochs = self.row.epochs is not None and self.step_in_epoch == 0
        self.drawn, self.begun = None, False

    def enter_next(self, layers: LayerMap) -> None:
        """Stand at the start of the next phase, with the groups of `layers` that join in it; or be done."""
        if self.phase + 1 == len(self.plan.phases):
            self.done = True
            return
        self.enter(self.phase + 1)
        now, new = learning(self.plan, self.phase, layers), joining(self.plan, self.phase, layers)
        self.joined = {name: join for name, join in self.joined.items() if name in now}
        join = self.step, self.row.join_steps
        self.joined |= {name: join for name in layers.names if name in new}  # in an order: it is saved

    def count_step(self) -> None:
        """Take in that an optimiser step was taken."""
        self.step += 1
        self.step_in_phase += 1
        self.step_in_epoch += 1

    def count_epoch(self) -> None:
        """Take in that the epoch is over."""
        self.epoch += 1
        self.step_in_epoch = 0
        if self.done:
            return
        if self.step_in_phase:
            self.epochs_in_phase += 1
        else:  # the phase before ended with this epoch's last step
            self.whole_epochs = self.row.epochs is not None

    def _left(self) -> int:
        """Return the steps left in the plan: from the start of the epoch where the phase ends with one."""
        later = self.plan.phases[self.phase + 1 :]
        if self.whole_epochs and self.row.epochs is not None:
            left = (self.row.epochs - self.epochs_in_phase) * self.steps_per_epoch
        else:
            left = max(0, self.row.length_steps(self.steps_per_epoch) - self.step_in_phase)
        return left + sum(phase.length_steps(self.steps_per_epoch) for phase in later)

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain data; `loaded` is its inverse."""
        given = ("plan", "steps_per_epoch")
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in given})

    def loaded(self, counters: Mapping[str, Any]) -> Progress:
        """Return where `to_dict` was called, once with one count of stalls for both spans."""
        joined = {name: (int(step), int(size)) for name, (step, size) in counters["joined"].items()}
        return replace(self, **{"run_stalls": counters["stalls"], **counters, "joined": joined})
