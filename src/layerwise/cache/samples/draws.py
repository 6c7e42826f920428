"""Whether loading samples draws random numbers, by the global generators or by the dataset's own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, get_worker_info

from layerwise.cache.changes.fingerprint import datasets_in
from layerwise.layers.randomness import drawn
from layerwise.layers.snapshot import Snapshot

BY_CHANCE = "(random augmentation, or random masks)"
DRAWS = f"loading a sample draws random numbers {BY_CHANCE}"


class Noting:
    """Collates in a worker, and notes whether it drew random numbers since the batch before.

    Args:
        loader: whose workers.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._collate, self._prepare = loader.collate_fn, loader.worker_init_fn
        self._own = Snapshot([])
        self._before: tuple[Any, ...] | None = None

    def prepare(self, worker: int) -> None:
        """Do what the loader's workers do when they begin."""
        if self._prepare is not None:
            self._prepare(worker)
        info: Any = get_worker_info()
        self._own = own_generators(info.dataset, self._collate)
        self._before = drawn(), self._own.states()

    def __call__(self, samples: Any) -> tuple[Any, bool]:
        """Return a batch, and whether loading it drew; False where no worker loads it."""
        batch, worker = self._collate(samples), get_worker_info()
        if worker is None:
            return batch, False
        before, self._before = self._before, (drawn(), self._own.states())
        return batch, self._before != before or says_it_drew(worker.dataset)


def own_generators(dataset: Any, collate: Any) -> Snapshot:
    """Return the random generators that loading uses, and that are not the global ones.

    Methods that load a sample are asked as well: they may draw by globals of a module.

    Args:
        dataset: map-style; those in it are looked into as well.
        collate: the collate function; None where there is none.
    """
    parts, names = datasets_in(dataset), ("__getitem__", "__getitems__")
    code = [getattr(type(part), name, None) for part in parts for name in names]
    return Snapshot([*parts, collate, *code], generators_only=True)


def says_it_drew(dataset: Any) -> bool:
    """Return whether a dataset that puts the random states back (`SeededSamples`) says that it drew."""
    return getattr(dataset, "has_drawn", False) is True


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether this thread draws from torch's global generators."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        return func(*args, **kwargs)
