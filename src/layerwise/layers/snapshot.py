"""`Snapshot`: what Python objects hold now, to be put back later: attributes, containers, random generators.

A forward pass or a data set may keep state anywhere. What is found: attributes of objects, the content of
lists, dictionaries, sets and deques, and generators of random numbers (torch's, numpy's and Python's own),
a few objects deep. What a closure or a module's globals hold is not.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_DEPTH = 3  # objects and containers in others
_LARGE = 10_000  # items: a longer container is data, and its items are not looked into

_Restore = Callable[[], None]


class Snapshot:
    """The state of some objects.

    Args:
        roots: whose attributes are kept; what those hold is followed. An ``nn.Module`` met on the way is
            not followed: name each module as a root.
        generators_only: keep random generators and nothing else.

    Attributes:
        generators: random generators that were found.
    """

    def __init__(self, roots: Iterable[Any], *, generators_only: bool = False) -> None:
        self._only = generators_only
        self._restores: list[_Restore] = []
        self._seen: set[int] = set()
        self.generators: list[Any] = []
        for root in roots:
            self._keep(root, 0, is_root=True)

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restores:
            restore()

    def states(self) -> list[str]:
        """Return the present states of the random generators that were found, to be compared."""
        return [_told(generator) for generator in self.generators]

    def _keep(self, thing: Any, depth: int, *, is_root: bool = False) -> None:
        if id(thing) in self._seen or isinstance(thing, _LEAVES):
            return
        state = _generator_state(thing)
        if state is not None:
            self._seen.add(id(thing))
            self.generators.append(thing)
            self._restores.append(state)
            return
        if depth > _DEPTH or (isinstance(thing, nn.Module) and not is_root):
            return
        self._seen.add(id(thing))
        if isinstance(thing, dict | list | set | deque):
            if not self._only:
                self._restores.append(_container_state(thing))
            items: Iterable[Any] = thing.values() if isinstance(thing, dict) else thing
        elif isinstance(thing, tuple):
            items = thing
        elif hasattr(thing, "__dict__"):
            attributes = vars(thing)
            if not self._only:
                self._restores.append(_attributes_state(attributes))
            items = attributes.values()
        else:
            return
        if len(items) <= _LARGE:  # type: ignore[arg-type]
            for item in list(items):
                self._keep(item, depth + 1)


_LEAVES = (
    str, bytes, int, float, complex, type(None), type, torch.Tensor, torch.Size, torch.device, torch.dtype,
    FunctionType, BuiltinFunctionType, MethodType, ModuleType,
)  # fmt: skip


def _generator_state(thing: Any) -> _Restore | None:
    """Return what puts a random generator back; None for anything else."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return functools.partial(_set_state, thing, state)
    if isinstance(thing, random.Random):
        python = thing.getstate()
        return lambda: thing.setstate(python)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.random.RandomState):
        legacy = thing.get_state()
        return lambda: thing.set_state(legacy)
    if numpy is not None and isinstance(thing, numpy.random.Generator):
        bits, inner = thing.bit_generator, thing.bit_generator.state
        return lambda: setattr(bits, "state", inner)
    return None


def _told(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return str(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return str(generator.getstate())
    inner = generator.get_state() if hasattr(generator, "get_state") else generator.bit_generator.state
    return str(inner[1].tolist() if isinstance(inner, tuple) else inner)


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)


def _container_state(thing: Any) -> _Restore:
    content = thing.copy()

    def restore() -> None:
        if isinstance(thing, list):
            thing[:] = content
        elif not (isinstance(thing, dict) and _same_items(thing, content)):  # keeps a dictionary's views
            thing.clear()
            (thing.extend if isinstance(thing, deque) else thing.update)(content)

    return restore


def _attributes_state(attributes: dict[str, Any]) -> _Restore:
    content = dict(attributes)

    def restore() -> None:
        for name in [name for name in attributes if name not in content]:
            del attributes[name]
        attributes.update(content)

    return restore


def _same_items(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return len(now) == len(before) and all(
        key is old_key and value is old_value
        for (key, value), (old_key, old_value) in zip(now.items(), before.items(), strict=True)
    )


def plain_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules hold as plain attributes: neither parameters nor buffers."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, list | tuple | deque) and len(value) <= _LARGE:
                yield from (item for item in value if isinstance(item, torch.Tensor))
