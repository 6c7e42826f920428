"""`reads_alike`: whether a loader that was made anew gives what an earlier one gave, but for the order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_PLAIN = (bool, int, float, str, bytes, type(None))
_DRAWN_AT_ONCE = (SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


def reads_alike(one: Any, other: Any) -> bool:
    """Return whether two loaders make the same batches of the same samples, but for their order."""
    if type(one) is not type(other) or not (type(one) is DataLoader or hasattr(one.dataset, "is_same_as")):
        return False
    return (
        is_same_data(one.dataset, other.dataset)
        and does_the_same(one.collate_fn, other.collate_fn)
        and does_the_same(one.worker_init_fn, other.worker_init_fn)
        and _batching(one) == _batching(other)
    )


def does_the_same(one: Any, other: Any) -> bool:
    """Return whether two functions are known to do the same: a lambda is another object each time."""
    if one is other:
        return True
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ is other.__code__ and _are_same(_bound(one), _bound(other))
    if type(one) is type(other) is functools.partial:
        pairs = (one.args, other.args), (one.keywords, other.keywords)
        return does_the_same(one.func, other.func) and all(_are_same(*pair) for pair in pairs)
    if type(one) is type(other) and hasattr(one, "is_same_as"):  # of `by_length`
        return bool(one.is_same_as(other))
    if callable(one) and hasattr(one, "__self__") and hasattr(other, "__self__"):
        return bool(one == other)  # methods of one object
    return False


def keeps_order(loader: DataLoader[Any]) -> bool:
    """Return whether a loader is known to make the same batches in every epoch."""
    given: Any = loader.batch_sampler
    samplers = [given, getattr(given, "sampler", None)]
    return any(isinstance(s, SequentialSampler) or getattr(s, "shuffle", None) is False for s in samplers)


def draws_at_once(loader: DataLoader[Any]) -> bool:
    """Return whether a loader's whole order is known to be drawn with the first batch of an epoch."""
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        return bool(getattr(batches, "draws_at_once", False))
    sampler: Any = batches.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) in _DRAWN_AT_ONCE


def _bound(function: FunctionType) -> list[Any]:
    cells = [getattr(cell, "cell_contents", None) for cell in function.__closure__ or ()]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _are_same(one: Any, other: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects, or equal numbers and texts."""
    if isinstance(one, Mapping):
        return list(one) == list(other) and _are_same(list(one.values()), list(other.values()))
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b) or does_the_same(a, b)
        for a, b in zip(one, other)
    )


def is_same_data(one: Any, other: Any) -> bool:
    """Whether two data sets are one, the same part of one, or tables of `datasets` that were made alike."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if type(one) is Subset:
        return is_same_data(one.dataset, other.dataset) and list(one.indices) == list(other.indices)
    if hasattr(one, "is_same_as"):
        return bool(one.is_same_as(other))
    return type(one).__module__.partition(".")[0] == "datasets" and one._fingerprint == other._fingerprint


def _batching(loader: DataLoader[Any]) -> tuple[Any, ...]:
    sampler: Any = loader.batch_sampler
    size, drop_last = (getattr(sampler, name, None) for name in ("batch_size", "drop_last"))
    return type(sampler), size, drop_last, keeps_order(loader)
