"""The factor of a schedule at a step: f(t) in [0, 1], times each group's own rate.

With t = 0, 1, ..., T - 1 the number of the optimiser step in its span, w the steps of the warm-up and
u = (t - w) / (T - w) the progress after it:

    warm-up              f = f(w) (t + 1) / (w + 1)               t < w; the shape's own start is at t = w
    constant             f = 1
    linear               f = floor + (1 - floor) (1 - u)
    cosine               f = floor + (1 - floor) (1 + cos(pi u)) / 2
    slanted triangular   f = max(floor, (1 + p (ratio - 1)) / ratio),  p = t / cut before
                             cut = floor(T cut_frac), then 1 - (t - cut) / (T - cut), t and T after w
    one-cycle            cosine from 1 / ratio up to 1 at u = cut_frac, then cosine down to the floor
    plateau              f = max(floor, factor ** number of times that validation stalled)

The floor is reached at t = T, the step after the last one, so no step is wasted at rate 0: the last step
of a linear schedule without warm-up and floor has f = 1 / T, the first one of a warm-up f(w) / (w + 1).
f(w) is where the shape starts: 1 / ratio for the slanted triangle (not below the floor; 1 where cut is 0) and
the one-cycle (1 where cut_frac is 0), else 1 (until validation stalls).
"""

from __future__ import annotations

import math

from layerwise.errors import PlanError
from layerwise.plans.settings import Schedule


def factor(schedule: Schedule, step: int, total_steps: int, *, stalls: int = 0) -> float:
    """Return the factor of `schedule` at the optimiser step number `step` of `total_steps`.

    Args:
        schedule: the shape and its settings.
        step: from 0; from `total_steps` on, the value at the end is returned.
        total_steps: length of the span (a phase or the run), at least 1.
        stalls: how many times validation stalled so far, for the plateau shape.

    Returns:
        A number in [0, 1]; 0 only where the floor is 0 and the span is over.

    Raises:
        PlanError: `step` or `total_steps` is out of range.

    >>> [round(factor(Schedule(shape="linear", warmup_steps=1), t, 5), 2) for t in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if total_steps < 1 or step < 0:
        raise PlanError(
            f"a schedule has no factor at step {step} of {total_steps}; expected 0 <= step, 1 <= total"
        )
    step = min(step, total_steps)
    warmup = warmup_steps(schedule, total_steps)
    if step < warmup:
        return join_factor(step, warmup) * _after_warmup(schedule, 0, total_steps - warmup, stalls)
    if step >= total_steps and warmup >= total_steps:
        return _after_warmup(schedule, 1, 1, stalls)
    return _after_warmup(schedule, step - warmup, total_steps - warmup, stalls)


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Return the length of the schedule's warm-up in steps, at most `total_steps`."""
    return min(schedule.warmup_steps or round(schedule.warmup_frac * total_steps), total_steps)


def join_factor(step: int, warmup: int) -> float:
    """Return the warm-up factor ``(step + 1) / (warmup + 1)``, 1 from step number `warmup` on.

    >>> [join_factor(t, 3) for t in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return 1.0 if step >= warmup else (step + 1) / (warmup + 1)


def _after_warmup(schedule: Schedule, step: int, total: int, stalls: int) -> float:
    """Return the factor `step` steps after the warm-up, of `total` (0 where the warm-up takes it all)."""
    done = step / total if total else 0.0
    floor = schedule.floor
    match schedule.shape:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - done)
        case "cosine":
            return floor + (1 - floor) * _cosine(done)
        case "slanted_triangular":
            return max(floor, _slanted(schedule, step, total))
        case "one_cycle":
            cut = schedule.cut_frac
            if done < cut:
                return 1 + (1 / schedule.ratio - 1) * _cosine(done / cut)
            return floor + (1 - floor) * _cosine((done - cut) / (1 - cut) if cut < 1 else 0.0)
        case "plateau":
            return max(floor, schedule.factor**stalls)


def _cosine(done: float) -> float:
    """Return half a cosine wave: 1 at 0, 0 at 1."""
    return (1 + math.cos(math.pi * done)) / 2


def _slanted(schedule: Schedule, step: int, total: int) -> float:
    """Return ULMFiT's slanted triangle (Howard and Ruder 2018, equation 3)."""
    cut = math.floor(total * schedule.cut_frac)
    # The paper divides by cut (1 / cut_frac - 1), which is T - cut where T cut_frac is whole, and elsewhere
    # misses the foot of the triangle.
    height = step / cut if step < cut else 1 - (step - cut) / max(total - cut, 1)
    return (1 + height * (schedule.ratio - 1)) / schedule.ratio
