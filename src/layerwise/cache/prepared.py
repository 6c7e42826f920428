"""Loaders prepared by Accelerate: they iterate in Accelerate's own way, over the cache's batches.

``accelerator.prepare(loader)`` gives a loader that moves batches to the device and keeps account of where an
epoch ends, for gradient accumulation. It reads from a loader inside it. That one is cached; while an epoch
begins, the cache's batches stand in its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader


def is_prepared(loader: Any) -> bool:
    """Return whether Accelerate has prepared a loader; its class says it is a plain one."""
    kind = type(loader)
    return kind.__module__ == "accelerate.data_loader" and kind.__name__ == "DataLoaderShard"


def inner(loader: Any) -> DataLoader[Any]:
    """Return the loader from which a prepared one reads; any other as it is."""
    found: DataLoader[Any] = loader.base_dataloader if is_prepared(loader) else loader
    return found


def iterated(loader: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield what a prepared loader would make of an epoch, if `batches` were what it reads."""
    base, outer = loader.base_dataloader, iter(loader)
    loader.base_dataloader = _Instead(base, batches)
    try:
        first = list(itertools.islice(outer, 1))  # begins the epoch: iterates over what it reads
    finally:
        loader.base_dataloader = base
    yield from first
    yield from outer


class _Instead:
    """A loader with other batches."""

    def __init__(self, loader: DataLoader[Any], batches: Iterable[Any]) -> None:
        self._loader, self._batches = loader, batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
