"""What Python objects hold: items, attributes, and the state of what has neither.

Where a module keeps what its forward pass reads or writes is up to its author: in containers of containers,
objects with and without ``__slots__``, attributes of its class, arrays, iterators, random generators. Who
compares such state (`layerwise.layers.memory`, the cache's `Settings`) or puts it back (`Snapshot`) finds it
here.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import nn

DEPTH = 4  # containers and objects in others
LARGE = 1000  # items: longer containers are data, and are not looked into
GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device)
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
LEAVES = frozenset({
    bool, int, float, complex, str, bytes, type(None), type, torch.Size, torch.device, torch.dtype,
    FunctionType, BuiltinFunctionType, ModuleType,
})  # fmt: skip
"""Types of what is never looked into."""
_HOOK_UNDER_WAY = "_current_fx_name"  # Lightning notes in its modules which of their methods it calls
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {_HOOK_UNDER_WAY}
"""Attributes that torch and Lightning give a module, for themselves."""

_WORDS = 2**20  # numbers of an array that are compared, spread evenly
_APART = (  # machinery of libraries: large, of no effect on a forward pass, or in use by other threads
    "layerwise.", "lightning.", "pytorch_lightning.", "torch._", "torch.fx.", "torch.jit.", "torch.optim.",
    "torch.distributed.", "torch.utils.data.dataloader.", "torch.utils.tensorboard.", "tensorboard.",
    "logging.", "threading.", "queue.", "concurrent.", "multiprocessing.", "asyncio.", "weakref.", "_io.",
)  # fmt: skip
_ITERATORS = ("builtins", "itertools")  # Python modules of iterators without attributes


def home(thing: Any) -> str:
    """Return the Python module that defines a function, or else an object's class, with a dot at the end."""
    return f"{getattr(thing, '__module__', None) or type(thing).__module__}."


def is_object(thing: Any) -> bool:
    """Whether something is looked into by its attributes."""
    kind = type(thing)
    return (
        kind not in LEAVES
        and (isinstance(getattr(thing, "__dict__", None), dict) or "__slots__" in vars(kind))
        and not isinstance(
            thing, (nn.Module, torch.Tensor, type, ModuleType, MethodType, *CONTAINERS, *SCALARS)
        )
        and not f"{kind.__module__}.".startswith(_APART)
    )


def slots_of(thing: Any) -> dict[str, Any]:
    """Return the attributes that an object keeps in ``__slots__``."""
    names = (
        name
        for kind in type(thing).__mro__
        if "__slots__" in vars(kind)
        for name, what in vars(kind).items()
        if isinstance(what, MemberDescriptorType)
    )
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return the attributes of an object, in slots too; of a partial function also what it was given."""
    given = {"args": thing.args, "keywords": thing.keywords} if isinstance(thing, functools.partial) else {}
    return getattr(thing, "__dict__", {}) | slots_of(thing) | given


def held(thing: Any, most: int = LARGE) -> list[Any]:
    """Return what a container or an object holds and may be looked into; nothing of one with more items.

    A method holds the object that it belongs to.
    """
    items: Iterable[Any]
    if isinstance(thing, CONTAINERS):
        items = () if len(thing) > most else thing.values() if isinstance(thing, dict) else thing
    elif is_object(thing):
        items = attributes_of(thing).values()
    elif isinstance(thing, MethodType):
        items = [thing.__self__]
    else:
        return []
    return [item for item in items if type(item) not in LEAVES]


def classes_of(modules: Iterable[nn.Module]) -> list[type]:
    """Return the classes of modules and their bases, without Python's and torch's own."""
    kinds = dict.fromkeys(map(type, modules))
    found = {base: None for kind in kinds for base in kind.__mro__}
    return [c for c in found if not f"{c.__module__}.".startswith(("builtins.", "torch.", "typing.", "abc."))]


def classes_held(modules: Iterable[nn.Module]) -> list[type]:
    """Return the classes that modules hold, or objects of which they hold, such as a configuration's.

    So are their bases; those of Python and of installed packages are left out.
    """
    found: dict[type, None] = {}
    values = [value for m in modules for name, value in vars(m).items() if name not in OF_EVERY_MODULE]
    for _ in range(DEPTH):
        values = list({id(value): value for value in values}.values())
        kinds = [v if isinstance(v, type) else type(v) for v in values if isinstance(v, type) or is_object(v)]
        found |= {base: None for kind in kinds for base in kind.__mro__ if not is_installed(base.__module__)}
        values = [item for value in values for item in held(value)]
    return list(found)


@functools.lru_cache(maxsize=256)
def is_installed(module: str) -> bool:
    """Return whether a Python module came with Python or was installed."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.split(".")[0] in sys.stdlib_module_names or "-packages" in file


def class_attributes(kind: type) -> dict[str, Any]:
    """Return the attributes of a class that are state: neither functions, nor classes, nor descriptors."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__") and type(value) is not FunctionType and _is_state(value)
    }


def _is_state(value: Any) -> bool:
    if isinstance(value, (*SCALARS, *CONTAINERS, torch.Tensor, np.ndarray)) or is_fleeting(value):
        return True
    return is_object(value) and not callable(value) and not hasattr(type(value), "__get__")


def is_fleeting(thing: Any) -> bool:
    """Whether something changes by being used, and has no attributes: a random generator, an iterator."""
    return _is_iterator(thing) or isinstance(thing, GENERATORS)


def _is_iterator(thing: Any) -> bool:
    kind = type(thing)
    return kind.__module__ in _ITERATORS and hasattr(kind, "__next__")


def told(thing: Any) -> str | bytes | None:
    """Return the state of an array, a random generator or an iterator, to be compared; None of all else."""
    if isinstance(thing, np.ndarray):
        flat = thing if thing.size <= _WORDS else thing.flat[:: thing.size // _WORDS]
        return f"{thing.dtype} {thing.shape} ".encode() + flat.tobytes()
    if isinstance(thing, torch.Generator):
        return str(thing.get_state().tolist())
    if isinstance(thing, random.Random):
        return None if isinstance(thing, random.SystemRandom) else str(thing.getstate())
    if isinstance(thing, np.random.Generator):
        return str(thing.bit_generator.state)
    if isinstance(thing, np.random.RandomState):
        return str(thing.get_state(legacy=False))
    if isinstance(thing, GeneratorType):
        frame = thing.gi_frame
        return None if frame is None else str((frame.f_lasti, _outline(tuple(frame.f_locals.values()))))
    return str(_outline(_reduced(thing))) if is_fleeting(thing) else None


def _outline(part: Any) -> Any:
    """Return what of an iterator's parts tells how far it is."""
    if isinstance(part, SCALARS):
        return part
    if isinstance(part, tuple):
        return tuple(map(_outline, part))
    if is_fleeting(part):
        return told(part)
    return len(part) if isinstance(part, list | range) else id(part)


def stand_in(iterator: Any) -> Any:
    """Return an iterator that goes on as `iterator` would, and leaves it where it is; None if none can."""
    parts = _reduced(iterator) if _is_iterator(iterator) else None
    if parts is None:
        return None
    make, arguments, state = (*parts, None)[:3]
    copy = make(*map(_unshared, arguments))
    if isinstance(state, tuple):
        state = tuple(list(part) if isinstance(part, list) else _unshared(part) for part in state)
    if state is not None:
        with _copying():
            copy.__setstate__(state)
    return copy


def _unshared(part: Any) -> Any:
    """Return a part of an iterator such that whoever goes through it does not move the iterator."""
    if isinstance(part, tuple):
        return tuple(map(_unshared, part))
    copy = stand_in(part)
    return part if copy is None else copy


def _reduced(iterator: Any) -> Any:
    """Return how to make an iterator again; None of one that cannot be, as those of generator functions."""
    try:
        with _copying():
            return iterator.__reduce__()
    except (TypeError, RuntimeError):
        return None


@contextlib.contextmanager
def _copying() -> Iterator[None]:
    """Within: Python 3.12 and 3.13 do not warn that 3.14 can copy no iterators of itertools."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def names_in(code: CodeType) -> set[str]:
    """Return the global names that a function's code, and that of functions defined in it, may use."""
    inner = (names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)
