"""Tensors inside nested structures: arguments and outputs of modules, whatever they are made of."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerwise.layers.holding import LEAVES, attributes_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call: ``(args, kwargs)``."""

_OBJECT_DEPTH = 3  # objects in objects: enough for key-value caches, and ends on circular references


def tensors_in(structure: Any) -> list[torch.Tensor]:
    """Return the tensors of a nested structure, depth first, in order; a tensor met twice stands twice.

    Looks into tuples, lists, mappings (values, in order) and, at most three deep, into the attributes of
    other objects such as dataclasses (their fields first, in order) and key-value caches, with and without
    ``__slots__``. Modules are not looked into.

    >>> [t.item() for t in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), None]})]
    [1, 2]
    """
    found: list[torch.Tensor] = []
    _collect(structure, found, 0)
    return found


def _collect(structure: Any, found: list[torch.Tensor], depth: int) -> None:
    if isinstance(structure, torch.Tensor):
        found.append(structure)
    elif isinstance(structure, tuple | list):
        for item in structure:
            _collect(item, found, depth)
    elif isinstance(structure, Mapping):
        for item in structure.values():
            _collect(item, found, depth)
    elif depth < _OBJECT_DEPTH and not _opaque(structure):
        for item in _attributes(structure).values():
            _collect(item, found, depth + 1)


def _opaque(thing: Any) -> bool:
    return type(thing) in LEAVES or isinstance(thing, nn.Module | type) or callable(thing)


def _attributes(thing: Any) -> dict[str, Any]:
    own = attributes_of(thing)
    if not dataclasses.is_dataclass(thing):
        return own
    # where some fields are slots and some are not, or bases have slots, the order is that of `map_tensors`
    return {f.name: own[f.name] for f in dataclasses.fields(thing) if f.name in own} | own


def map_tensors(structure: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a copy of a nested structure with `function` applied to each tensor, in `tensors_in`'s order.

    Tuples, named tuples, lists and mappings are rebuilt in their own type (a mapping type that cannot be
    built from keywords or pairs becomes a dict); dataclass instances likewise. Other objects are returned
    as they are, and so are the tensors inside them: `tensors_in` sees those, `map_tensors` does not.

    >>> map_tensors((torch.ones(2), {"a": 3}), lambda t: tuple(t.shape))
    ((2,), {'a': 3})
    """
    if isinstance(structure, torch.Tensor):
        return function(structure)
    if isinstance(structure, tuple):
        items = [map_tensors(item, function) for item in structure]
        return type(structure)(*items) if hasattr(structure, "_fields") else tuple(items)
    if isinstance(structure, list):
        return [map_tensors(item, function) for item in structure]
    if isinstance(structure, Mapping):
        mapped = {name: map_tensors(item, function) for name, item in structure.items()}
        return mapped if type(structure) is dict else _rebuilt(type(structure), mapped)
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        fields = {f.name: getattr(structure, f.name) for f in dataclasses.fields(structure) if f.init}
        return dataclasses.replace(
            structure, **{name: map_tensors(item, function) for name, item in fields.items()}
        )
    return structure


def _rebuilt(kind: Any, mapped: dict[str, Any]) -> Any:
    with contextlib.suppress(TypeError):
        return kind(**mapped)  # ModelOutput, OrderedDict
    with contextlib.suppress(TypeError):
        return kind(mapped)  # BatchEncoding and other UserDicts
    return mapped
