"""The recorder: a dispatch mode that sees each ATen operation, and hooks that see each module call."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.layers.flops import flops
from layerwise.layers.graph import Call, Op, Value, ValueKind
from layerwise.layers.operators import (
    TRAINING_ARGUMENTS,
    Facts,
    argument_of,
    constants_of,
    content_of,
    effect_of,
    factory_size,
    facts_of,
    is_shaped_by_data,
    run_inside,
)
from layerwise.layers.structures import map_tensors, tensors_in

_SMALL = 2**16  # elements: up to here masks, indices and flags keep their real values
_PYTHON_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
_ADDRESSES = (
    torch.Tensor.data_ptr,
    torch.Tensor.__dlpack__,
)  # of a fake tensor: null, and reading it crashes
_SMALL_PRODUCT = 2**24  # elements: bound on what broadcasting small tensors against each other makes


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Records what runs inside ``with recorder.hooks(), recorder:``; one forward pass, used once.

    With `fake`, floating-point tensors become fake tensors: they have a shape and no data, so nothing is
    computed. Small integer and boolean tensors (token ids, masks, indices) and what is computed from them
    and from small constants alone keep their real values, so that branches on them are decided as in a
    real pass. Meta tensors become fake tensors of the model's device, so a model on meta may hold real
    buffers as well. Real tensors are never written to: a write goes to a fake
    twin.

    Without `fake`, the operations run for real; a tensor of the model that is written to is saved first
    and `undo_writes` puts its content back.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, *, fake: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.values: list[Value] = []
        self.names: dict[str, tuple[str, ...]] = {}
        self._model = model
        devices = {p.device for p in model.parameters() if p.device.type != "meta"}
        self._home = devices.pop() if len(devices) == 1 else torch.device("cpu")  # of meta tensors
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        self._stack: list[Call] = []
        self._times_called: dict[nn.Module, int] = {}
        self._by_tensor: dict[int, int] = {}  # id(parameter, buffer or input) -> value
        self._by_storage: dict[Any, int] = {}  # storage -> value
        self._of_batch: list[bool] = []  # of each operation, whether it depends on an input
        self._kept: list[Any] = []  # keeps ids and storages from being used again
        self._twins: dict[int, FakeTensor] = {}  # id(real tensor) -> its fake stand-in
        self._overwritten: set[int] = set()  # values whose real content is out of date
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._name_tensors()

    # -- values -------------------------------------------------------------------------------

    def _name_tensors(self) -> None:
        names: dict[int, list[str]] = {}
        tensors: list[tuple[ValueKind, str, torch.Tensor]] = []
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            if len(names[id(parameter)]) == 1:
                tensors.append(("parameter", name, parameter))
        self.names = {group[0]: tuple(group) for group in names.values()}
        tensors += [("buffer", name, buffer) for name, buffer in self._model.named_buffers()]
        owners: dict[Any, int] = {}
        for _, _, tensor in tensors:
            storage = _storage(tensor)
            owners[storage] = owners.get(storage, 0) + 1
        for kind, name, tensor in tensors:
            key = self._new_value(kind, tensor, name=name)
            self._kept.append(tensor)
            self._by_tensor[id(tensor)] = key
            if owners[_storage(tensor)] == 1:  # flattened weights share one storage: told apart by id only
                self._by_storage[_storage(tensor)] = key

    def _new_value(self, kind: ValueKind, tensor: torch.Tensor, *, name: str = "", number: int = -1) -> int:
        nbytes = tensor.numel() * tensor.element_size()
        self.values.append(Value(kind, name, number, tuple(tensor.shape), nbytes))
        return len(self.values) - 1

    def add_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make `tensor` the next input of the model; return what to call the model with."""
        number = sum(value.kind == "input" for value in self.values)
        if self._fake is not None and not self._keeps_value(tensor):
            tensor = self._twin(tensor)
        key = self._new_value("input", tensor, number=number)
        self._kept.append(tensor)
        self._by_tensor[id(tensor)] = self._by_storage[_storage(tensor)] = key
        return tensor

    def key(self, tensor: torch.Tensor) -> int:
        """Return the value that `tensor` holds or views; an unknown tensor becomes a constant."""
        key = self._by_tensor.get(id(tensor))
        if key is None:
            storage = _storage(tensor)
            key = self._by_storage.get(storage)
            if key is None:
                key = self._by_storage[storage] = self._new_value("constant", tensor)
                self.values[key].learns = tensor.requires_grad
                self.values[key].content = content_of(tensor)
                self._kept.append(tensor)
        return key

    def has_seen(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is a value of this recording."""
        return id(tensor) in self._by_tensor or _storage(tensor) in self._by_storage

    def is_of_batch(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is an input of the model, or was computed from one."""
        if not self.has_seen(tensor):
            return False
        value = self.values[self.key(tensor)]
        return value.kind == "input" or (value.writer is not None and self._of_batch[value.writer])

    def rewritten(self) -> set[str]:
        """Return the names of the parameters that were written to in place."""
        written = {key for op in self.ops for key in op.mutates}
        return {self.values[key].name for key in written if self.values[key].kind == "parameter"}

    # -- operations ---------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_inside(func, self, args, kwargs)
        facts = facts_of(func)
        if facts.is_query:
            return func(*args, **kwargs)
        read: list[torch.Tensor] = []
        written: list[torch.Tensor] = []
        for name, argument in (*zip(facts.arguments, args), *kwargs.items()):
            before = len(read)
            _collect(argument, read)
            if name in facts.written:
                written += read[before:]
        if facts.is_batch_norm and argument_of(facts, args, kwargs, *TRAINING_ARGUMENTS) is True:
            # older schemas do not say that the running statistics are written
            statistics = (argument_of(facts, args, kwargs, name) for name in ("running_mean", "running_var"))
            written += [t for t in statistics if t is not None and not any(t is w for w in written)]
        reads = tuple(dict.fromkeys(self.key(tensor) for tensor in read))
        mutates = tuple(dict.fromkeys(self.key(tensor) for tensor in written))
        output = self._run(func, args, kwargs, read, mutates)
        results: list[torch.Tensor] = []
        _collect(output, results)
        if facts.is_view and read:
            self._kept += results
            for result in results:
                self._by_storage[_storage(result)] = reads[0]
            return output
        self._book(facts, args, kwargs, reads, mutates, results)
        return output

    def _book(
        self,
        facts: Facts,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: tuple[int, ...],
        mutates: tuple[int, ...],
        results: list[torch.Tensor],
    ) -> None:
        index = len(self.ops)
        values = self.values
        writes = list(mutates)
        size = 0
        for result in results:
            self._kept.append(result)
            storage = _storage(result)
            key = self._by_storage.get(storage)
            if key is None:
                key = self._by_storage[storage] = self._new_value("computed", result)
                size += values[key].nbytes
            if key not in writes:
                writes.append(key)
        kinds = [(values[key].kind, values[key]) for key in reads]
        read_ops = tuple(value.writer for _, value in kinds)
        sources = {op for op in read_ops if op is not None}
        self._of_batch.append(
            any(value.kind == "input" for _, value in kinds) or any(self._of_batch[op] for op in sources)
        )
        self.ops.append(
            Op(
                index=index,
                name=facts.name,
                call=self._stack[-1] if self._stack else None,
                reads=reads,
                read_ops=read_ops,
                writes=tuple(writes),
                mutates=mutates,
                parameters=tuple(value.name for kind, value in kinds if kind == "parameter"),
                buffers=tuple(value.name for kind, value in kinds if kind == "buffer"),
                inputs=tuple(value.input for kind, value in kinds if kind == "input"),
                sources=tuple(sorted(sources)),
                effect=effect_of(facts, args, kwargs),
                syncs=bool(reads) and (not writes or is_shaped_by_data(facts, args)),
                flops=flops(facts.name, args, results[0]) if facts.counts_flops and results else 0,
                output_bytes=size,
                constants=constants_of(facts, args, kwargs),
            )
        )
        for key in writes:
            values[key].writer = index

    def _run(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: list[torch.Tensor],
        mutates: tuple[int, ...],
    ) -> Any:
        if self._fake is None:
            for tensor, key in ((t, self.key(t)) for t in read):
                if key in mutates and self.values[key].kind != "computed" and key not in self._saved:
                    self._saved[key] = (tensor, tensor.detach().clone())
            return func(*args, **kwargs)
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
        with self._fake:
            if func._schema.name == "aten::_grouped_mm":  # its shape function knows bfloat16 alone
                result = func(*(a.bfloat16() if i < 2 else a for i, a in enumerate(args)), **kwargs)
                return result.to(kwargs.get("out_dtype") or args[0].dtype)
            return func(*args, **kwargs)

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
        """Whether an operation on fake tensors' terms is small and known enough to be run for real."""
        if mutates and any(self.values[key].kind != "computed" for key in mutates):
            return False
        if not read:
            return factory_size(func, args) <= _SMALL
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
        key = self._by_tensor.get(id(tensor))
        if key is None:
            key = self._by_storage.get(_storage(tensor))
        if key is not None and (key in self._overwritten or self.values[key].kind == "parameter"):
            return False
        if (key is None or self.values[key].kind == "input") and tensor.is_floating_point():
            return key is not None and tensor.numel() <= 1
        return tensor.numel() <= _SMALL

    def _stand_in(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return argument if type(argument) is FakeTensor else self._twin(argument)
        if isinstance(argument, tuple | list):
            return type(argument)([self._stand_in(item) for item in argument])
        return argument

    def _twin(self, tensor: torch.Tensor) -> FakeTensor:
        """Return the fake tensor that stands for a real, meta or sharded one (by its logical shape)."""
        twin = self._twins.get(id(tensor))
        if twin is None:
            known = self.has_seen(tensor)
            strides = tensor.stride() if tensor.layout == torch.strided else None
            empty = (
                torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
                if strides is not None
                else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            )
            device = self._home if tensor.device.type == "meta" else tensor.device
            assert self._fake is not None
            twin = self._twins[id(tensor)] = FakeTensor(self._fake, empty, device)
            self._kept.append(tensor)
            if known:
                self._by_storage[_storage(twin)] = self.key(tensor)
        return twin

    def undo_writes(self) -> None:
        """Put back what a real pass wrote into tensors that existed before it."""
        with torch.no_grad():
            for tensor, content in self._saved.values():
                tensor.data.copy_(content)  # an earlier pass of the loop may still need its backward
        self._saved.clear()

    def python_reads(self) -> TorchFunctionMode:
        """Watch what hands Python data without an ATen operation: ``tolist()``, ``numpy()``."""
        return _PythonReads(self._note_python_read)

    def _note_python_read(self, name: str, tensor: torch.Tensor) -> None:
        """Book a read by Python as an operation that makes nothing."""
        key = self.key(tensor)
        value = self.values[key]
        sources = () if value.writer is None else (value.writer,)
        self._of_batch.append(value.kind == "input" or any(self._of_batch[op] for op in sources))
        self.ops.append(
            Op(
                index=len(self.ops),
                name=name,
                call=self._stack[-1] if self._stack else None,
                reads=(key,),
                read_ops=(value.writer,),
                writes=(),
                mutates=(),
                parameters=(value.name,) if value.kind == "parameter" else (),
                buffers=(value.name,) if value.kind == "buffer" else (),
                inputs=(value.input,) if value.kind == "input" else (),
                sources=sources,
                effect=None,
                syncs=True,
                flops=0,
                output_bytes=0,
            )
        )

    # -- module calls -------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the calls of all modules; ScriptModules take no hooks and count to their caller."""
        paths: dict[nn.Module, str] = {}
        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                paths[module] = path

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nth = self._times_called.get(module, 0)
            self._times_called[module] = nth + 1
            parent = self._stack[-1] if self._stack else None
            made_in = weakref.ref(parent) if parent is not None else None
            call = Call(paths[module], module, nth, made_in, len(self.ops))
            if parent is not None:
                parent.children.append(call)
            call.arguments = map_tensors((args, kwargs), lambda tensor: tensor)  # lists may grow later
            call.input_keys = tuple(self.key(tensor) for tensor in tensors_in(call.arguments))
            call.input_ops = tuple(self.values[key].writer for key in call.input_keys)
            self.calls.append(call)
            self._stack.append(call)

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            while self._stack:  # calls that raised, and whose error the model caught, end here too
                call = self._stack.pop()
                call.end = len(self.ops)
                if call.module is module:
                    call.output = map_tensors(output, lambda tensor: tensor)
                    call.output_keys = tuple(self.key(tensor) for tensor in tensors_in(output))
                    call.output_ops = tuple(self.values[key].writer for key in call.output_keys)
                    return

        handles = []
        for module in paths:
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(end, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _PythonReads(TorchFunctionMode):
    """Tells of each function that hands a tensor's data to Python behind the dispatcher's back."""

    def __init__(self, note: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDRESSES and isinstance(args[0], FakeTensor):
            raise RuntimeError(f"{func.__name__}() asks for the memory of a tensor without data")
        if func in _PYTHON_READS:
            self._note(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have none
        return ("tensor", id(tensor))


def _collect(argument: Any, into: list[torch.Tensor]) -> None:
    if isinstance(argument, torch.Tensor):
        into.append(argument)
    elif isinstance(argument, tuple | list):
        for item in argument:
            _collect(item, into)
