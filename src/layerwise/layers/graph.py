"""What one recording of a model says: `Op`, `Call`, `Value` and the `Recording` that holds them.

Plain data, read by the layer map and by the frozen-prefix cache. The words:

*value*
    What a storage holds. All views of one tensor are the same value, and a view is not an operation.
    A value is known by its index in `Recording.values`.
*operation* (`Op`)
    One ATen operation that makes a value or writes into one, in order of execution.
*call* (`Call`)
    One call of one module. Calls form a tree. A call spans the operations ``start <= op.index < end``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

Effect = Literal["random", "batch"]
ValueKind = Literal["parameter", "buffer", "input", "constant", "computed"]


@dataclass(slots=True, eq=False)
class Value:
    """One storage that the forward pass read or wrote.

    Attributes:
        kind: where it came from. ``"constant"`` is a tensor that existed before the pass and is none of
            the model's parameters and buffers (a plain attribute, a global); ``"computed"`` was made by
            an operation of the pass.
        name: of the parameter or buffer, first of its names; ``""`` for other kinds.
        input: index into `Recording.inputs` for an input, else -1.
        shape: of the tensor in which the value was first met.
        nbytes: size of that tensor in bytes.
        writer: index of the last operation that wrote it when the pass ended; None if none did.
        learns: a constant that requires grad: it learns, and the model does not know it as a parameter.
        content: of a constant, a hash of its data, type and shape.
    """

    kind: ValueKind
    name: str = ""
    input: int = -1
    shape: tuple[int, ...] = ()
    nbytes: int = 0
    writer: int | None = None
    learns: bool = False
    content: str = ""


@dataclass(slots=True, eq=False)
class Op:
    """One ATen operation.

    Attributes:
        index: position in `Recording.ops`.
        name: of the operation without namespace and overload: ``"convolution"``, ``"addmm"``.
        call: the innermost module call that it ran in.
        reads: values of its tensor arguments, in order, doubles left out.
        read_ops: for each of `reads` the operation that had last written it; None where no operation had.
        writes: values of its results, those written in place included.
        mutates: the values among `writes` that existed before and were written in place (running
            statistics of batch-norm in training included).
        parameters: names of the parameters among `reads`.
        buffers: names of the buffers among `reads`.
        inputs: the model's inputs among `reads`, as indices into `Recording.inputs`.
        sources: the operations among `read_ops`, ascending and without doubles. Since an in-place
            operation also reads what it writes into, following `sources` finds every ancestor.
        effect: ``"random"`` if it draws random numbers; ``"batch"`` if a sample's result depends on the
            other samples of the batch (batch-norm that normalises by batch statistics); else None.
        syncs: it hands data to Python, where its use can no longer be seen: a number (``item()``,
            ``bool()``), or the shape of a result that the data decide (``nonzero()``, ``x[mask]``).
        flops: floating-point operations of matrix products, convolutions and attention for the whole
            recorded batch; a multiply and an add count as two; 0 for every other operation.
        constants: its arguments as text: numbers, and what part of its memory each tensor is.
    """

    index: int
    name: str
    call: Call | None
    reads: tuple[int, ...]
    read_ops: tuple[int | None, ...]
    writes: tuple[int, ...]
    mutates: tuple[int, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[int, ...]
    sources: tuple[int, ...]
    effect: Effect | None
    syncs: bool
    flops: int
    constants: str = ""

    def __repr__(self) -> str:
        where = self.call.path if self.call is not None else ""
        return f"<Op {self.index} {self.name} in {where!r} from {list(self.sources)}>"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Call:
    """One call of one module, compared and hashed by identity.

    It does not keep its parent: a cycle would hold the model until Python's garbage collection. The
    recording keeps all calls.

    Attributes:
        path: of the module, the first one of a module that is registered under several names; ``""``
            is the recorded model itself.
        module: the live module.
        nth: how many calls of this module came before in the same forward pass.
        made_in: refers to `parent`.
        children: the calls made directly in it, in order.
        start, end: its operations are ``recording.ops[start:end]``.
        arguments: ``(args, kwargs)`` as the module received them, with their (fake) tensors; containers
            are copied.
        input_keys: values of the tensors in `arguments`, in the order of `tensors_in`, one each.
        output: what the module returned, with its (fake) tensors as leaves. Containers are copied, so
            it is what was returned, whatever the model did to it later. None if the call raised.
        output_keys: values of the tensors in `output`, in the order of `tensors_in`, one each.
        output_ops: for each of them the operation that had last written it when the call returned;
            None for an input, parameter or buffer handed through untouched. Together with
            `input_ops`, this tells whether the call made the value or only passed it on.
        input_ops: the same for `input_keys` when the call began.
        is_collected: see `layerwise.layers.memory.collectors`; the first pass may hang them on.
        collects: see `layerwise.layers.memory.collects_below`.
    """

    path: str
    module: nn.Module
    nth: int
    made_in: weakref.ref[Call] | None
    start: int
    end: int = -1
    children: list[Call] = field(default_factory=list)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    input_keys: tuple[int, ...] = ()
    input_ops: tuple[int | None, ...] = ()
    output: Any = None
    output_keys: tuple[int, ...] = ()
    output_ops: tuple[int | None, ...] = ()
    is_collected: bool = False
    collects: bool = False

    def __repr__(self) -> str:
        return f"<Call {self.path!r} #{self.nth} ops {self.start}..{self.end}>"

    @property
    def parent(self) -> Call | None:
        """The call that it was made in; None for the root."""
        return self.made_in() if self.made_in is not None else None

    def walk(self) -> Iterator[Call]:
        """Yield this call and all calls inside it, in order of execution."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(eq=False)
class Recording:
    """One forward pass: its operations, module calls and values.

    Attributes:
        model: the recorded model, wrappers taken off (`layerwise.layers.isolation.unwrap`).
        how: ``"fake"``: on tensors without data; ``"real"``: on real samples, because fake ones could not
            decide a branch.
        ops: in order of execution.
        calls: in order of their beginning; the first one is the root.
        values: all values; keys elsewhere are indices into this list.
        inputs: the example's tensors, in the order of `tensors_in` over ``(args, kwargs)``, as meta
            tensors (shape, strides and dtype, no data).
        output: what the model returned, with its (fake) tensors as leaves.
        output_keys: values of the tensors in `output`.
        names: every parameter's first name -> all its names (more than one where weights are tied).
        batch_size: number of samples: length of the first input tensor, or of the first list of tensors.
        remembering: modules that carry something over from one forward pass to the next -> the name of the
            attribute (`layerwise.layers.memory`).
        keeping: modules that keep a value of the batch and do nothing else with it -> the attributes.
        kept_keys: these values.
        watched: modules that carry a hook of the user's -> the hook's name.
        rewritten: parameters that the forward pass itself writes to, or gives other data.
        drawn_from: the first operation that ran after the model had drawn from Python's or numpy's global
            generators: what they decide is not seen. None if it did not.
        notes: for people: why a recording fell back to real samples.
    """

    model: nn.Module
    how: Literal["fake", "real"]
    ops: list[Op]
    calls: list[Call]
    values: list[Value]
    inputs: list[torch.Tensor]
    output: Any
    output_keys: tuple[int, ...]
    names: dict[str, tuple[str, ...]]
    batch_size: int
    remembering: dict[nn.Module, str] = field(default_factory=dict)
    keeping: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)
    kept_keys: tuple[int, ...] = ()
    watched: dict[nn.Module, str] = field(default_factory=dict)
    rewritten: Set[str] = frozenset()
    drawn_from: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> Call:
        """The call of the model itself."""
        return self.calls[0]

    @cached_property
    def input_dependent(self) -> list[bool]:
        """For each operation, whether its result depends on the model's input."""
        return self.fed_by(lambda op: bool(op.inputs))

    def fed_by(self, begins: Callable[[Op], bool]) -> list[bool]:
        """Return for each operation whether `begins` holds of it or of one that feeds it, near or far."""
        found: list[bool] = []
        for op in self.ops:
            found.append(begins(op) or any(found[source] for source in op.sources))
        return found

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """First names of the parameters that no operation reads."""
        read = {name for op in self.ops for name in op.parameters}
        return tuple(name for name in self.names if name not in read)
