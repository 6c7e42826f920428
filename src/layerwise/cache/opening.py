"""`open_supply`: whether the samples of a loader can be cached for a model, before anything is computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.datawatch import DataWatch
from layerwise.cache.decision import process_count
from layerwise.cache.reading import LoaderReader
from layerwise.cache.supply import Supply
from layerwise.errors import CacheError
from layerwise.layers.isolation import unwrap


def open_supply(loader: DataLoader[Any], model: nn.Module, *, views: int) -> Supply:
    """Return the supply of a loader; its `reason` says why nothing of it is cached, if so it is.

    Loads a few samples, twice, to find random augmentation. Where they differ in shape, loads all samples
    once to sort them by it.

    Args:
        loader: whatever the user gave.
        model: as the user gave it, wrappers included.
        views: draws of each sample that are stored.
    """
    supply = Supply(loader, views=views)
    supply.reason = _unusable(model)
    if supply.reason:
        return supply
    try:
        reader = LoaderReader(loader)
    except CacheError as error:
        supply.reason = str(error)
        return supply
    supply.read(reader)
    if reader.size < 2:
        supply.reason = "the dataset has fewer than two samples"
        return supply
    try:
        watch = DataWatch(loader.dataset)
        random, samples = reader.randomness()
        if views == 1:
            watch.loaded(samples)
            supply.watch = watch
        if random and views == 1:
            supply.reason = f"{random}. Pass views=V to store V draws of each sample"
        elif supply.looks_ragged():
            supply.sort()
    except Exception as error:  # the dataset's own code; if it is at fault, the plain loop will say so
        supply.reason = f"a sample could not be loaded in this process: {one_line(error)}"
    return supply


def _unusable(model: nn.Module) -> str:
    """Return why no pass of this model can be cached; ``""`` if it may be."""
    inner = unwrap(model)
    compiled = any(type(m).__name__ == "OptimizedModule" for m in (model, getattr(model, "module", model)))
    if compiled or getattr(inner, "_compiled_call_impl", None) is not None:
        return "the model is compiled; pass the plain model"
    if process_count() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in inner.modules()):
        return (
            "the model's SyncBatchNorm layers talk to the other processes in each forward pass, and the "
            "cache runs passes of its own, in which the others take no part"
        )
    return ""


def one_line(error: Exception) -> str:
    """Return an error's class and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
