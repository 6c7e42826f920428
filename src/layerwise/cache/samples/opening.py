"""`open_supply`: whether the samples of a loader can be cached for a model, before anything is computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.changes.datawatch import DataWatch
from layerwise.cache.remedies import STORE_VIEWS
from layerwise.cache.samples.reading import LoaderReader
from layerwise.cache.samples.supply import NOT_LOADED, Supply, one_line
from layerwise.cache.store.decision import process_count
from layerwise.errors import CacheError
from layerwise.layers.isolation import unwrap

COMPILED = (
    "the model is compiled, as a whole or in part, and what is compiled cannot be skipped. Leave "
    "torch.compile out while the prefix is frozen"
)


def open_supply(loader: DataLoader[Any], model: nn.Module, *, views: int, asked: bool) -> Supply:
    """Return the supply of a loader; its `reason` says why nothing of it is cached, if so it is.

    Loads a few samples, twice, to find random augmentation. Where they differ in shape, loads all samples
    once to sort them by it. Where workers are prepared by a function, one loads them as well.

    Args:
        loader: whatever the user gave.
        model: as the user gave it, wrappers included.
        views: draws of each sample that are stored.
        asked: the user asked for a cache, and is warned where there is none.
    """
    supply = Supply(loader, views=views, asked=asked)
    try:
        _refuse_unusable(model)
        supply.read(LoaderReader(loader))
        watch, reader = DataWatch(loader.dataset, loader.collate_fn), supply.reader
        random, samples = reader.randomness()
        if views == 1:
            watch.loaded(samples)
            supply.watch = watch
        if random and views == 1:
            supply.refuse(random + STORE_VIEWS)
        elif not random and reader.differ_in_workers(samples):
            supply.refuse("worker_init_fn makes other samples than are loaded in this process")
        elif supply.looks_ragged():
            supply.sort()
    except CacheError as error:
        supply.refuse(str(error))
    except Exception as error:  # the dataset's own code; if it is at fault, the plain loop will say so
        supply.refuse(NOT_LOADED + one_line(error))
    return supply


def _refuse_unusable(model: nn.Module) -> None:
    """Raise CacheError if no pass of this model can be cached."""
    inner = unwrap(model)
    compiled = any(type(m).__name__ == "OptimizedModule" for m in (model, getattr(model, "module", model)))
    if compiled or any(getattr(m, "_compiled_call_impl", None) is not None for m in inner.modules()):
        raise CacheError(COMPILED)
    if process_count() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in inner.modules()):
        raise CacheError(
            "the model's SyncBatchNorm layers talk to the other processes in each forward pass, and the "
            "cache runs passes of its own, in which the others take no part"
        )
