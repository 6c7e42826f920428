"""The task's monitor: its value, whether it is the best so far, and whether it has stalled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from layerwise.errors import TrainingError, did_you_mean
from layerwise.training.tasks import Scores, Task
from layerwise.tuning.stall import Stall


def monitored_value(scores: Scores, task: Task) -> float | None:
    """Return the value of the task's monitor; None where nothing was measured.

    Raises:
        TrainingError: other metrics were measured than the task's monitor.
    """
    if scores.values and task.monitor not in scores.values:
        raise TrainingError(
            f"the task's monitor {task.monitor!r} is not measured, so no epoch would be the best one; "
            f"measured are {', '.join(scores.values)}.{did_you_mean(task.monitor, scores.values)} Name one "
            "of them as the task's monitor."
        )
    return scores.values.get(task.monitor)


def is_better(
    value: float,
    than: float | None,
    mode: Literal["max", "min"],
    *,
    loss: float | None = None,
    than_loss: float | None = None,
) -> bool:
    """Return whether `value` improves on `than`: on nothing, always; NaN never does, and all beat it.

    Of equal values the one with the lower loss is better, where both losses are known.
    """
    if than is None:
        return True
    if math.isnan(than):
        return not math.isnan(value)
    if value == than and loss is not None and than_loss is not None:
        return is_better(loss, than_loss, "min")
    return value > than if mode == "max" else value < than


def has_stalled(values: Sequence[float], mode: Literal["max", "min"], *, patience_epochs: int) -> bool:
    """Return whether the last `patience_epochs` values are no better than the best before them (`Stall`).

    >>> has_stalled([0.5, 0.7, 0.6, 0.7], "max", patience_epochs=2)
    True
    >>> has_stalled([0.5, 0.7, 0.6], "max", patience_epochs=2)
    False
    """
    stall = Stall()
    for value in values:
        stall.update(value, mode)
    return stall.bad_epochs >= patience_epochs
