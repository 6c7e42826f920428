"""Where a forward pass can be cut: which module calls to skip, and which of their values to keep.

The words:

*dirty*
    An operation whose result may differ in the next epoch: it reads a parameter that learns, draws random
    numbers, depends on the other samples of the batch, changes a tensor that outlives the pass, or is fed
    by a dirty one. (Whether a result requires grad is no test for this: a detached branch would go stale.)
*skipped call*
    A highest module call without a dirty operation that works on the model's input.
*site*
    A place where a cached value enters the replayed pass: an output of a skipped call, or an argument of
    a call that does run. The latter where it is smaller: a head behind a pooling needs only the pooled
    vector.

Everything here reads a `Recording` and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from layerwise.cache.ghost import SHAPE_ONLY
from layerwise.errors import CacheError
from layerwise.layers.recording import Call, Op, Recording
from layerwise.layers.structures import map_tensors, tensors_in

_CANDIDATES = 64  # calls tried as cut-at-the-input, smallest first


class NothingToSkipError(CacheError):
    """No part of the forward pass stays the same: no fault, there is just nothing to cache."""


class CallId(NamedTuple):
    """One module call, by name: module path, and how many calls of that module came before."""

    path: str
    nth: int


class Site(NamedTuple):
    """Where a cached value enters: the `slot`-th tensor among the outputs or arguments of a call."""

    call: CallId
    side: Literal["out", "in"]
    slot: int

    def __str__(self) -> str:
        nth = f"#{self.call.nth}" if self.call.nth else ""
        slot = f"[{self.slot}]" if self.slot else ""
        return f"{'input of ' if self.side == 'in' else ''}{self.call.path}{nth}{slot}"


@dataclass(frozen=True)
class Source:
    """What the value at a site is made of: the basis of its fingerprint.

    Attributes:
        tensors: names of the parameters and buffers that it depends on.
        structure: hash of the operations that it depends on, with their order and module calls.
        inputs: the model's inputs that it depends on.
        flops: of those operations, for the recorded batch.
    """

    tensors: tuple[str, ...]
    structure: str
    inputs: tuple[int, ...]
    flops: int


@dataclass(frozen=True)
class Cut:
    """How to replay a forward pass without its frozen prefix.

    Attributes:
        skipped: the calls whose modules do not run -> the module.
        entered: the calls that run and take a cached argument -> the module.
        inside: for each skipped call, how many calls of each module happen within it (they must be
            counted although they do not happen).
        passes: for a skipped call, output slot -> argument slot that it hands through untouched.
        frontier: sites of the cached values that depend on the input, in order of execution.
        constants: sites of needed values that do not depend on the input: the same for all batches.
        inputs: the model's inputs that are still read.
        sources: of each site in `frontier`.
        bytes_per_sample: size of `frontier`, as recorded.
        flops: of the recorded pass; `skipped_flops`: of the operations that are not run any more.
        first_dirty: a sentence about the first dirty operation.
        impure: dirty operations run before the last site: the recording pass must undo their effects.
    """

    skipped: dict[CallId, nn.Module]
    entered: dict[CallId, nn.Module]
    inside: dict[CallId, dict[nn.Module, int]]
    passes: dict[CallId, dict[int, int]]
    frontier: tuple[Site, ...]
    constants: tuple[Site, ...]
    inputs: frozenset[int]
    sources: dict[Site, Source] = field(repr=False)
    bytes_per_sample: int = 0
    flops: int = 0
    skipped_flops: int = 0
    first_dirty: str = ""
    impure: bool = False


class _Read(NamedTuple):
    """A value at a time: the key of the value and the operation that had last written it."""

    key: int
    writer: int | None


def find_cut(recording: Recording, trainable: frozenset[str], *, at_inputs: bool = True) -> Cut:
    """Return where the pass can be cut when the parameters `trainable` learn.

    Args:
        recording: of the model in the modes (train, eval, pinned) in which it will train.
        trainable: names of the parameters that learn; any name of a shared parameter counts.
        at_inputs: also cut at the arguments of calls, where that stores less. The code between modules
            then runs on ghosts; False where it needs values.

    Raises:
        NothingToSkipError: nothing can be skipped; says which operation is in the way.
    """
    return _Finder(recording, trainable).find(at_inputs)


class _Finder:
    """State of one search: built once for a recording and a set of trainable parameters."""

    def __init__(self, recording: Recording, trainable: frozenset[str]) -> None:
        self.recording = recording
        self.trainable = {
            first for first, names in recording.names.items() if not trainable.isdisjoint(names)
        }
        self.depends = recording.input_dependent
        self.reads, self.final = _reads(recording)
        self.why: dict[int, str] = {}
        self.dirty = self._find_dirty()
        self.kept_inputs = frozenset(
            number
            for number, tensor in enumerate(recording.inputs)
            if not tensor.is_floating_point() or tensor.numel() <= 1
        )
        self.unskippable: set[Call] = set()

    # -- what is dirty ------------------------------------------------------------------------

    def _find_dirty(self) -> list[bool]:
        dirty = [False] * len(self.recording.ops)
        for op in self.recording.ops:
            own = self._own_reason(op)
            if own:
                self.why[op.index] = own
            dirty[op.index] = bool(own) or any(dirty[source] for source in op.sources)
        return dirty

    def _own_reason(self, op: Op) -> str:
        learns = next((name for name in op.parameters if name in self.trainable), None)
        if learns is not None:
            return f"reads {learns!r}, which learns"
        if op.effect == "random":
            return "draws random numbers"
        if op.effect == "batch" and self.depends[op.index]:
            return "normalises by the batch"
        lasting = next((key for key in op.mutates if self.recording.values[key].kind != "computed"), None)
        if lasting is not None:
            value = self.recording.values[lasting]
            return f"changes a {value.kind}{' ' + repr(value.name) if value.name else ''} in place"
        return ""

    def first_dirty(self) -> str:
        op = next((op for op in self.recording.ops if op.index in self.why), None)
        if op is None:
            return "nothing learns"
        where = op.call.path if op.call is not None and op.call.path else "the model's own forward"
        return f"the operation {op.name!r} in {where} {self.why[op.index]}"

    # -- the search ---------------------------------------------------------------------------

    def find(self, at_inputs: bool) -> Cut:
        while True:
            owner = self._skippable()
            sites, blocked = self._demand(owner, frozenset())
            blocked |= self._cheap_to_run(owner, sites)
            if not blocked:
                break
            self.unskippable |= blocked
        if not owner or not any(op.flops for op in self.recording.ops if op.index in owner):
            raise NothingToSkipError(
                f"no part of the forward pass that does any work stays the same from epoch to epoch: "
                f"{self.first_dirty()}. Freeze the groups before it, and hold them in eval mode "
                f"(layerwise.Tuner does both)."
            )
        entered: frozenset[Call] = frozenset()
        for candidate in self._candidates(owner) if at_inputs else ():
            tried, blocked = self._demand(owner, entered | {candidate})
            if not blocked and self._size(tried) < self._size(sites):
                entered, sites = entered | {candidate}, tried
        return self._cut(owner, sites)

    def _skippable(self) -> dict[int, Call]:
        """Map each operation inside a skipped call to that call."""
        owner: dict[int, Call] = {}

        def visit(call: Call) -> None:
            span = range(call.start, call.end)
            clean = (
                call.parent is not None
                and call not in self.unskippable
                and len(span) > 0
                and not any(self.dirty[index] for index in span)
                and any(self.depends[index] for index in span)
                and _rebuildable(call)
                and not (_has_numbers(call.output) and any(self.recording.ops[i].syncs for i in span))
            )
            if clean:
                owner.update(dict.fromkeys(span, call))
                return
            for child in call.children:
                visit(child)

        visit(self.recording.root)
        return owner

    def _demand(
        self, owner: dict[int, Call], entered: frozenset[Call]
    ) -> tuple[dict[tuple[Call, str, int], _Read], set[Call]]:
        """Return the sites that a replay needs, and the calls that must not be skipped.

        Walks backwards: an operation that runs in the replay and whose value is needed needs what it
        reads. A value made in a skipped call must be one of its outputs, otherwise it left by a side door
        (an attribute, a closure), and the call has to run.
        """
        recording = self.recording
        wanted: set[_Read] = {self.final_read(key) for key in recording.output_keys}
        by_argument: dict[_Read, list[tuple[Call, str, int]]] = {}
        spans = [(call, set(_slots(call.input_keys, call.input_ops))) for call in entered]
        needed_ops = {read.writer for read in wanted}
        for op in reversed(recording.ops):
            runs = op.index not in owner
            if not runs or not (self.dirty[op.index] or op.index in needed_ops or op.syncs):
                continue
            if op.name in SHAPE_ONLY and not op.mutates:
                continue
            for read in self.reads[op.index]:
                door = next(
                    (
                        call
                        for call, slots in spans
                        if call.start <= op.index < call.end and read in slots and self._cacheable(read)
                    ),
                    None,
                )
                if door is not None:
                    places = [
                        (door, "in", slot)
                        for slot, held in enumerate(_slots(door.input_keys, door.input_ops))
                        if held == read
                    ]
                    by_argument.setdefault(read, []).extend(places)
                    continue
                wanted.add(read)
                needed_ops.add(read.writer)
        sites: dict[tuple[Call, str, int], _Read] = {}
        blocked: set[Call] = set()
        skipped = dict.fromkeys(owner.values())
        explained: set[_Read] = set()
        for call in skipped:
            handed = set(_slots(call.input_keys, call.input_ops))
            for slot, held in enumerate(_slots(call.output_keys, call.output_ops)):
                if held not in wanted:
                    continue
                explained.add(held)
                if held in handed and _passed(call, slot) is not None:
                    continue
                sites[call, "out", slot] = held
        for read in wanted:
            if read.writer is not None and read.writer in owner and read not in explained:
                blocked.add(owner[read.writer])
        for read, places in by_argument.items():
            for place in places:
                sites[place] = read
        return sites, blocked

    def final_read(self, key: int) -> _Read:
        return _Read(key, self.final.get(key))

    def _cacheable(self, read: _Read) -> bool:
        return read.writer is not None and not self.dirty[read.writer] and self.depends[read.writer]

    def _cheap_to_run(self, owner: dict[int, Call], sites: dict[tuple[Call, str, int], _Read]) -> set[Call]:
        """Return the calls at a site that only look up or shape inputs which are at hand anyway.

        The decoder's token embedding of a sequence-to-sequence model is one: running it costs less than
        storing its output.
        """
        at_hand: list[bool] = []
        for op in self.recording.ops:
            at_hand.append(
                op.index not in owner
                and not self.dirty[op.index]
                and set(op.inputs) <= self.kept_inputs
                and all(at_hand[source] for source in op.sources)
            )
        cheap = set()
        for call, _, _ in sites:
            inner = [self.recording.ops[index] for index in range(call.start, call.end)]
            outside = {source for op in inner for source in op.sources if not call.start <= source < call.end}
            if (
                sum(op.flops for op in inner) == 0
                and all(set(op.inputs) <= self.kept_inputs for op in inner)
                and all(at_hand[source] for source in outside)
            ):
                cheap.add(call)
        return cheap

    def _candidates(self, owner: dict[int, Call]) -> list[Call]:
        """Return running calls with a clean argument that a dirty operation inside reads, smallest first."""
        sized = []
        for call in self.recording.calls:
            if call.start in owner or call.parent is None or call.start >= call.end:
                continue
            slots = set(_slots(call.input_keys, call.input_ops))
            clean = {read for read in slots if self._cacheable(read)}
            if not clean or not any(self.dirty[index] for index in range(call.start, call.end)):
                continue
            read_inside = any(
                not clean.isdisjoint(self.reads[index])
                for index in range(call.start, call.end)
                if self.dirty[index]
            )
            if read_inside:
                tensors = tensors_in(call.arguments)
                if len(tensors) != len(call.input_keys):
                    continue
                size = sum(
                    _bytes(tensor)
                    for tensor, read in zip(tensors, _slots(call.input_keys, call.input_ops))
                    if read in clean
                )
                sized.append((size, call.start, call))
        return [call for _, _, call in sorted(sized, key=lambda item: item[:2])][:_CANDIDATES]

    def _size(self, sites: dict[tuple[Call, str, int], _Read]) -> int:
        return sum(_bytes(_tensor(place)) for place, read in sites.items() if self.depends_on_input(read))

    def depends_on_input(self, read: _Read) -> bool:
        return read.writer is not None and self.depends[read.writer]

    def _goes_by_sample(self, place: tuple[Call, str, int], read: _Read) -> bool:
        """Whether a value has one row a sample: it depends on the input, or was made as long as the batch.

        The latter is a table that the model repeats for each sample (DETR's positions). Where a constant has
        that length by chance, the check on a part of the batch finds it, and nothing is cached.
        """
        if self.depends_on_input(read):
            return True
        shape, batch = _tensor(place).shape, self.recording.batch_size
        return read.writer is not None and batch > 1 and len(shape) > 1 and shape[0] == batch

    # -- the result ---------------------------------------------------------------------------

    def _cut(self, owner: dict[int, Call], sites: dict[tuple[Call, str, int], _Read]) -> Cut:
        recording = self.recording
        skipped = list(dict.fromkeys(owner.values()))
        order = sorted(sites, key=lambda place: (place[0].start, place[1] == "out", place[2]))
        frontier = [place for place in order if self._goes_by_sample(place, sites[place])]
        constants = [place for place in order if place not in frontier]
        entered = {place[0] for place in frontier if place[1] == "in"}
        needed = self._needed_ops(owner, sites)
        inputs = set(self.kept_inputs)
        for index in needed:
            if recording.ops[index].name not in SHAPE_ONLY:
                inputs |= set(recording.ops[index].inputs)
        inputs |= {
            recording.values[key].input
            for key in recording.output_keys
            if recording.values[key].kind == "input"
        }
        last = max((place[0].start if place[1] == "in" else place[0].end for place in frontier), default=0)
        return Cut(
            skipped={_id(call): call.module for call in skipped},
            entered={_id(call): call.module for call in sorted(entered, key=lambda call: call.start)},
            inside={_id(call): _count_inside(call) for call in skipped},
            passes={_id(call): passed for call in skipped if (passed := _all_passed(call))},
            frontier=tuple(_site(place) for place in frontier),
            constants=tuple(_site(place) for place in constants),
            inputs=frozenset(inputs),
            sources={_site(place): self._source(sites[place]) for place in frontier},
            bytes_per_sample=sum(_bytes(_tensor(place)) for place in frontier)
            // max(recording.batch_size, 1),
            flops=sum(op.flops for op in recording.ops),
            skipped_flops=sum(op.flops for op in recording.ops if op.index in owner),
            first_dirty=self.first_dirty(),
            impure=any(self.dirty[index] for index in range(last)),
        )

    def _needed_ops(self, owner: dict[int, Call], sites: dict[tuple[Call, str, int], _Read]) -> set[int]:
        """Return the operations that run in the replay and need what they read."""
        at_door = {
            (index, read)
            for (call, side, _), read in sites.items()
            if side == "in"
            for index in range(call.start, call.end)
        }
        wanted = {self.final_read(key).writer for key in self.recording.output_keys}
        needed = set()
        for op in reversed(self.recording.ops):
            if op.index in owner or not (self.dirty[op.index] or op.index in wanted or op.syncs):
                continue
            needed.add(op.index)
            if op.name not in SHAPE_ONLY:
                wanted |= {read.writer for read in self.reads[op.index] if (op.index, read) not in at_door}
        return needed

    def _source(self, read: _Read) -> Source:
        recording = self.recording
        ancestors: set[int] = set()
        stack = [read.writer]
        while stack:
            index = stack.pop()
            if index is None or index in ancestors:
                continue
            ancestors.add(index)
            stack.extend(recording.ops[index].sources)
        position = {index: number for number, index in enumerate(sorted(ancestors))}
        digest = hashlib.sha256()
        tensors: dict[str, None] = {}
        inputs: set[int] = set()
        flops = 0
        for index, number in position.items():
            op = recording.ops[index]
            tensors.update(dict.fromkeys((*op.parameters, *op.buffers)))
            inputs |= set(op.inputs)
            flops += op.flops
            sources = [position[source] for source in op.sources]
            where = op.call.path if op.call is not None else ""
            digest.update(f"{number} {op.name} {where} {op.parameters} {op.buffers} {sources}\n".encode())
        digest.update(str(position.get(read.writer if read.writer is not None else -1)).encode())
        return Source(tuple(sorted(tensors)), digest.hexdigest(), tuple(sorted(inputs)), flops)


def _reads(recording: Recording) -> tuple[list[tuple[_Read, ...]], dict[int, int]]:
    """Return what each operation reads, value by value at its time, and who wrote each value last."""
    writer: dict[int, int] = {}
    reads = []
    for op in recording.ops:
        reads.append(tuple(_Read(key, writer.get(key)) for key in op.reads))
        writer.update(dict.fromkeys(op.writes, op.index))
    return reads, writer


def _slots(keys: tuple[int, ...], ops: tuple[int | None, ...]) -> Iterator[_Read]:
    return (_Read(key, op) for key, op in zip(keys, ops, strict=True))


def _id(call: Call) -> CallId:
    return CallId(call.path, call.nth)


def _site(place: tuple[Call, str, int]) -> Site:
    call, side, slot = place
    return Site(_id(call), "in" if side == "in" else "out", slot)


def _tensor(place: tuple[Call, str, int]) -> torch.Tensor:
    call, side, slot = place
    return tensors_in(call.output if side == "out" else call.arguments)[slot]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _same_view(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.storage_offset() == other.storage_offset()
    )


def _passed(call: Call, slot: int) -> int | None:
    """Return the argument slot that output `slot` of the call hands through untouched, if any."""
    held = _Read(call.output_keys[slot], call.output_ops[slot])
    out = tensors_in(call.output)[slot]
    given = tensors_in(call.arguments)
    if len(given) != len(call.input_keys):  # an object among the arguments, such as a cache, has grown since
        return None
    for number, (read, tensor) in enumerate(zip(_slots(call.input_keys, call.input_ops), given)):
        if read == held and _same_view(tensor, out):
            return number
    return None


def _all_passed(call: Call) -> dict[int, int]:
    found = {slot: _passed(call, slot) for slot in range(len(call.output_keys))}
    return {slot: number for slot, number in found.items() if number is not None}


def _count_inside(call: Call) -> dict[nn.Module, int]:
    counts: dict[nn.Module, int] = {}
    for inner in call.walk():
        if inner is not call:
            counts[inner.module] = counts.get(inner.module, 0) + 1
    return counts


def _has_numbers(output: Any) -> bool:
    """Whether a module's output holds Python numbers, which may have been read from data by ``item()``."""
    if isinstance(output, bool | int | float):
        return True
    if isinstance(output, tuple | list):
        return any(map(_has_numbers, output))
    return isinstance(output, Mapping) and any(map(_has_numbers, output.values()))


def _rebuildable(call: Call) -> bool:
    """Whether all tensors of the call's output can be replaced by others (no tensors inside objects)."""
    seen = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return tensor

    map_tensors(call.output, count)
    return seen == len(call.output_keys) > 0
