"""`Snapshot`: what Python objects hold now, to be put back later: attributes, containers, random generators.

A forward pass, its hooks or a data set may keep state anywhere. What is found: attributes of objects and of
the modules' classes, the content of lists, dictionaries, sets, deques and arrays, iterators, and generators
of random numbers (torch's, numpy's and Python's own), a few objects deep; of a hook also what it was given,
what its closure holds, and the globals that its code names. Of the globals that other functions write, random
generators in the file of a module's class are found, and nothing else.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.layers.holding import (
    CONTAINERS,
    DEPTH,
    GENERATORS,
    LARGE,
    LEAVES,
    OF_EVERY_MODULE,
    class_attributes,
    classes_of,
    held,
    home,
    is_object,
    names_in,
    slots_of,
    stand_in,
    told,
)

_LARGE = 10_000  # items: a longer container is data, and its items are not looked into
_MANY = 100  # items: what a longer container holds are samples, and makes no generators of its own
_ARRAY_BYTES = 2**24  # a larger array is data
_KEPT = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_LIBRARIES = ("torch.", "layerwise.")  # what their hooks write is their own affair
_HELPERS = 2  # functions that a hook calls, and those that they call

_Restore = Callable[[], object]


class Snapshot:
    """The state of some objects.

    Args:
        roots: whose attributes are kept; what those hold is followed. An ``nn.Module`` met on the way is
            not followed: name each module as a root. Of a function, what it may write to is kept.
        generators_only: keep random generators and nothing else. One that an object or a dictionary comes to
            hold later, as it is made when it is needed, is not held any more afterwards.

    Attributes:
        generators: random generators that were found.
    """

    def __init__(self, roots: Iterable[Any], *, generators_only: bool = False) -> None:
        self._only = generators_only
        self._restores: list[_Restore] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._holders: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._seen: set[int] = set()
        self._stand_ins: dict[int, tuple[Any, Any]] = {}  # id(iterator) -> it, and what is used meanwhile
        self.generators: list[Any] = []
        roots = list(roots)
        modules = [root for root in roots if isinstance(root, nn.Module)]
        for module in modules:
            self._keep_module(module)
        kinds = classes_of(modules)
        for kind in kinds:
            self._keep_class(kind)
        for name in dict.fromkeys(kind.__module__ for kind in kinds):
            for value in getattr(sys.modules.get(name), "__dict__", {}).values():
                if isinstance(value, GENERATORS):
                    self._keep(value, 1)
        for root in roots:
            if not isinstance(root, nn.Module):
                self._keep_used(root)

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restores:
            restore()
        for now, content in self._dicts:
            _put_back(now, content)
        for now, content in self._holders:
            _put_names(now, _late(now, content), content)

    @property
    def has_stand_ins(self) -> bool:
        """Whether iterators were found, whose place others have taken: `restore` can be called once."""
        return bool(self._stand_ins)

    def states(self) -> list[str]:
        """Return the present states of the random generators, those held since included, to be compared."""
        late = (now[name] for now, content in self._holders for name in _late(now, content))
        return [str(told(generator)) for generator in (*self.generators, *late)]

    def _keep(self, thing: Any, depth: int, is_sample: bool = False) -> None:
        if id(thing) in self._seen or isinstance(thing, nn.Module | torch.Tensor):
            return
        self._seen.add(id(thing))
        state = _generator_state(thing)
        if state is not None:
            self.generators.append(thing)
            self._restores.append(state)
        elif depth <= DEPTH and (
            isinstance(thing, (*CONTAINERS, np.ndarray, MethodType)) or is_object(thing)
        ):
            names = thing if isinstance(thing, dict) else getattr(thing, "__dict__", None)
            if not self._only:
                self._keep_content(thing)
            elif isinstance(names, dict) and len(names) <= _MANY and not is_sample:
                self._holders.append((names, names.copy()))
            items = held(thing, _LARGE)
            for item in items:
                self._keep(item, depth + 1, is_sample or len(items) > _MANY)

    def _keep_content(self, thing: Any) -> None:
        """Keep what a container, an object or an array holds, but not what is in that."""
        if isinstance(thing, dict):
            self._keep_dict(thing)
        elif isinstance(thing, list | deque | set):
            self._restores.append(_container_state(thing))
            if not isinstance(thing, set) and len(thing) <= LARGE:
                for index, item in enumerate(thing):
                    self._use_stand_in(item, functools.partial(thing.__setitem__, index))
        elif isinstance(thing, np.ndarray):
            if thing.flags.writeable and thing.nbytes <= _ARRAY_BYTES:
                self._restores.append(functools.partial(_put_into, thing, thing.copy()))
        elif not isinstance(thing, CONTAINERS):
            if hasattr(thing, "__dict__"):
                self._keep_dict(vars(thing))
            slots = slots_of(thing)
            if slots:
                self._restores.append(functools.partial(_put_attributes, thing, slots, slots_of))
                for name, item in slots.items():
                    self._use_stand_in(item, functools.partial(object.__setattr__, thing, name))

    def _keep_dict(self, items: dict[Any, Any]) -> None:
        self._dicts.append((items, items.copy()))
        for name, item in _notable(items) if len(items) <= LARGE else ():
            self._use_stand_in(item, functools.partial(items.__setitem__, name))

    def _use_stand_in(self, item: Any, put: Callable[[Any], Any]) -> None:
        """Have an iterator's place taken by one that goes on as it would: it cannot be set back itself."""
        known = self._stand_ins.get(id(item), (item, None))[1]
        instead = known if known is not None else stand_in(item)
        if instead is not None:
            self._stand_ins[id(item)] = item, instead
            put(instead)

    def _keep_module(self, module: nn.Module) -> None:
        """Keep a module's own attributes; of what every module has, only what a forward pass may change."""
        attributes = vars(module)
        self._seen.add(id(module))
        if not self._only:
            self._keep_dict(attributes)
            own = (attributes[name] for name in _KEPT if name in attributes)
            self._dicts += [(now, now.copy()) for now in own]
        for _, value in _notable(attributes):
            self._keep(value, 1)
        for name in _HOOKS:
            for hook in attributes.get(name, {}).values():
                self._keep_used(hook)

    def _keep_class(self, kind: type) -> None:
        attributes = class_attributes(kind)
        if not self._only:
            self._restores.append(functools.partial(_put_attributes, kind, attributes, class_attributes))
            for name, item in attributes.items():
                self._use_stand_in(item, functools.partial(setattr, kind, name))
        for value in attributes.values():
            self._keep(value, 1)

    def _keep_used(self, thing: Any, depth: int = 0) -> None:
        """Keep what a function may write to, and the object that a method belongs to."""
        if isinstance(thing, functools.partial):
            for item in (*thing.args, *thing.keywords.values()):
                self._keep_found(item, depth)
            self._keep_used(thing.func, depth)
        elif isinstance(thing, MethodType):
            self._keep(thing.__self__, 0)
            self._keep_used(thing.__func__, depth)
        elif isinstance(thing, FunctionType):
            self._keep_function(thing, depth)
        else:
            self._keep(thing, 0)
            if callable(thing) and isinstance(call := type(thing).__call__, FunctionType):
                self._keep_function(call, depth)

    def _keep_found(self, thing: Any, depth: int) -> None:
        """Keep what a function has come by, at `depth` functions below a hook: it may be another function."""
        if not isinstance(thing, functools.partial | MethodType | FunctionType):
            self._keep(thing, 1)
        elif depth < _HELPERS:
            self._keep_used(thing, depth + 1)

    def _keep_function(self, function: FunctionType, depth: int) -> None:
        if id(function) in self._seen or home(function).startswith(_LIBRARIES):
            return
        self._seen.add(id(function))
        cells = [cell for cell in function.__closure__ or () if _is_filled(cell)]
        contents = [cell.cell_contents for cell in cells]
        names, space = names_in(function.__code__), function.__globals__
        values = {name: space[name] for name in names if name in space}
        if not self._only:
            self._keep_dict(vars(function))
            self._restores.append(functools.partial(_put_names, space, names, values))
            for cell, content in zip(cells, contents):
                self._restores.append(functools.partial(setattr, cell, "cell_contents", content))
                self._use_stand_in(content, functools.partial(setattr, cell, "cell_contents"))
            for name, value in values.items():
                self._use_stand_in(value, functools.partial(space.__setitem__, name))
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        for item in (*contents, *values.values(), *defaults, *vars(function).values()):
            self._keep_found(item, depth)


def _notable(attributes: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return what may hold state: not numbers and texts, nor what torch gives every module."""
    return [
        (name, value)
        for name, value in attributes.items()
        if name not in OF_EVERY_MODULE and type(value) not in LEAVES
    ]


def _late(now: dict[Any, Any], before: dict[Any, Any]) -> list[Any]:
    """Return the names of random generators that a dictionary did not hold before."""
    return [n for n, v in now.items() if isinstance(v, GENERATORS) and before.get(n) is not v]


def _put_back(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    if now.keys() != before.keys():
        now.clear()
        now.update(before)
    elif not all(map(operator.is_, now.values(), before.values())):
        now.update(before)  # keeps views of the dictionary


def _put_names(space: dict[str, Any], names: Iterable[str], before: dict[str, Any]) -> None:
    """Give some names, a module's global ones for example, what they stood for."""
    for name in names:
        if name in before:
            space[name] = before[name]
        else:
            space.pop(name, None)


def _put_attributes(thing: Any, before: dict[str, Any], read: Callable[[Any], dict[str, Any]]) -> None:
    """Put back attributes that no dictionary holds; `read` returns those of now."""
    now, kind = read(thing), type if isinstance(thing, type) else object  # past what the class does about it
    for name in now.keys() - before.keys():
        kind.__delattr__(thing, name)
    for name, value in before.items():
        if name not in now or now[name] is not value:
            kind.__setattr__(thing, name, value)


def _put_into(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    if array.shape == content.shape:
        array[...] = content


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that was not assigned yet
        return False


def _generator_state(thing: Any) -> _Restore | None:
    """Return what puts a random generator back; None for anything else."""
    if isinstance(thing, torch.Generator):
        return functools.partial(thing.set_state, thing.get_state())
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):
        return functools.partial(thing.setstate, thing.getstate())
    if isinstance(thing, np.random.RandomState):
        return functools.partial(thing.set_state, thing.get_state())
    if isinstance(thing, np.random.Generator):
        return functools.partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
    return None


def _container_state(thing: Any) -> _Restore:
    content = thing.copy()

    def restore() -> None:
        if isinstance(thing, list):
            thing[:] = content
        else:
            thing.clear()
            (thing.extend if isinstance(thing, deque) else thing.update)(content)

    return restore


def plain_tensors(modules: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    """Yield the tensors that modules and their classes hold, which are neither parameters nor buffers."""
    seen: set[int] = set()
    for module in modules:
        for _, value in _notable(vars(module)):
            yield from _tensors_in(value, seen, 0)
    for kind in classes_of(modules):
        for value in class_attributes(kind).values():
            yield from _tensors_in(value, seen, 0)


def _tensors_in(thing: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth <= DEPTH:
        for item in held(thing, _LARGE):
            yield from _tensors_in(item, seen, depth + 1)
