"""`Rates`: the learning rate of each param group at each step of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.plans.schedules import join_factor
from layerwise.plans.timeline import phase_factor
from layerwise.tuning.optimizers import set_rate
from layerwise.tuning.progress import Progress


class Rates:
    """Gives the param groups of an optimiser the rate of the next step.

    It is the base rate times the group's multiplier, the schedule's factor, a ramp for a group that has just
    joined, and what `layerwise.tuning.gradient_norms` measured.

    Args:
        lr: the base rate.

    Attributes:
        multipliers: of each param group of the phase, by name.
    """

    def __init__(self, lr: float) -> None:
        self._lr = lr
        self.multipliers: dict[str, float] = {}

    def give(self, optimizer: Any, progress: Progress, measured: Mapping[str, float]) -> None:
        """Set the rates in `optimizer`.

        Args:
            optimizer: its param groups have ``"name"`` and ``"layer_group"``.
            progress: where the run stands.
            measured: factors by layer group; used where the phase asks for them.
        """
        phase, steps_per_epoch = progress.row, progress.steps_per_epoch
        # An epoch with more steps than were told goes on at the last rate, not at the foot of the schedule.
        step = min(progress.step_in_phase, phase.length_steps(steps_per_epoch) - 1)
        stalls = progress.run_stalls if phase.schedule.span == "run" else progress.stalls
        factor = phase_factor(progress.plan, progress.phase, step, steps_per_epoch, stalls=stalls)
        for group in optimizer.param_groups:
            value = self._lr * self.multipliers[group["name"]] * factor
            start, length = progress.joined.get(group["layer_group"], (0, 0))
            value *= join_factor(progress.step - start, length)
            if phase.adapt_rates == "auto_rgn":
                value *= measured.get(group["layer_group"], 1.0)
            set_rate(group, value)
