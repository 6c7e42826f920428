"""`find_dirty`: which operations of a forward pass may give something else in the next epoch, and why.

An operation is *dirty* if it

- reads a parameter that learns, or a tensor that lies in the memory of one,
- draws random numbers, or runs after the model drew some of Python's or numpy's: Python may decide by them,
- depends on the other samples of the batch, by its kind or as its value showed,
- changes a tensor that outlives the pass, or reads one that the pass changes,
- reads a tensor that learns without being a parameter of the model, or an argument that the loop computes,
- belongs to a module that remembers something from call to call, or carries a hook of the user's
  (`layerwise.layers.memory`),
- hands Python a number or a shape that the network computed, or runs after such an operation: Python may
  decide by it what runs, and no recording shows that,
- puts a tensor into the memory of another (``set_``), or runs after that: who writes to one writes to both,
- or is fed by a dirty one.

Whether a result requires grad is no test for this: a detached branch would go stale.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Set
from dataclasses import dataclass

import torch

from layerwise.cache.cutting.cut import Site
from layerwise.cache.cutting.doors import Read, call_id, given, taken
from layerwise.layers.recording import Call, Op, Recording

SEES_THE_CALL = "which must see the call"
MOST_MIXED = 4  # values that are found to mix samples one by one: each takes a recording and some passes


@dataclass(frozen=True)
class Dirt:
    """What is dirty in a recording.

    Attributes:
        flags: for each operation, whether it is dirty.
        first: a sentence about the first dirty operation.
        frozen_flops: of the operations that nothing which learns feeds: all that a cut could skip.
    """

    flags: list[bool]
    first: str
    frozen_flops: int

    def is_clean(self, read: Read) -> bool:
        """Return whether a value was made by an operation of the pass, and by a clean one."""
        return read.writer is not None and not self.flags[read.writer]


def find_dirty(
    recording: Recording,
    trainable: frozenset[str],
    changing: frozenset[int] = frozenset(),
    mixed: Set[Site] = frozenset(),
) -> Dirt:
    """Return which operations are dirty when the parameters `trainable` learn.

    Args:
        recording: of the model in the modes in which it will train.
        trainable: names of the parameters that learn; any name of a shared parameter counts.
        changing: numbers of the model's inputs that are not the data's: others each time.
        mixed: where values were seen that mix the samples of a batch.
    """
    learning = {first for first, names in recording.names.items() if not trainable.isdisjoint(names)}
    frozen_flops = _frozen_flops(recording, learning)
    learning |= _in_memory_of(learning, recording)
    mixing = _writers(recording, mixed)
    computed = _computed_by_the_network(recording)
    changed = {key for op in recording.ops for key in op.mutates if recording.values[key].kind != "computed"}
    flags: list[bool] = []
    first = decided = ""
    for op in recording.ops:
        why = _own_reason(recording, op, learning, changing, changed) or decided
        if op.name == "set_":
            why = why or "puts a tensor into the memory of another"
            decided = decided or "runs after a tensor was put into the memory of another"
        if recording.drawn_from is not None and op.index >= recording.drawn_from:
            why = why or "runs after the model drew random numbers of Python's or numpy's"
        if not why and op.index in mixing:
            why = "gives a value that mixes the samples of a batch"
        if op.syncs and (why or computed[op.index] or any(flags[source] for source in op.sources)):
            why = why or "hands Python a value of the batch, which may decide what runs"
            decided = decided or "runs after Python got a value of the batch, which may decide what runs"
        if why and not first:
            where = op.call.path if op.call is not None and op.call.path else "the model's own forward"
            first = f"the operation {op.name!r} in {where} {why}"
        flags.append(bool(why) or any(flags[source] for source in op.sources))
    return Dirt(flags, first or "nothing learns", frozen_flops)


def _frozen_flops(recording: Recording, learning: set[str]) -> int:
    """Return `Dirt.frozen_flops`."""
    learns = recording.fed_by(lambda op: not learning.isdisjoint((*op.parameters, *op.buffers)))
    return sum(op.flops for op, moves in zip(recording.ops, learns) if not moves)


def _own_reason(
    recording: Recording, op: Op, learning: set[str], changing: frozenset[int], changed: set[int]
) -> str:
    """Return why an operation is dirty whatever feeds it; ``""`` if it is not."""
    learns = next((name for name in (*op.parameters, *op.buffers) if name in learning), None)
    if learns is not None:
        return f"reads {learns!r}, which learns"
    if op.effect == "random":
        return "draws random numbers"
    if op.effect == "batch" and recording.input_dependent[op.index]:
        return "normalises by the batch"
    lasting = next((key for key in (*op.mutates, *op.reads) if key in changed), None)
    if lasting is not None:
        value = recording.values[lasting]
        what = f"a {value.kind}{' ' + repr(value.name) if value.name else ''}"
        return f"changes {what} in place" if lasting in op.mutates else f"reads {what} that the pass changes"
    if not changing.isdisjoint(op.inputs):
        return "reads an argument of the model that is not one of the batch's tensors: the loop computes it"
    if any(recording.values[key].learns for key in op.reads):
        return "reads a tensor that learns and is no parameter of the model"
    return _reason_of_module(recording, op.call)


def _in_memory_of(learning: set[str], recording: Recording) -> set[str]:
    """Return the parameters and buffers that share memory with one that learns: they move with it."""
    model = recording.model
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    moving = sorted(span for name in learning if (span := _span(tensors[name])))
    starts = [start for start, _ in moving]
    ends = list(itertools.accumulate((end for _, end in moving), max))
    found = set()
    for name, tensor in tensors.items():
        span = _span(tensor)
        before = bisect.bisect_left(starts, span[1]) if span else 0  # of those, one ends behind the start?
        if span and before and ends[before - 1] > span[0]:
            found.add(name)
    return found


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the first address of a tensor and the one after its last; None if it has no memory."""
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse one, for example
        return None
    if not start:  # empty, or of a subclass that keeps its numbers elsewhere
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    return start, start + reach * tensor.element_size()


def _reason_of_module(recording: Recording, call: Call | None) -> str:
    """Return why whatever runs in a call is dirty; ``""`` if it is not."""
    while call is not None:
        attribute, hook = recording.remembering.get(call.module), recording.watched.get(call.module)
        if attribute is not None:
            return f"belongs to a module that changes its {attribute!r} from call to call"
        if hook is not None:
            return f"belongs to a module with a hook ({hook}), {SEES_THE_CALL}"
        call = call.parent
    return ""


def _computed_by_the_network(recording: Recording) -> list[bool]:
    """Return of each operation whether it depends on the input's numbers or on what weights made of it.

    What is made of integer inputs alone (masks, positions) is not: models ask such tensors whether there is
    any padding.
    """
    buffers = dict(recording.model.named_buffers())

    def computes(op: Op) -> bool:
        return recording.input_dependent[op.index] and (
            bool(op.parameters)
            or any(buffers[name].is_floating_point() for name in op.buffers if name in buffers)
            or any(recording.inputs[number].is_floating_point() for number in op.inputs)
        )

    return recording.fed_by(computes)


def _writers(recording: Recording, sites: Set[Site]) -> set[int]:
    """Return the operations that made the values at some sites; of the most sites, all later ones as well."""
    found = set()
    for call in recording.calls if sites else ():
        for site in sites:
            if site.call == call_id(call):
                reads = given(call) if site.side == "out" else taken(call)
                found |= {read.writer for read in reads[site.slot : site.slot + 1] if read.writer is not None}
    return found if len(sites) < MOST_MIXED else {*range(min(found, default=0), len(recording.ops))}
