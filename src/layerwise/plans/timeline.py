"""Where a plan stands after so many steps, and the rate of each group there, as pure functions.

The Tuner and `Plan.explain` both read their rates from here, so what is printed is what is done.
"""

from __future__ import annotations

from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.plans.rates import frozen_groups, multipliers
from layerwise.plans.schedules import factor


def learning(plan: Plan, phase: int, layers: LayerMap) -> frozenset[str]:
    """Return the groups of which something learns in phase number `phase`, by rates and overrides."""
    return frozenset(layers.names) - frozen_groups(multipliers(plan.phases[phase], layers), layers)


def joining(plan: Plan, phase: int, layers: LayerMap) -> frozenset[str]:
    """Return the groups that learn in phase number `phase` and did not in the phase before it.

    In the first phase no group joins: its warm-up is the schedule's.
    """
    if phase == 0:
        return frozenset()
    return learning(plan, phase, layers) - learning(plan, phase - 1, layers)


def phase_factor(plan: Plan, phase: int, step: int, steps_per_epoch: int, *, stalls: int = 0) -> float:
    """Return the schedule's factor at step number `step` of phase number `phase`.

    A schedule that spans the run is read at the step where the phase was planned to start, plus `step`:
    it ends its way at the end of the plan also when a phase before was cut short.
    """
    row = plan.phases[phase]
    if row.schedule.span == "run":
        step += sum(earlier.length_steps(steps_per_epoch) for earlier in plan.phases[:phase])
        return factor(row.schedule, step, plan.total_steps(steps_per_epoch), stalls=stalls)
    return factor(row.schedule, step, row.length_steps(steps_per_epoch), stalls=stalls)


def joins(plan: Plan, phase: int, layers: LayerMap, steps_per_epoch: int) -> dict[str, tuple[int, int]]:
    """Return for each group that learns in a phase when it joined: (step of the plan, length of its warm-up).

    A warm-up goes on into the next phase when its own is over before it is. Groups of the first phase are
    left out: they do not join.
    """
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for number, row in enumerate(plan.phases[: phase + 1]):
        now = learning(plan, number, layers)
        found = {name: join for name, join in found.items() if name in now}
        found |= dict.fromkeys(joining(plan, number, layers), (start, row.join_steps))
        start += row.length_steps(steps_per_epoch)
    return found
