"""`Window`: the batches of one optimiser step, whose gradients are made those of one mean loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.training.processes import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator


class Window:
    """The batches of one optimiser step, those of all processes together.

    The loss of a batch is a mean over something: samples, scored tokens, samples by the weight of their
    class. The gradient of a step is that of the mean over all of it in the window, so a batch counts by its
    size. Of equally large batches each loss is divided by their number, as any loop does.

    Args:
        accelerator: runs backward; processes average their gradients in it.
        batches: how many each process has.
    """

    def __init__(self, accelerator: Accelerator, batches: int) -> None:
        self._accelerator, self._batches = accelerator, batches
        self._unit: float | None = None  # the size of a batch that counts as one
        self._size = 0.0

    def backward(self, loss: Tensor, size: float) -> None:
        """Add the gradient of a batch.

        Args:
            loss: its mean loss, a scalar.
            size: over how much that is a mean; 0 of a batch in which nothing is scored.
        """
        if self._unit is None:
            self._unit = self._mean_over_processes(size) or 1.0
        self._size += size
        share = loss / (self._batches * self._unit / size) if size else loss * 0.0
        self._accelerator.backward(share)

    def close(self, model: nn.Module) -> None:
        """Make the gradients in `model` those of the mean over the window; before they are clipped."""
        size = self._mean_over_processes(self._size)
        if not size or self._unit is None:
            return
        factor = self._batches * self._unit / size
        if factor != 1.0:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)

    def _mean_over_processes(self, size: float) -> float:
        processes: int = self._accelerator.num_processes
        return sum_over_processes(self._accelerator, size)[0] / processes
