"""`Look`: tell fast whether many objects are still what they were."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from gc import get_referents
from operator import getitem, is_
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from layerwise.layers.holding import CONTAINERS, LARGE, is_object, slots_of


class Look:
    """Objects to be compared with what they are now, in lists, which is the fastest way."""

    def __init__(self) -> None:
        self._owners: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._same: list[tuple[Any, Any, Any]] = []
        self._sized: list[Any] = []
        self._lengths: list[int] = []
        self._tables: list[dict[str, Any]] = []
        self._entries: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._told: list[tuple[Callable[[Any], Any], Any, Any]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []

    def at_item(self, owner: Mapping[str, Any], name: str) -> None:
        """Look whether an item of a dictionary is the same object."""
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(owner[name])
        self._note_box(owner, name, owner[name])

    def at_length(self, attributes: Any) -> None:
        """Look whether something has more or fewer items."""
        self._sized.append(attributes)
        self._lengths.append(len(attributes))

    def at_tables(self, module: nn.Module) -> None:
        """Look whether a module's children and parameters are the same objects."""
        for table in (module._modules, module._parameters):
            if table:
                self._tables.append(table)
                self._entries += get_referents(table)
                for name, item in table.items():
                    self._note_box(table, name, item)

    def at_version(self, tensor: torch.Tensor) -> None:
        """Look whether a tensor was written to, in a way that autograd notices."""
        if not tensor.is_inference():  # those have no version
            self._versions.append((tensor, tensor._version))

    def at_content(self, tensor: torch.Tensor) -> None:
        """Look whether a tensor holds the same numbers."""
        self._contents.append((tensor, tensor.clone()))

    def at_told(self, tell: Callable[[Any], Any], thing: Any) -> None:
        """Look whether something tells the same of itself."""
        self._told.append((tell, thing, tell(thing)))

    def at_content_of(self, thing: Any) -> None:
        """Look whether a container holds the same items, or an object has the same attributes."""
        if isinstance(thing, CONTAINERS):
            if len(thing) <= LARGE:
                self._at_container(thing)
        elif is_object(thing):
            if hasattr(thing, "__dict__"):
                self._at_container(vars(thing))
            if slots_of(thing):
                self.at_told(slots_of, thing)

    def _at_container(self, thing: Any) -> None:
        if isinstance(thing, tuple | frozenset):
            return  # always holds the same
        self._containers.append((thing, thing.copy() if isinstance(thing, set) else _in_order(thing)))
        pairs = thing.items() if isinstance(thing, dict) else enumerate(thing)
        for key, item in pairs if not isinstance(thing, set) else ():
            self._note_box(thing, key, item)

    def _note_box(self, owner: Any, key: Any, item: Any) -> None:
        """Compare tensors of one number by identity: two of them are equal if their numbers are."""
        is_made = isinstance(item, torch.Tensor) and not is_lazy(item)
        is_one = is_made and item.numel() == 1  # a nested one has no shape
        if is_one or (isinstance(item, np.ndarray) and item.size == 1):
            self._same.append((owner, key, item))

    def is_same(self) -> bool:
        """Return whether nothing of all that has changed."""
        try:
            return (
                _are_same(list(map(getitem, self._owners, self._names)), self._values)
                and list(map(len, self._sized)) == self._lengths
                and get_referents(*self._tables) == self._entries  # values, and faster than asking for them
                and all([owner[key] is item for owner, key, item in self._same])
                and all([_holds(now, before) for now, before in self._containers])
                and all([tensor._version == version for tensor, version in self._versions])
                and all([torch.equal(now, before) for now, before in self._contents])
                and all([tell(thing) == before for tell, thing, before in self._told])
            )
        except Exception:  # two things cannot be compared (whatever their class says to that): they differ
            return False


def _in_order(container: dict[Any, Any] | list[Any] | deque[Any]) -> list[Any]:
    """Return what a container holds; of dictionaries keys too, as equal ones may have another order."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _holds(container: Any, before: Any) -> bool:
    return container == before if isinstance(container, set) else _are_same(_in_order(container), before)


def _are_same(now: list[Any], before: list[Any]) -> bool:
    """Return whether two lists hold the same. Of ``True``, 1 and 1.0 none is, nor of 0.0 and -0.0."""
    if len(now) == len(before) and all(map(is_, now, before)):
        return True
    return now == before and all(one is other or repr(one) == repr(other) for one, other in zip(now, before))
