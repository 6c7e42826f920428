"""The values that enter and leave module calls: when each was written, and where one can be handed in."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, deque
from collections.abc import Mapping, Set
from enum import Enum
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from layerwise.cache.cutting.cut import CallId, Site, Source
from layerwise.layers.forms import is_plain, place_of, without_data
from layerwise.layers.holding import slots_of
from layerwise.layers.recording import Call, Recording
from layerwise.layers.structures import map_tensors, tensors_in


class Read(NamedTuple):
    """A value at a time: the key of the value, and the operation that had last written it."""

    key: int
    writer: int | None


class Door(NamedTuple):
    """The `slot`-th tensor among the outputs or the arguments of a call."""

    call: Call
    side: Literal["out", "in"]
    slot: int

    @property
    def tensor(self) -> torch.Tensor:
        """The (fake) tensor that passed here."""
        return tensors_in(self.call.output if self.side == "out" else self.call.arguments)[self.slot]

    @property
    def nbytes(self) -> int:
        """Its size for the whole recorded batch."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def site(self) -> Site:
        """The same place in any pass."""
        return Site(call_id(self.call), self.side, self.slot)


def call_id(call: Call) -> CallId:
    """Return which call this is in any pass."""
    return CallId(call.path, call.nth)


def reads_of(recording: Recording) -> tuple[list[tuple[Read, ...]], list[Read]]:
    """Return what each operation reads, and what the model returns: each value at its time."""
    writer: dict[int, int] = {}
    reads = []
    for op in recording.ops:
        reads.append(tuple(Read(key, writer.get(key)) for key in op.reads))
        writer.update(dict.fromkeys(op.writes, op.index))
    return reads, [Read(key, writer.get(key)) for key in recording.output_keys]


def source_of(recording: Recording, value: Read) -> Source:
    """Return what a value of a recorded pass is made of."""
    ancestors: set[int] = set()
    stack = [value.writer]
    while stack:
        index = stack.pop()
        if index is not None and index not in ancestors:
            ancestors.add(index)
            stack.extend(recording.ops[index].sources)
    position = {index: number for number, index in enumerate(sorted(ancestors))}

    def made_by(read: Read) -> tuple[int, int] | None:
        """Return which operation made a value, and which of its results it is."""
        if read.writer is None:
            return None
        return position[read.writer], recording.ops[read.writer].writes.index(read.key)

    digest = hashlib.sha256()
    tensors: set[str] = set()
    for index, number in position.items():
        op = recording.ops[index]
        tensors |= {*op.parameters, *op.buffers}
        sources = [made_by(Read(*pair)) for pair in zip(op.reads, op.read_ops, strict=True)]
        where = op.call.path if op.call is not None else ""
        constants = [recording.values[key].content for key in op.reads if recording.values[key].content]
        read = f"{op.inputs} {op.parameters} {op.buffers} {sources} {op.constants} {constants}"
        digest.update(f"{number} {op.name} {where} {read}\n".encode())
    digest.update(str(made_by(value)).encode())
    return Source(tuple(sorted(tensors)), digest.hexdigest())


def taken(call: Call) -> list[Read]:
    """Return the tensors that the call got as arguments, in the order of `tensors_in`."""
    return [Read(key, writer) for key, writer in zip(call.input_keys, call.input_ops, strict=True)]


def given(call: Call) -> list[Read]:
    """Return the tensors that the call returned, in the order of `tensors_in`."""
    return [Read(key, writer) for key, writer in zip(call.output_keys, call.output_ops, strict=True)]


def has_grown(call: Call) -> bool:
    """Whether an object among the arguments, such as a key-value cache, got more tensors since the call."""
    return len(tensors_in(call.arguments)) != len(call.input_keys)


def handed_through(call: Call) -> dict[int, int]:
    """Return the output slots of a call that are arguments, untouched -> the argument's slot."""
    if has_grown(call):
        return {}
    found = {}
    inputs = list(zip(taken(call), tensors_in(call.arguments)))
    for slot, (read, output) in enumerate(zip(given(call), tensors_in(call.output))):
        same = [n for n, (at, it) in enumerate(inputs) if at == read and place_of(it) == place_of(output)]
        if same:  # the first one, where an argument was passed twice
            found[slot] = same[0]
    return found


def is_rebuildable(call: Call) -> bool:
    """Whether the call's output can be built anew around other tensors: plain ones, none hidden in an object.

    Nor may it hold another object that could be changed: each replay would hand out the same one.
    """
    seen = 0

    def replaced(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += is_plain(tensor)
        return without_data(tensor)

    try:
        map_tensors(call.output, replaced)
    except (RuntimeError, TypeError, ValueError):  # a type that checks its tensors, such as PackedSequence
        return False
    return seen == len(call.output_keys) > 0 and not _can_change(call.output)


def has_numbers(output: Any) -> bool:
    """Whether an output holds Python numbers, which may have been read from data by ``item()``."""
    if isinstance(output, int | float):
        return True
    if isinstance(output, tuple | list):
        return any(map(has_numbers, output))
    return isinstance(output, Mapping) and any(map(has_numbers, output.values()))


def calls_inside(call: Call, modules: Set[nn.Module]) -> dict[nn.Module, int]:
    """Return how often each of `modules` is called within the call."""
    return Counter(one.module for one in call.walk() if one is not call and one.module in modules)


def _can_change(output: Any) -> bool:
    """Whether there is an object in an output that is handed out as it is, and has a state."""
    if isinstance(output, torch.Tensor | Enum) or callable(output):
        return False
    if isinstance(output, tuple | list):
        return any(map(_can_change, output))
    if isinstance(output, Mapping):
        return any(map(_can_change, output.values()))
    if dataclasses.is_dataclass(output):
        return any(_can_change(getattr(output, field.name)) for field in dataclasses.fields(output))
    return (
        hasattr(output, "__dict__") or bool(slots_of(output)) or isinstance(output, set | deque | bytearray)
    )
