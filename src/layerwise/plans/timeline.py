"""Where a plan stands after so many steps, and the rate of each group there, as pure functions.

The Tuner and `Plan.explain` both read their rates from here, so what is printed is what is done.
"""

from __future__ import annotations

from layerwise.plans.plan import Plan
from layerwise.plans.schedules import factor


def joining(plan: Plan, phase: int) -> frozenset[str]:
    """Return the groups that learn in phase number `phase` and did not in the phase before it.

    In the first phase no group joins: its warm-up is the schedule's.
    """
    if phase == 0:
        return frozenset()
    before, now = plan.phases[phase - 1], plan.phases[phase]
    return frozenset(name for name in plan.groups if now.trains(name) and not before.trains(name))


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


def joins(plan: Plan, phase: int, steps_per_epoch: int) -> dict[str, tuple[int, int]]:
    """Return for each group that learns in a phase when it joined: (step of the plan, length of its warm-up).

    A warm-up goes on into the next phase when its own is over before it is. Groups of the first phase are
    left out: they do not join.
    """
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for number, row in enumerate(plan.phases[: phase + 1]):
        new = joining(plan, number)
        found = {name: join for name, join in found.items() if row.trains(name)}
        found |= dict.fromkeys(new, (start, row.join_steps))
        start += row.length_steps(steps_per_epoch)
    return found
