"""The recorder: a dispatch mode that sees each ATen operation, and hooks that see each module call."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.errors import RecordingError
from layerwise.layers.flops import flops
from layerwise.layers.graph import Call, Effect, Op
from layerwise.layers.memory import collectors, collects_below
from layerwise.layers.operators import (
    TRAINING_ARGUMENTS,
    argument_of,
    constants_of,
    effect_of,
    facts_of,
    is_shaped_by_data,
    run_inside,
)
from layerwise.layers.randomness import drawn_outside_torch
from layerwise.layers.running import FakeRun, RealRun
from layerwise.layers.structures import map_tensors, tensors_in
from layerwise.layers.values import Values

_PYTHON_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
_ADDRESSES = (
    torch.Tensor.data_ptr,
    torch.Tensor.__dlpack__,
)  # of a fake tensor: null, and reading it crashes


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Records what runs inside ``with recorder.hooks(), recorder:``; one forward pass, used once.

    Args:
        model: whose forward pass it is.
        fake: operations run on fake tensors, so nothing is computed; else for real
            (`layerwise.layers.running`).
        draws: look before each operation whether Python's or numpy's generators have drawn; that takes longer
            than to record it.
        most_ops: more operations than these raise RecordingError; None for any number.

    Attributes:
        ops: the operations so far.
        calls: the module calls so far.
        values: what these read and write.
        drawn_from: see `Recording`.
    """

    supports_higher_order_operators = True

    def __init__(
        self, model: nn.Module, *, fake: bool, draws: bool = False, most_ops: int | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.values = Values(model)
        self.drawn_from: int | None = None
        self._undrawn = drawn_outside_torch() if draws else None
        self._model, self._most_ops = model, most_ops
        self._running = FakeRun(self.values, model) if fake else RealRun(self.values)
        self._stack: list[Call] = []
        self._times_called: dict[nn.Module, int] = {}
        self._of_batch: list[bool] = []  # of each operation, whether it depends on an input

    def add_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make `tensor` the next input of the model; return what to call the model with."""
        tensor = self._running.input(tensor)
        self.values.add_input(tensor)
        return tensor

    def has_seen(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is a value of this recording."""
        return self.values.find(tensor) is not None

    def is_of_batch(self, tensor: torch.Tensor) -> bool:
        """Return whether `tensor` is an input of the model, or was computed from one."""
        key = self.values.find(tensor)
        if key is None:
            return False
        value = self.values.all[key]
        return value.kind == "input" or (value.writer is not None and self._of_batch[value.writer])

    def rewritten(self) -> set[str]:
        """Return the names of the parameters that were written to in place."""
        written = {key for op in self.ops for key in op.mutates}
        return {self.values.all[key].name for key in written if self.values.all[key].kind == "parameter"}

    def undo_writes(self) -> None:
        """Put back what a real pass wrote into tensors that existed before it."""
        self._running.undo_writes()

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
        if torch.is_inference_mode_enabled():  # functions made of operations come here as they are
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
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
        reads = tuple(dict.fromkeys(self.values.key(tensor) for tensor in read))
        mutates = tuple(dict.fromkeys(self.values.key(tensor) for tensor in written))
        output = self._running.run(func, args, kwargs, read, mutates)
        results: list[torch.Tensor] = []
        _collect(output, results)
        if facts.is_view and read:
            for result in results:
                self.values.add_view(result, reads[0])
            return output
        made = [self.values.add_result(result) for result in results]
        writes = tuple(dict.fromkeys((*mutates, *made)))
        self._book(
            facts.name,
            reads,
            writes=writes,
            mutates=mutates,
            effect=effect_of(facts, args, kwargs),
            syncs=bool(reads) and (not writes or is_shaped_by_data(facts, args)),
            flops=flops(facts.name, args, results[0]) if facts.counts_flops and results else 0,
            constants=constants_of(facts, args, kwargs),
        )
        return output

    def _book(
        self,
        name: str,
        reads: tuple[int, ...],
        *,
        writes: tuple[int, ...] = (),
        mutates: tuple[int, ...] = (),
        effect: Effect | None = None,
        syncs: bool,
        flops: int = 0,
        constants: str = "",
    ) -> None:
        """Add an operation of the innermost call to `ops`; its fields are those of `Op`."""
        index = len(self.ops)
        if self._most_ops is not None and index >= self._most_ops:
            raise RecordingError(f"the forward pass takes more than {self._most_ops} operations")
        if self._undrawn is not None and self.drawn_from is None and drawn_outside_torch() != self._undrawn:
            self.drawn_from = index
        values = [self.values.all[key] for key in reads]
        read_ops = tuple(value.writer for value in values)
        sources = {op for op in read_ops if op is not None}
        inputs = tuple(value.input for value in values if value.kind == "input")
        self._of_batch.append(bool(inputs) or any(self._of_batch[op] for op in sources))
        self.ops.append(
            Op(
                index=index,
                name=name,
                call=self._stack[-1] if self._stack else None,
                reads=reads,
                read_ops=read_ops,
                writes=writes,
                mutates=mutates,
                parameters=tuple(value.name for value in values if value.kind == "parameter"),
                buffers=tuple(value.name for value in values if value.kind == "buffer"),
                inputs=inputs,
                sources=tuple(sorted(sources)),
                effect=effect,
                syncs=syncs,
                flops=flops,
                constants=constants,
            )
        )
        for key in writes:
            self.values.all[key].writer = index

    def python_reads(self) -> TorchFunctionMode:
        """Watch what hands Python data without an ATen operation: ``tolist()``, ``numpy()``.

        Each is booked as an operation that makes nothing.
        """
        return _PythonReads(lambda name, tensor: self._book(name, (self.values.key(tensor),), syncs=True))

    # -- module calls -------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch the calls of all modules; ScriptModules take no hooks and count to their caller."""
        paths: dict[nn.Module, str] = {}
        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                paths[module] = path

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if peek_interpreter_stack() is not None:
                raise RecordingError(
                    f"the forward pass of {type(self._model).__name__} calls the module {paths[module]!r} "
                    "inside a transform of torch.func (vmap, grad, jvp), whose tensors cannot be recorded. "
                    "Call it outside: a module takes the whole batch, and the members of an ensemble go one "
                    "after another. Where it has to stay, a layerwise.LayerMap made by hand needs no "
                    "recording (layers=)."
                )
            nth = self._times_called.get(module, 0)
            self._times_called[module] = nth + 1
            parent = self._stack[-1] if self._stack else None
            made_in = weakref.ref(parent) if parent is not None else None
            call = Call(paths[module], module, nth, made_in, len(self.ops))
            if parent is not None:
                parent.children.append(call)
            call.arguments = map_tensors((args, kwargs), lambda tensor: tensor)  # lists may grow later
            call.input_keys = tuple(self.values.key(tensor) for tensor in tensors_in(call.arguments))
            call.input_ops = tuple(self.values.all[key].writer for key in call.input_keys)
            self.calls.append(call)
            self._stack.append(call)

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            while any(call.module is module for call in self._stack):  # a call that raised ends here too
                call = self._stack.pop()
                call.end = len(self.ops)
                if call.module is module:
                    call.output = map_tensors(output, lambda tensor: tensor)
                    call.output_keys = tuple(self.values.key(tensor) for tensor in tensors_in(output))
                    call.output_ops = tuple(self.values.all[key].writer for key in call.output_keys)
                    call.is_collected, call.collects = bool(collectors(module)), collects_below(module)
                    return

        handles = []
        for module in paths:
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))
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


def _collect(argument: Any, into: list[torch.Tensor]) -> None:
    if isinstance(argument, torch.Tensor):
        into.append(argument)
    elif isinstance(argument, tuple | list):
        for item in argument:
            _collect(item, into)
