"""Mean and variance per channel of all that a norm layer sees, batch by batch, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from layerwise.errors import DataError
from layerwise.layers.devices import widest_float
from layerwise.layers.norms import NormLayer
from layerwise.tuning.processes import distributed


class Moments:
    """Count, mean and sum of squared deviations per channel, merged batch by batch in float64.

    Merging (Chan, Golub and LeVeque 1979) weighs each batch by its size, and adds the spread *between*
    batches to the spread within them, which an average of batch variances leaves out. InstanceNorm is
    simpler: it stores the averages, over samples, of each sample's own mean and unbiased variance.
    """

    def __init__(self, norm: NormLayer) -> None:
        self.norm = norm
        self.instance = isinstance(norm.module, _InstanceNorm)
        self.calls = 0
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in an input of the layer, of shape (N, C, ...)."""
        self.calls += 1
        if not len(x):  # a detector's head that sees no region
            return
        wide = x.detach().to(widest_float(x.device))
        if self.instance:
            variance, mean = torch.var_mean(wide.flatten(2), dim=2, correction=1)  # (N, C)
            count, mean, squares = len(wide), mean.mean(0), variance.sum(0)
        else:
            channels = wide.transpose(0, 1).flatten(1)  # (C, N * ...)
            variance, mean = torch.var_mean(channels, dim=1, correction=0)
            count, squares = channels.shape[1], variance * channels.shape[1]
        self._merge(count, mean.cpu().double(), squares.cpu().double())

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        total = self.count + count
        if count == 0:
            return
        delta = mean - self.mean
        between = 0.0 if self.instance else delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + between
        self.count = total

    def replace(self, x: Tensor) -> None:
        """Make the moments of this one input the running statistics, before the layer reads them."""
        self.add(x)
        self.write()

    def gather(self) -> None:
        """Merge the moments of all processes, in the order of their ranks, so that all agree."""
        if not distributed():
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (self.calls, self.count, self.mean, self.squares))
        self.calls, self.count = 0, 0
        self.mean, self.squares = torch.zeros_like(self.mean), torch.zeros_like(self.squares)
        for calls, count, mean, squares in parts:
            self._merge(count, mean, squares)
            self.calls += calls

    def write(self) -> None:
        """Make the moments the running statistics of the layer."""
        if self.count < 2 and not self.instance:
            raise DataError(
                f"batch-norm {self.norm.name!r} saw {self.count} value per channel; a variance needs two at "
                "least. Give more samples, or larger inputs."
            )
        buffers = self.norm.module._buffers
        variance = self.squares / (self.count if self.instance else self.count - 1)
        for name, value in (("running_mean", self.mean), ("running_var", variance)):
            buffer = buffers[name]
            assert buffer is not None
            buffer.copy_(value)
        tracked = buffers.get("num_batches_tracked")
        if tracked is not None and not self.instance:  # InstanceNorm has the buffer but never counts
            tracked.fill_(self.calls)


def clone_statistics(module: nn.Module) -> dict[str, Tensor] | None:
    """Return a copy of the buffers of a norm; None for a lazy one that has no shape yet."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    if any(isinstance(buffer, nn.UninitializedBuffer) for buffer in buffers.values()):
        return None  # a lazy norm, about to get its shape
    return {name: buffer.clone() for name, buffer in buffers.items()}


def restore_statistics(module: nn.Module, statistics: dict[str, Tensor] | None) -> None:
    """Put back what `clone_statistics` returned."""
    if statistics is None:
        if not isinstance(module._buffers["running_mean"], nn.UninitializedBuffer):
            type(module).reset_running_stats(module)  # type: ignore[attr-defined]  # also of one that is held
        return
    for name, value in statistics.items():
        module._buffers[name].copy_(value)  # type: ignore[union-attr]


def mean_shift(module: nn.Module, before: dict[str, Tensor] | None) -> float:
    """Return the move of the mean in old standard deviations, averaged over channels."""
    if before is None:
        return 0.0
    moved = (module._buffers["running_mean"] - before["running_mean"]).abs()  # type: ignore[operator]
    return float((moved / (before["running_var"] + float(getattr(module, "eps", 1e-5))).sqrt()).mean())
