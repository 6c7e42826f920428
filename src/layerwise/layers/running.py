"""How the operations of a recorded pass are run: for real, or on fake tensors that have no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from layerwise.layers.forms import without_data
from layerwise.layers.operators import factory_size
from layerwise.layers.values import Values

_SMALL = 2**16  # elements: up to here masks, indices and flags keep their real values
_SMALL_PRODUCT = 2**24  # elements: bound on what broadcasting small tensors against each other makes


class RealRun:
    """Runs operations as they are.

    A tensor that existed before the pass is saved when it is first written to; `undo_writes` puts its
    content back.
    """

    def __init__(self, values: Values) -> None:
        self._values = values
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what to call the model with in place of its input `tensor`: the same."""
        return tensor

    def run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: list[torch.Tensor],
        mutates: tuple[int, ...],
    ) -> Any:
        """Return the result of an operation.

        Args:
            func: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            read: the tensors in both.
            mutates: values that it writes to in place.
        """
        for tensor, key in ((t, self._values.key(t)) for t in read):
            if key in mutates and self._values.all[key].kind != "computed" and key not in self._saved:
                self._saved[key] = (tensor, tensor.detach().clone())
        return func(*args, **kwargs)

    def undo_writes(self) -> None:
        """Put back what the pass wrote into tensors that existed before it."""
        with torch.no_grad():
            for tensor, content in self._saved.values():
                tensor.data.copy_(content)  # an earlier pass of the loop may still need its backward
        self._saved.clear()


class FakeRun:
    """Runs operations on fake tensors: they have a shape and no data, so nothing is computed.

    Small integer and boolean tensors (token ids, masks, indices) and what is computed from them and from
    small constants alone keep their real values, so that branches on them are decided as in a real pass.
    Meta tensors become fake tensors of the model's device, so a model on meta may hold real buffers as
    well. Real tensors are never written to: a write goes to a fake twin.
    """

    def __init__(self, values: Values, model: nn.Module) -> None:
        self._values = values
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        devices = {p.device for p in model.parameters() if p.device.type != "meta"}
        self._home = devices.pop() if len(devices) == 1 else torch.device("cpu")  # of meta tensors
        self._twins: dict[int, tuple[torch.Tensor, FakeTensor]] = {}  # id of the first -> it, its stand-in
        self._overwritten: set[int] = set()  # values whose real content is out of date

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what to call the model with in place of its input `tensor`."""
        return tensor if self._keeps_value(tensor) else self._twin(tensor)

    def run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: list[torch.Tensor],
        mutates: tuple[int, ...],
    ) -> Any:
        """Return the result of an operation; arguments as for `RealRun.run`."""
        if self._computes(func, args, read, mutates):
            return func(*args, **kwargs)
        self._overwritten.update(mutates)
        if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            args = (args[0], self._numbered(args[1]), *args[2:])
        args = tuple(self._stand_in(argument) for argument in args)
        kwargs = {name: self._stand_in(argument) for name, argument in kwargs.items()}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            kwargs["device"] = self._home
        if func._schema.name == "aten::quantize_per_tensor":  # its shape function gives plain numbers
            raise NotImplementedError("quantize_per_tensor")
        with self._mode:
            if func._schema.name == "aten::_grouped_mm":  # its shape function knows bfloat16 alone
                result = func(*(a.bfloat16() if i < 2 else a for i, a in enumerate(args)), **kwargs)
                return result.to(kwargs.get("out_dtype") or args[0].dtype)
            return func(*args, **kwargs)

    def undo_writes(self) -> None:
        """Do nothing: no real tensor was written to."""

    def _numbered(self, indices: Any) -> list[torch.Tensor | None]:
        """Replace masks whose content is known by the numbers of their true elements.

        ``x[mask]`` has as many rows as the mask has true elements, which a fake mask cannot tell.
        """
        numbered: list[torch.Tensor | None] = []
        for index in indices:
            known = index is not None and index.dtype == torch.bool and self._keeps_value(index)
            numbered += index.nonzero().unbind(1) if known else [index]
        return numbered

    def _computes(
        self, func: Any, args: tuple[Any, ...], read: list[torch.Tensor], mutates: tuple[int, ...]
    ) -> bool:
        """Whether an operation is small and known enough to be run for real."""
        if any(self._values.all[key].kind != "computed" for key in mutates):
            return False
        if not read:
            return factory_size(args) <= _SMALL
        product = 1
        for tensor in read:
            if not self._keeps_value(tensor):
                return False
            product *= max(tensor.numel(), 1)
        return product <= _SMALL_PRODUCT or len({tensor.numel() for tensor in read}) == 1

    def _keeps_value(self, tensor: torch.Tensor) -> bool:
        kind = type(tensor)
        if kind is FakeTensor or kind is nn.Parameter or tensor.device.type == "meta":
            return False
        key = self._values.find(tensor)
        value = None if key is None else self._values.all[key]
        if value is not None and (key in self._overwritten or value.kind == "parameter"):
            return False
        if (value is None or value.kind == "input") and tensor.is_floating_point():
            return value is not None and tensor.numel() <= 1
        return tensor.numel() <= _SMALL

    def _stand_in(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return argument if type(argument) is FakeTensor else self._twin(argument)
        if isinstance(argument, tuple | list):
            return type(argument)([self._stand_in(item) for item in argument])
        return argument

    def _twin(self, tensor: torch.Tensor) -> FakeTensor:
        """Return the fake tensor that stands for a real, meta or sharded one (by its logical shape)."""
        if id(tensor) in self._twins:
            return self._twins[id(tensor)][1]
        key = self._values.find(tensor)
        empty = (
            without_data(tensor)
            if tensor.layout == torch.strided
            else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        )
        device = self._home if tensor.device.type == "meta" else tensor.device
        twin = FakeTensor(self._mode, empty, device)
        self._twins[id(tensor)] = tensor, twin
        if key is not None:
            self._values.add_view(twin, key)
        return twin
