"""Loaders of frameworks: those that Accelerate has prepared, and one to be given to a loop that is not ours.

``accelerator.prepare(loader)`` gives a loader that moves batches to the device and keeps account of where an
epoch ends, for gradient accumulation. It reads from a loader inside it. That one is cached; while an epoch
begins, the cache's batches stand in its place, and all the rest is done by Accelerate's own code.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

_LIGHTNING_ASKS = "_check_dataloader_iterable"
"""Lightning's function that makes an iterator to see whether a loader that is not one of torch's has one."""


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
    loader.base_dataloader = _Instead(base, lambda: iter(batches))
    try:
        first = list(itertools.islice(outer, 1))  # begins the epoch: iterates over what it reads
    finally:
        loader.base_dataloader = base
    while first:
        yield first.pop()  # not kept while the loop goes on
    yield from outer


def stand_in(loader: Any, begin: Callable[[], Iterator[Any]]) -> Any:
    """Return what iterates over other batches, and is the loader in all else.

    Args:
        loader: any; of a prepared one, another prepared one is returned, as frameworks look at its class.
        begin: returns the batches of one epoch, of the loader from which a prepared one reads.
    """
    if not is_prepared(loader):
        return _Instead(loader, begin)
    return reading(loader, _Instead(loader.base_dataloader, begin))


def reading(loader: Any, other: Any) -> Any:
    """Return a prepared loader that reads from another one, and is the given one in all else."""
    made = object.__new__(type(loader))
    vars(made).update(vars(loader), base_dataloader=other)
    return made


def is_stand_in(loader: Any) -> bool:
    """Return whether a loader is what `stand_in` made of one, Accelerate's aside."""
    return isinstance(loader, _Instead)


class _Instead:
    """A loader with other batches; in all else it is the loader.

    Args:
        loader: in whose place it stands.
        begin: returns the batches of one epoch.
    """

    def __init__(self, loader: DataLoader[Any], begin: Callable[[], Iterator[Any]]) -> None:
        self._loader, self._begin = loader, begin

    def __iter__(self) -> Iterator[Any]:
        batches = self._begin()
        if sys._getframe(1).f_code.co_name == _LIGHTNING_ASKS:
            return batches
        return iter(batches)  # begins the epoch, and draws what a loader's iterator draws when it is made

    def __len__(self) -> int:
        return len(self._loader)

    def __repr__(self) -> str:  # frameworks that want to make it anew with another sampler name it in errors
        return f"<PrefixCache.as_loader of {self._loader!r}: its order is that loader's>"

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._loader, name)
