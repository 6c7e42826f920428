"""One pass over held-out data: loss, metrics, tables; and predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.cache.prefix import PrefixCache
from layerwise.errors import DataError
from layerwise.layers.devices import widest_float
from layerwise.layers.randomness import kept_random_state
from layerwise.training.data import Batches
from layerwise.training.processes import to_device
from layerwise.training.tasks import Scores, Task
from layerwise.tuning.modes import held_modes
from layerwise.tuning.processes import distributed

_CPU = torch.device("cpu")


def evaluate(
    model: nn.Module,
    batches: Batches,
    task: Task,
    *,
    device: torch.device | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    on_batch: Callable[[], None] = lambda: None,
    cache: PrefixCache | None = None,
) -> Scores:
    """Return loss and metrics of `model` on a data set; modes, weights and random numbers stay as they are.

    The loss is the mean over all samples, or over what else the task's loss is a mean over: it does not
    depend on how samples are batched. In several processes every one sees its share, and the numbers
    returned are those of all shares together.

    Args:
        model: in any mode; evaluated in eval mode without gradients.
        batches: the data.
        task: what a batch means.
        device: where batches go; None leaves them.
        autocast: context of the forward pass.
        on_batch: called after each batch.
        cache: keeps what the frozen prefix gives for this data set too.

    Raises:
        DataError: nothing in the data is scored.
    """
    # Metrics may count in float64; where the device has none they stay on the CPU.
    home = device if device is None or widest_float(device) == torch.float64 else _CPU
    metrics = task.metrics().to(home) if home is not None else task.metrics()
    total = torch.zeros(2, dtype=torch.float64)
    with held_modes(model), torch.no_grad(), kept_random_state():
        model.eval()
        for batch in batches.epoch(0, cache=cache):
            batch = batch if device is None else to_device(batch, device)
            with autocast():
                output = task.forward(model, batch)
                loss = task.loss(output, batch)
            size = task.size(batch)
            total += torch.tensor([float(loss) * size, size], dtype=torch.float64)
            if home != device:
                output, batch = output.cpu(), to_device(batch, _CPU)
            task.update(metrics, output.float(), batch)
            on_batch()
    if distributed():
        total = total.to(device)
        torch.distributed.all_reduce(total)
    if not total[1]:
        raise DataError(
            "nothing in the held-out data is scored: all their labels are -100 (in too few texts no token is "
            "masked), or of classes without weight. Give more of them, or others."
        )
    scores = task.scores(metrics)
    return Scores({"loss": float(total[0] / total[1]), **scores.values}, scores.tables)


@torch.no_grad()
def first_output(model: nn.Module, task_forward: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
    """Return the model's output for a batch in eval mode; modes, weights and gradients stay."""
    with held_modes(model):
        model.eval()
        return task_forward(model, batch)
