"""`DataWatch`: notice that somebody changed a data set between two epochs: labels, inputs, a transform.

Loading samples again to compare them would cost what the cache saves. So the data set's own attributes, and
what they hold, are compared: at the end of an epoch and at the beginning of the next. What loading itself
changes (a counter, a store of decoded images) does not count.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.cache.fingerprint import tensor_digest
from layerwise.layers.structures import tensors_in

_DEPTH = 5  # objects in others: a Subset of a data set with a Compose of transforms
_LISTED = 200_000  # items of a container that are compared; of a longer one, so many spread evenly
_WORDS = 65_536  # numbers of an array that are compared, spread evenly

State = dict[str, Any]


class DataWatch:
    """Compares a data set with itself.

    Args:
        dataset: whatever the loader reads; no sample was loaded yet.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._last = state_of(dataset)
        self._loading = {"epoch"}  # what does not count; `LoaderReader.randomness` has tried another epoch
        self._samples: list[str] = []

    def loaded(self, samples: Any) -> None:
        """Note what loading a few samples changed, and the samples."""
        self._samples = _digests(samples)
        now = state_of(self._dataset)
        self._loading |= _different(self._last, now)
        self._last = now

    def epoch_ended(self) -> None:
        """Take the data set as it is now for the one to compare with."""
        self._last = state_of(self._dataset)

    def changed(self, load: Callable[[], Any]) -> str:
        """Return which attribute was changed since the last epoch ended, and samples with it; or ``""``.

        A number or a text that changed counts only if samples that are loaded again differ: it may be an
        epoch number that nobody uses.

        Args:
            load: returns the samples of `loaded`, loaded again.
        """
        now = state_of(self._dataset)
        found = sorted(_different(self._last, now, self._loading))
        if not found:
            return ""
        samples = _digests(load())
        differ, self._samples, self._last = samples != self._samples, samples, now
        content = [name for name in found if isinstance(now.get(name), bytes)]
        return found[0] if differ else content[0] if content else ""


class DataNames:
    """Remembers how datasets were named, as long as they do not change."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, State, set[str], str]] = []

    def name_of(self, dataset: Any, make: Callable[[], str]) -> str:
        """Return a dataset's name.

        Args:
            dataset: compared by identity, and by what it holds; what `make` itself changes left out.
            make: reads the dataset and returns its name.
        """
        before = state_of(dataset)
        for known, state, loading, name in self._known:
            if known is dataset and not _different(state, before, loading):
                return name
        name = make()
        after = state_of(dataset)
        self._known.append((dataset, after, _different(before, after), name))
        return name


def _digests(samples: Any) -> list[str]:
    return [tensor_digest(tensor) for tensor in tensors_in(samples)]


def _different(one: State, other: State, left_out: Set[str] = frozenset()) -> set[str]:
    """Return the paths at which two states differ, without those at or below `left_out`."""
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    below = tuple(f"{name}{mark}" for name in left_out for mark in ".[")
    return {name for name in differ if name not in left_out and not name.startswith(below)}


def state_of(dataset: Any) -> State:
    """Return what a data set holds, by the path to it: numbers and texts as they are, data as bytes."""
    return dict(_walk(dataset, "", 0, set()))


def _walk(thing: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, bool | int | float | complex | str | bytes | type(None)):
        yield path, repr(thing)
    elif isinstance(thing, torch.Tensor):
        at = thing.data_ptr() if thing.layout == torch.strided else id(thing)
        yield path, f"{at} {thing._version} {tuple(thing.shape)}".encode()
    elif isinstance(thing, np.ndarray):
        yield path, _of_array(thing)
    elif isinstance(thing, FunctionType | BuiltinFunctionType | MethodType | ModuleType | type | nn.Module):
        yield path, str(id(thing) if not isinstance(thing, MethodType) else thing.__qualname__)
    elif id(thing) in seen or depth > _DEPTH:
        return
    elif isinstance(thing, dict | list | tuple | set | frozenset | deque):
        seen.add(id(thing))
        yield from _walk_items(thing, path, depth, seen)
    elif hasattr(thing, "__dict__"):
        seen.add(id(thing))
        for name, value in vars(thing).items():
            yield from _walk(value, f"{path}.{name}" if path else name, depth + 1, seen)


def _walk_items(thing: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield a container's scalars as one hash, and what else it holds one by one."""
    items = list(thing.items()) if isinstance(thing, dict) else list(thing)
    step = max(len(items) // _LISTED, 1)
    digest = hashlib.blake2b(str(len(items)).encode(), digest_size=16)
    for number, item in enumerate(items[::step]):
        name, value = item if isinstance(thing, dict) else (number, item)
        if isinstance(value, bool | int | float | complex | str | bytes | type(None)) or _is_flat(value):
            digest.update(f"{name!r} {value!r}\n".encode())
        elif number < 1000:
            yield from _walk(value, f"{path}[{name!r}]", depth + 1, seen)
    yield path, digest.digest()


def _is_flat(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(
        isinstance(item, bool | int | float | complex | str | bytes | type(None)) for item in value
    )


def _of_array(array: np.ndarray[Any, Any]) -> bytes:
    flat = array.reshape(-1)
    step = max(len(flat) // _WORDS, 1)
    about = f"{array.shape} {array.dtype} {array.ctypes.data}"
    if array.dtype == object:
        return about.encode() + repr(flat[::step].tolist()).encode()
    return hashlib.blake2b(about.encode() + np.ascontiguousarray(flat[::step]).tobytes()).digest()
