"""`Contents`: what a data set holds, by the path to it, to compare it with itself or to name it.

Two kinds are told apart. *Data* is what samples are made of: tensors, arrays, tables, what containers hold.
*Texts* may be settings that nobody uses: numbers and texts in attributes, and who an object or a function
is. What a module or a class holds acts on all samples alike, and counts as text.

The items of a container share a path, ``records[].label``: what loading a few samples changes of some items
it will change of the others.
"""

from __future__ import annotations

import ctypes
import dis
import functools
import hashlib
import itertools
import logging
import marshal
import math
import mmap
import os
import stat
import sys
from array import array as compact_array
from collections import defaultdict, deque
from collections.abc import Iterable, Set
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from layerwise.layers.forms import dense
from layerwise.layers.holding import home, is_installed, slots_of

_DEPTH = 10  # objects and containers in others: a Subset of a data set with a Compose of transforms
_WORDS = 2**18  # numbers that are compared of an attribute; of more, a quarter as many, spread evenly
_LEAST_WORDS = 64  # of each item of a container; the items share what an attribute has
_MAPPED_WORDS = 1024  # numbers of an array in a file: each may be one access to the disk
_RECORDS = 10_000  # items of a container that are looked into, spread evenly
_FILES = 64  # of those that a container names, whose sizes and times are compared
_FEW = 16  # a container of more items holds records: a number in one of them is data of one sample
_CHUNK = 65_536

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
_TEXTS = bool | int | float | complex | str | bytes | None | np.generic | PurePath | Enum | range
_NUMBERS = ctypes._SimpleCData  # what processes share: `multiprocessing.Value`
_LEAVES = ModuleType | logging.Logger  # they lead to all that a program holds

_Hashes = defaultdict[str, Any]


class Contents:
    """What a data set holds, as a hash for each path.

    Args:
        dataset: whatever a loader reads.
        valid: "here" tells who an object is by its address, and reads of large things, and of files that
            a container names, only a part; "anywhere" reads all, and gives an unchanged data set the same
            hashes in another process: functions and classes are told by their names and code, files by
            path, size and time.
        without: paths that are left out, with all below them.
        collate: what makes batches of samples; its path is ``collate_fn``.

    Attributes:
        texts: by path.
        data: by path.
        files: number of texts that name a file, by path; "here" of those of which size and time were read.
        read: paths of numbers and texts, alone or in containers, whose last name is read by code that makes
            samples, and of that code itself; libraries' and layerwise's own left out.
    """

    def __init__(
        self,
        dataset: Any,
        valid: Literal["here", "anywhere"],
        without: Set[str] = frozenset(),
        *,
        collate: Any = None,
    ) -> None:
        self._here, self._without = valid == "here", without
        self._texts: _Hashes = defaultdict(_new_hash)
        self._data: _Hashes = defaultdict(_new_hash)
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # its address tells it, and is not given to another
        self._names: set[str] = set()
        self._numbers: set[str] = set()
        self._looked: dict[str, int] = defaultdict(int)
        self.files: dict[str, int] = defaultdict(int)
        words = _WORDS if self._here else sys.maxsize
        self._add(dataset, "", 0, words, None)
        self._add(collate, "collate_fn", 0, words, None)
        self.texts = {path: found.hexdigest() for path, found in self._texts.items()}
        self.data = {path: found.hexdigest() for path, found in self._data.items()}
        self.read = {path for path in self._numbers if _last_name(path) in self._names}

    def differing(self, other: Contents) -> tuple[set[str], set[str]]:
        """Return the paths at which texts differ, and those at which data do."""
        return _differing(self.texts, other.texts), _differing(self.data, other.data)

    def _add(self, thing: Any, path: str, depth: int, words: int, into: _Hashes | None) -> None:
        """Add what `thing` holds, reading so many `words` (numbers) of it.

        Numbers and data belong `into` the given hashes; None is for texts and data each to their own.
        """
        if path in self._without:
            return
        data = self._data if into is None else into
        if isinstance(thing, _TEXTS | _NUMBERS):
            found = (self._texts if into is None else into)[path]
            found.update(f"{thing!r}\n".encode())
            self._numbers.add(path)
            if isinstance(thing, _NUMBERS):  # nobody shares a number that is not read
                self._names.add(path.rpartition(".")[2])
            if not self._here and isinstance(thing, str | PurePath):
                self._add_files([thing], path, found)
        elif isinstance(thing, torch.Tensor):
            self._add_tensor(thing, data[path], words)
        elif isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
            if thing.size > words:
                data[path].update(str(id(thing)).encode())
            self._add_array(thing, data[path], words)
        elif isinstance(thing, bytearray | compact_array | ctypes.Array):
            data[path].update(bytes(thing))
        elif _is_table(type(thing)):
            self._add_table(thing, path, words, data)
        elif isinstance(thing, dict | list | tuple | set | frozenset | deque | np.ndarray):
            self._add_items(thing, path, depth, words, into)
            if hasattr(thing, "__dict__"):  # of a class of its own
                self._add_class(thing, path, depth, words, into)
                for name, value in vars(thing).items():
                    self._add(value, _below(path, name), depth + 1, words, into)
        else:
            self._add_object(thing, path, depth, words, into)

    def _add_items(self, thing: Any, path: str, depth: int, words: int, into: _Hashes | None) -> None:
        data, below = self._data if into is None else into, f"{path}[]"
        items = _items(thing)
        data[path].update(f"{len(items)}\n".encode())
        if self._here and self._looked[path] < _FILES:
            self._looked[path] += 1  # of records the first ones
            self._add_files(items[:: -(-len(items) // _FILES) or 1], path, data[path])
        if _all_plain(items):
            self._numbers.add(path)
            for start in range(0, len(items), _CHUNK):
                data[path].update(marshal.dumps(items[start : start + _CHUNK], 2))  # 2: tells no sharing
            if not self._here:
                self._add_files(items, path, data[path])
            return
        if id(thing) in self._seen or depth > _DEPTH:
            return
        self._seen[id(thing)] = len(self._seen)
        few, mapping = len(items) <= _FEW, isinstance(thing, dict)
        if self._here:
            items = items[:: -(-len(items) // _RECORDS)]
            words = max(words // len(items), _LEAST_WORDS)
        into = data if not few else into
        for item in items:
            name, value = item if mapping else ("", item)
            if mapping:
                data[path].update(f"{name!r}\n".encode())
                below = f"{path}[{name!r}]" if few else below
            self._add(value, below, depth + 1, words, data if type(value) in _PLAIN else into)

    def _add_object(self, thing: Any, path: str, depth: int, words: int, into: _Hashes | None) -> None:
        texts, kind = self._texts[path], type(thing)
        texts.update(f"{kind.__module__}.{kind.__qualname__} {self._who(thing)}\n".encode())
        if id(thing) in self._seen or depth > _DEPTH or isinstance(thing, _LEAVES):
            texts.update(f"{0 if self._here else self._seen.get(id(thing))}\n".encode())
            return
        self._seen[id(thing)] = len(self._seen)
        attributes = _attributes(thing)
        if isinstance(thing, FunctionType) and not _is_of_others(thing):
            self._names |= _read_by(thing.__code__, "LOAD_ATTR") | attributes.keys() | {"__code__"}
            if self._here:  # `_who` tells it "anywhere"
                code = _below(path, "__code__")
                self._texts[code].update(repr(_told(thing.__code__)).encode())
                self._numbers.add(code)
        if not attributes and " at 0x" not in (told := repr(thing)):
            texts.update(told.encode())
            self._numbers.add(path)
        if into is None and hasattr(kind, "__array_interface__"):
            into = self._data  # an image, be it one of few
        if not attributes and self._here:
            self._kept.append(thing)
            if into is not None:  # the pixels of an image
                into[path].update(f"{id(thing)}\n".encode())
        if isinstance(thing, nn.Module | type):
            into = self._texts
        self._add_class(thing, path, depth, words, into)
        for name, value in attributes.items():
            self._add(value, _below(path, name), depth + 1, words, into)

    def _add_class(self, thing: Any, path: str, depth: int, words: int, into: _Hashes | None) -> None:
        kind = type(thing)
        if id(kind) not in self._seen and not is_installed(kind.__module__):
            self._add(kind, _below(path, "__class__"), depth + 1, words, into)

    def _who(self, thing: Any) -> str:
        if self._here:
            return str(id(thing))
        if isinstance(thing, FunctionType):
            return f"{thing.__module__}.{thing.__qualname__} {_told(thing.__code__)}"
        if isinstance(thing, type | BuiltinFunctionType):
            return f"{thing.__module__}.{thing.__qualname__}"
        return thing.__name__ if isinstance(thing, ModuleType) else ""

    def _add_files(self, items: Iterable[Any], path: str, found: Any) -> None:
        """Add size and time of the files that items, or their parts, name."""
        for item in items:
            before = self.files[path]
            for text in item if isinstance(item, tuple | list) else (item,):
                status = _file_status(text) if isinstance(text, str | PurePath) else None
                if status is not None:
                    found.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
                    self.files[path] = before + 1

    def _add_tensor(self, tensor: torch.Tensor, found: Any, words: int) -> None:
        size = tensor.numel()
        found.update(str(tensor.dtype).encode())
        if size > words:
            found.update(str(id(tensor)).encode())
            if not tensor.is_inference():  # its version tells most of what is written between
                found.update(f" {tensor._version}".encode())
                words //= 4
        try:
            for part in dense(tensor):
                self._add_numbers(part, found, words)
        except (RuntimeError, TypeError):  # of meta: it has no numbers
            found.update(f"{tuple(tensor.shape)} {id(tensor) if self._here else ''}".encode())

    def _add_numbers(self, values: torch.Tensor, found: Any, words: int) -> None:
        if values.numel() > words and not values.is_cpu:  # a device's tensor is not copied whole
            places = torch.arange(0, values.numel(), _step(values.numel(), words), device=values.device)
            values = values[torch.unravel_index(places, values.shape)]
        if values.is_floating_point() and values.element_size() <= 2:  # numpy does not know bfloat16
            values = values.view(torch.int16 if values.element_size() == 2 else torch.uint8)
        self._add_array(values.cpu().numpy(), found, words)

    def _add_array(self, array: np.ndarray[Any, Any], found: Any, words: int) -> None:
        found.update(f"{array.dtype.str} {array.shape}".encode())
        mapped = _mapped(array)
        if mapped is not None and not self._here:
            offset = array.ctypes.data - mapped.ctypes.data + mapped.offset
            found.update(f"{mapped.filename} {offset} {array.strides}\n".encode())
            self._add_files([str(mapped.filename)], "", found)
            return
        words = words if mapped is None else min(words, _MAPPED_WORDS)
        if array.size > words:
            array = np.asarray(array.flat[:: _step(array.size, words)])
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def _add_table(self, table: Any, path: str, words: int, data: _Hashes) -> None:
        """Add the values of a pandas object, of a large one those of some rows."""
        data[path].update(f"{table.shape} {list(getattr(table, 'columns', ()))!r}\n".encode())
        rows = getattr(table, "iloc", table)[:: _step(table.size, words)]
        for values in (rows, getattr(rows, "index", rows)):
            array = values.to_numpy()
            if array.dtype.hasobject:
                data[path].update(repr(array.tolist()).encode())
            else:
                self._add_array(array, data[path], words)


_new_hash = functools.partial(hashlib.blake2b, digest_size=16)


def _differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {path for path in one.keys() | other.keys() if one.get(path) != other.get(path)}


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _last_name(path: str) -> str:
    """Return the name of an attribute by its path, or by that of an item in it."""
    return path.rpartition(".")[2].partition("[")[0]


def _items(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.items())
    if isinstance(thing, np.ndarray):
        return thing.reshape(-1).tolist()
    return sorted(thing, key=repr) if isinstance(thing, set | frozenset) else list(thing)


def _all_plain(items: list[Any]) -> bool:
    """Return whether all items are numbers and texts, or tuples and lists of such."""
    kinds = set(map(type, items))
    nested = kinds & {tuple, list}
    if nested:
        lists = [item for item in items if type(item) in nested]
        kinds = (kinds - nested) | set(map(type, itertools.chain.from_iterable(lists)))
    return all(kind in _PLAIN or issubclass(kind, np.number | np.bool_) for kind in kinds)


def _attributes(thing: Any) -> dict[str, Any]:
    """Return what an object holds, by name; of a class, what it and its bases define, libraries' left out."""
    if isinstance(thing, type):
        kinds = [kind for kind in thing.__mro__[::-1] if not is_installed(kind.__module__)]
        return {
            name: value
            for kind in kinds
            for name, value in vars(kind).items()
            if isinstance(value, FunctionType)
            or not (name.startswith("__") or isinstance(value, MemberDescriptorType))
        }
    if isinstance(thing, MethodType | BuiltinFunctionType):
        held, of = thing.__self__, getattr(thing, "__func__", 0)
        return {} if isinstance(held, type | ModuleType) else {"self": held, "of": of}
    found = {}
    if isinstance(thing, FunctionType):
        cells = enumerate(thing.__closure__ or ())
        found = {f"closure {number}": getattr(cell, "cell_contents", None) for number, cell in cells}
        found |= {"defaults": thing.__defaults__, "named defaults": thing.__kwdefaults__}
        if not is_installed(thing.__module__ or ""):
            read = _read_by(thing.__code__, "LOAD_GLOBAL") & thing.__globals__.keys()
            found |= {f"global {name}": thing.__globals__[name] for name in sorted(read)}
    elif isinstance(thing, functools.partial):
        found = {"func": thing.func, "args": thing.args, "keywords": thing.keywords}
    elif isinstance(thing, property | staticmethod | classmethod):
        names = ("fget", "fset", "fdel", "__func__")
        found = {name: getattr(thing, name) for name in names if hasattr(thing, name)}
    else:
        found = slots_of(thing)
    return found | dict(getattr(thing, "__dict__", None) or {})


def _told(code: CodeType) -> list[Any]:
    """Return what a function does, without where it stands."""
    constants = [
        _told(value) if isinstance(value, CodeType)
        else sorted(map(repr, value)) if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]  # fmt: skip
    return [code.co_code.hex(), code.co_names, constants]


@functools.lru_cache(maxsize=256)
def _read_by(code: CodeType, kind: Literal["LOAD_GLOBAL", "LOAD_ATTR"]) -> frozenset[str]:
    """Return the names of the globals, or attributes, that a function, or one defined in it, reads."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == kind}
    within = (_read_by(inner, kind) for inner in code.co_consts if isinstance(inner, CodeType))
    return frozenset(names).union(*within)


def _is_of_others(function: FunctionType) -> bool:
    """Return whether a function is a library's, or layerwise's own."""
    return is_installed(function.__module__ or "") or home(function).startswith("layerwise.")


def _is_table(kind: type) -> bool:
    """Return whether this is a class of pandas with values: they are not in its attributes."""
    ours = any(base.__module__.partition(".")[0] == "pandas" for base in kind.__mro__)
    return ours and hasattr(kind, "to_numpy") and hasattr(kind, "shape")


def _mapped(array: Any) -> Any:
    """Return the memory-mapped array of which this is a part, or is the whole; None for others."""
    while isinstance(array, np.ndarray) and not isinstance(array.base, mmap.mmap):
        array = array.base
    return array if isinstance(array, np.memmap) else None


def _step(size: int, words: int) -> int:
    """Return the step in which to read at most so many numbers; rows of any length are met everywhere."""
    if size <= words:
        return 1
    step = size // max(words // 4, 1)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _file_status(name: str | PurePath) -> os.stat_result | None:
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None
