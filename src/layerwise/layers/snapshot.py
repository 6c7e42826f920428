"""`Snapshot`: what Python objects hold now, to be put back later: attributes, containers, random generators.

A forward pass or a data set may keep state anywhere. What is found: attributes of objects, the content of
lists, dictionaries, sets and deques, and generators of random numbers (torch's, numpy's and Python's own),
a few objects deep. What a closure or a module's globals hold is not.
"""

from __future__ import annotations

import functools
import operator
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
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._seen: set[int] = set()
        self.generators: list[Any] = []
        for root in roots:
            if isinstance(root, nn.Module):
                self._keep_module(root)
            else:
                self._keep(root, 0)

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restores:
            restore()
        for now, content in self._dicts:
            _put_back(now, content)

    def states(self) -> list[str]:
        """Return the present states of the random generators that were found, to be compared."""
        return [_told(generator) for generator in self.generators]

    def _keep(self, thing: Any, depth: int) -> None:
        if id(thing) in self._seen or isinstance(thing, nn.Module):
            return
        self._seen.add(id(thing))
        state = _generator_state(thing)
        if state is not None:
            self.generators.append(thing)
            self._restores.append(state)
            return
        if depth > _DEPTH or isinstance(thing, torch.Tensor):
            return
        if isinstance(thing, dict | list | set | deque):
            if isinstance(thing, dict) and not self._only:
                self._dicts.append((thing, thing.copy()))
            elif not self._only:
                self._restores.append(_container_state(thing))
            items: Any = thing.values() if isinstance(thing, dict) else thing
        elif isinstance(thing, tuple):
            items = thing
        elif hasattr(thing, "__dict__"):
            attributes = vars(thing)
            if not self._only:
                self._dicts.append((attributes, attributes.copy()))
            items = attributes.values()
        else:
            return
        if len(items) <= _LARGE:
            for item in [item for item in items if type(item) not in _LEAVES]:
                self._keep(item, depth + 1)

    def _keep_module(self, module: nn.Module) -> None:
        """Keep a module's own attributes; of what every module has, only what a forward pass may change."""
        attributes = vars(module)
        self._seen.add(id(module))
        if not self._only:
            own = (attributes, *(attributes[name] for name in _KEPT if name in attributes))
            self._dicts += [(now, now.copy()) for now in own]
        for name, value in attributes.items():
            if name not in _EVERY_MODULES and type(value) not in _LEAVES:
                self._keep(value, 1)


_LEAVES = frozenset({
    str, bytes, bool, int, float, complex, type(None), type, torch.Tensor, nn.Parameter, torch.Size,
    torch.device, torch.dtype, FunctionType, BuiltinFunctionType, MethodType, ModuleType,
})  # fmt: skip
_EVERY_MODULES = frozenset(vars(nn.Module()))
_KEPT = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    if now.keys() != before.keys():
        now.clear()
        now.update(before)
    elif not all(map(operator.is_, now.values(), before.values())):
        now.update(before)  # keeps views of the dictionary


def _generator_state(thing: Any) -> _Restore | None:
    """Return what puts a random generator back; None for anything else."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return functools.partial(_set_state, thing, state)
    if isinstance(thing, random.Random):
        python = thing.getstate()
        return lambda: thing.setstate(python)
    numpy = sys.modules.get("numpy")
    if numpy is None or not type(thing).__module__.startswith("numpy."):
        return None
    if isinstance(thing, numpy.random.RandomState):
        legacy = thing.get_state()
        return lambda: thing.set_state(legacy)
    if isinstance(thing, numpy.random.Generator):
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
        else:
            thing.clear()
            (thing.extend if isinstance(thing, deque) else thing.update)(content)

    return restore


def plain_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules hold as plain attributes: neither parameters nor buffers."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, list | tuple | deque) and len(value) <= _LARGE:
                yield from (item for item in value if isinstance(item, torch.Tensor))
