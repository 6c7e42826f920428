"""`Order`: the batches of indices of one epoch, drawn when the loader's own iterator would draw them."""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from layerwise.cache.changes.alike import draws_at_once


class Order:
    """The indices of one epoch's batches, drawn when the loader's own iterator would draw them.

    Workers fetch ahead, so the sampler is asked for several batches at the start.

    Args:
        loader: whose batch sampler.
        seeded: the iterator would not draw a seed for its workers: they live on from an epoch before.
    """

    def __init__(self, loader: DataLoader[Any], *, seeded: bool) -> None:
        self._batches = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._early = len(loader.batch_sampler) - 1 if draws_at_once(loader) else 0  # type: ignore[arg-type]
        if not seeded:
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            if loader.num_workers:  # torch's iterator asks once more when it starts them
                self._batches = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._queue: deque[list[int]] = deque()
        self._ahead = loader.num_workers * (loader.prefetch_factor or 0)
        for _ in range(self._ahead):
            self._draw()

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> list[int]:
        if not self._queue:
            self._draw()
        if not self._queue:
            raise StopIteration
        indices = self._queue.popleft()
        if self._ahead:  # a worker that hands a batch over is given the next task
            self._draw()
        return indices

    def ahead(self, count: int) -> list[list[int]]:
        """Return the next batches, `count` or fewer: as many as a sampler gives early and draws nothing for.

        The last is not among them: with it, a sampler may draw what an epoch's end draws.
        """
        return list(islice(self, min(count, max(self._early, 0))))

    def hand_over(self) -> Order:
        """Leave fetching ahead to workers that iterate over this from now on."""
        self._ahead = 0
        return self

    def _draw(self) -> None:
        for batch in self._batches:
            indices = list(batch)
            with contextlib.suppress(TypeError, ValueError):  # a sampler may give tensors or numpy's integers
                numbers = [int(index) for index in indices]
                indices = numbers if numbers == indices else indices
            self._queue.append(indices)
            self._early -= 1
            return
