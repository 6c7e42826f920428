"""`Values`: which value of a recording a tensor holds, told by the tensor itself and by its storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerwise.layers.graph import Value, ValueKind
from layerwise.layers.operators import content_of


class Values:
    """The values of one recording: at first the model's parameters and buffers, then all that it meets.

    Keeps every tensor that it knows alive, as ids and storages of freed tensors are used again.

    Attributes:
        all: the values, each known by its index.
        names: first name of each parameter -> all its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.all: list[Value] = []
        self.names: dict[str, tuple[str, ...]] = {}
        self._by_tensor: dict[int, int] = {}  # id(parameter, buffer or input) -> value
        self._by_storage: dict[Any, int] = {}  # storage -> value
        self._kept: list[torch.Tensor] = []
        self._add_tensors_of(model)

    def _add_tensors_of(self, model: nn.Module) -> None:
        names: dict[int, list[str]] = {}
        tensors: list[tuple[ValueKind, str, torch.Tensor]] = []
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            if len(names[id(parameter)]) == 1:
                tensors.append(("parameter", name, parameter))
        self.names = {group[0]: tuple(group) for group in names.values()}
        tensors += [("buffer", name, buffer) for name, buffer in model.named_buffers()]
        owners: dict[Any, int] = {}
        for _, _, tensor in tensors:
            storage = _storage(tensor)
            owners[storage] = owners.get(storage, 0) + 1
        for kind, name, tensor in tensors:
            key = self._by_tensor[id(tensor)] = self._new(kind, tensor, name=name)
            if owners[_storage(tensor)] == 1:  # flattened weights share one storage: told apart by id only
                self._by_storage[_storage(tensor)] = key

    def _new(self, kind: ValueKind, tensor: torch.Tensor, *, name: str = "", number: int = -1) -> int:
        nbytes = tensor.numel() * tensor.element_size()
        self.all.append(Value(kind, name, number, tuple(tensor.shape), nbytes))
        self._kept.append(tensor)
        return len(self.all) - 1

    def add_input(self, tensor: torch.Tensor) -> None:
        """Make `tensor` the next input of the model."""
        number = sum(value.kind == "input" for value in self.all)
        key = self._new("input", tensor, number=number)
        self._by_tensor[id(tensor)] = self._by_storage[_storage(tensor)] = key

    def add_result(self, tensor: torch.Tensor) -> int:
        """Return the value of an operation's result: a new one, unless it lies where another does."""
        storage = _storage(tensor)
        key = self._by_storage.get(storage)
        if key is None:
            key = self._by_storage[storage] = self._new("computed", tensor)
        else:
            self._kept.append(tensor)
        return key

    def add_view(self, tensor: torch.Tensor, key: int) -> None:
        """Have `tensor`, and all that shares its storage, stand for a value that is there already."""
        self._kept.append(tensor)
        self._by_storage[_storage(tensor)] = key

    def find(self, tensor: torch.Tensor) -> int | None:
        """Return the value that `tensor` holds or views; None if the recording has not met it."""
        key = self._by_tensor.get(id(tensor))
        return self._by_storage.get(_storage(tensor)) if key is None else key

    def key(self, tensor: torch.Tensor) -> int:
        """Return the value that `tensor` holds or views; an unknown tensor becomes a constant."""
        key = self.find(tensor)
        if key is None:
            key = self._by_storage[_storage(tensor)] = self._new("constant", tensor)
            self.all[key].learns = tensor.requires_grad
            self.all[key].content = content_of(tensor)
        return key


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return ("tensor", id(tensor))
