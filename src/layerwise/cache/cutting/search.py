"""Where a forward pass can be cut: which module calls to skip, and which of their values to keep.

The words:

*dirty*
    An operation whose result may differ in the next epoch (`layerwise.cache.cutting.dirty`).
*skipped call*
    A highest module call without a dirty operation that works on the model's input, unless it must run
    for another reason (`layerwise.cache.cutting.guards`).
*site*
    A place where a cached value enters the replayed pass: an output of a skipped call, or an argument of
    a call that does run. The latter where it is smaller: a head behind a pooling needs only the pooled
    vector.

Everything here reads a `Recording` and changes nothing.
"""

from __future__ import annotations

from collections.abc import Container, Set
from dataclasses import dataclass

import torch

from layerwise.cache.comparing import outline
from layerwise.cache.cutting.cut import Cut, NothingToSkipError, Site, lost_speed
from layerwise.cache.cutting.dirty import SEES_THE_CALL, Dirt, find_dirty
from layerwise.cache.cutting.doors import (
    Door,
    Read,
    call_id,
    calls_inside,
    given,
    handed_through,
    has_grown,
    reads_of,
    source_of,
    taken,
)
from layerwise.cache.cutting.guards import Guards
from layerwise.cache.remedies import FREEZE_BEFORE, MOVE_HOOK
from layerwise.errors import shorten
from layerwise.layers.forms import shape_of, strides_of
from layerwise.layers.operators import SHAPE_ONLY
from layerwise.layers.recording import Call, Recording
from layerwise.layers.structures import tensors_in

_CANDIDATES = 64  # calls tried as cut-at-the-input, smallest first


def find_cut(
    recording: Recording,
    trainable: frozenset[str],
    *,
    changing: frozenset[int] = frozenset(),
    mixed: Set[Site] = frozenset(),
    at_inputs: bool = True,
) -> Cut:
    """Return where the pass can be cut when the parameters `trainable` learn.

    Args:
        recording: of the model in the modes (train, eval, pinned) in which it will train.
        trainable: names of the parameters that learn; any name of a shared parameter counts.
        changing: see `find_dirty`.
        mixed: see `find_dirty`.
        at_inputs: also cut at the arguments of calls, where that stores less. The code between modules
            then runs on ghosts; False where it needs values.

    Raises:
        NothingToSkipError: nothing can be skipped; says which operation is in the way.
    """
    return _Search(recording, find_dirty(recording, trainable, changing, mixed)).find(at_inputs)


@dataclass(frozen=True)
class _Needs:
    """What a replay needs when some calls are skipped and some get their arguments from the cache.

    Attributes:
        doors: where values are handed in -> the value.
        inputs: the model's inputs that what runs still reads.
        must_run: skipped calls of which something else than an output is needed.
    """

    doors: dict[Door, Read]
    inputs: set[int]
    must_run: set[Call]


class _Search:
    """State of one search: built once for a recording and what is dirty in it."""

    def __init__(self, recording: Recording, dirt: Dirt) -> None:
        self.recording, self.dirt = recording, dirt
        self.dirty, self.depends = dirt.flags, recording.input_dependent
        self.guards = Guards(recording, dirt)
        self.reads, returned = reads_of(recording)
        kept = (Read(key, recording.values[key].writer) for key in recording.kept_keys)
        self.returned = frozenset([*returned, *kept])
        self.kept_inputs = frozenset(  # cheap to load
            number for number, tensor in enumerate(recording.inputs) if not tensor.is_floating_point()
        )

    def find(self, at_inputs: bool) -> Cut:
        owner, needs = self._settled(self.returned)
        if not any(op.flops for op in self.recording.ops if op.index in owner):
            raise NothingToSkipError(self._nothing(owner))
        changing = {read for read in self.returned if read.writer is not None and self.dirty[read.writer]}
        only_returned = 0
        if changing < self.returned:
            only_returned = self._stored_bytes(needs) - self._stored_bytes(self._settled(changing)[1])
        entered: tuple[Call, ...] = ()
        for call in self._enterable(owner) if at_inputs else ():
            tried = self._needs(owner, self.returned, (*entered, call))
            if not tried.must_run and self._stored_bytes(tried) < self._stored_bytes(needs):
                entered, needs = (*entered, call), tried
        return self._cut(owner, needs, only_returned)

    def _settled(self, returned: Set[Read]) -> tuple[dict[int, Call], _Needs]:
        """Return which call each skipped operation is in, and what a replay needs that returns `returned`."""
        running: set[Call] = set()
        while True:
            owner = self._skippable(running)
            needs = self._needs(owner, returned)
            must_run = needs.must_run | self.guards.cheap_to_run(needs.doors, self.kept_inputs)
            if not must_run:
                return owner, needs
            running |= must_run

    def _skippable(self, running: Container[Call]) -> dict[int, Call]:
        """Map each operation inside a skipped call to that call: the highest ones that may be skipped."""
        owner: dict[int, Call] = {}
        to_visit = [*reversed(self.recording.root.children)]
        while to_visit:
            call = to_visit.pop()
            span = range(call.start, call.end)
            if (
                call not in running
                and not any(self.dirty[index] for index in span)
                and any(self.depends[index] for index in span)
                and self.guards.may_skip(call)
            ):
                owner.update(dict.fromkeys(span, call))
            else:
                to_visit += reversed(call.children)
        return owner

    def _needs(self, owner: dict[int, Call], returned: Set[Read], entered: tuple[Call, ...] = ()) -> _Needs:
        """Return what a replay needs.

        Walks backwards: an operation that runs in the replay and whose value is needed needs what it
        reads. A value made in a skipped call must be one of its outputs.
        """
        wanted = set(returned)
        running = {read.writer for read in wanted}  # operations whose result is needed
        values = (self.recording.values[read.key] for read in wanted)
        inputs = {value.input for value in values if value.kind == "input"}
        doors: dict[Door, Read] = {}
        written: set[int] = set()  # values that are written to in place by what runs
        arguments = {call: taken(call) for call in entered}
        for op in reversed(self.recording.ops):
            if op.index in owner or not (self.dirty[op.index] or op.index in running or op.syncs):
                continue
            written.update(op.mutates)
            if op.name in SHAPE_ONLY:
                continue
            inputs |= set(op.inputs)
            for read in self.reads[op.index]:
                around = (call for call in entered if call.start <= op.index < call.end)
                door = next((c for c in around if read in arguments[c] and self._is_storable(read)), None)
                if door is None:
                    wanted.add(read)
                    running.add(read.writer)
                    continue
                slots = (slot for slot, held in enumerate(arguments[door]) if held == read)
                doors |= {Door(door, "in", slot): read for slot in slots}
        for call in dict.fromkeys(owner.values()):
            through = self._handed_through(call)
            for slot, read in enumerate(given(call)):
                if read in wanted and slot not in through:
                    doors[Door(call, "out", slot)] = read
        return _Needs(doors, inputs, self.guards.must_run(owner, doors, wanted, written))

    def _handed_through(self, call: Call) -> dict[int, int]:
        """Return the output slots that are arguments -> the argument's slot; what is detached is another."""
        arguments, outputs, reads = tensors_in(call.arguments), tensors_in(call.output), given(call)
        return {
            slot: number
            for slot, number in handed_through(call).items()
            if outputs[slot] is arguments[number] or self.dirt.is_clean(reads[slot])
        }

    def _enterable(self, owner: dict[int, Call]) -> list[Call]:
        """Return running calls with a clean argument that a dirty operation inside reads, smallest first."""
        sized = []
        for call in self.recording.calls:
            if call.module is self.recording.root.module or call.start in owner or has_grown(call):
                continue
            clean = {read for read in taken(call) if self._is_storable(read)}
            dirty = (index for index in range(call.start, call.end) if self.dirty[index])
            if any(not clean.isdisjoint(self.reads[index]) for index in dirty):
                doors = (Door(call, "in", slot) for slot, read in enumerate(taken(call)) if read in clean)
                sized.append((sum(door.nbytes for door in doors), call.start, call))
        return [call for _, _, call in sorted(sized, key=lambda item: item[:2])][:_CANDIDATES]

    def _is_storable(self, read: Read) -> bool:
        return self._depends(read) and self.dirt.is_clean(read)

    def _depends(self, read: Read) -> bool:
        return read.writer is not None and self.depends[read.writer]

    def _stored_bytes(self, needs: _Needs) -> int:
        return sum(door.nbytes for door, read in needs.doors.items() if self._depends(read))

    def _goes_by_sample(self, door: Door, read: Read) -> bool:
        """Whether a value has one row a sample: it depends on the input, or was made as long as the batch.

        The latter is a table that the model repeats for each sample (DETR's positions). Where a constant has
        that length by chance, the check on a part of the batch finds it, and nothing is cached.
        """
        if self._depends(read):
            return True
        shape, batch = door.tensor.shape, self.recording.batch_size
        return batch > 1 and len(shape) > 1 and shape[0] == batch

    def _cut(self, owner: dict[int, Call], needs: _Needs, only_returned: int) -> Cut:
        ops = self.recording.ops
        skipped = list(dict.fromkeys(owner.values()))
        doors = sorted(needs.doors, key=lambda door: (door.call.start, door.side == "out", door.slot))
        frontier = [door for door in doors if self._goes_by_sample(door, needs.doors[door])]
        entered = [door.call for door in frontier if door.side == "in"]
        counted = {call.module for call in (*skipped, *entered)}
        batch = max(self.recording.batch_size, 1)
        ends = (door.call.start if door.side == "in" else door.call.end for door in frontier)
        end = max(ends, default=0)
        return Cut(
            skipped={call_id(call): call.module for call in skipped},
            entered={call_id(call): call.module for call in entered},
            inside={call_id(call): calls_inside(call, counted) for call in skipped},
            passes={call_id(call): through for call in skipped if (through := self._handed_through(call))},
            frontier=tuple(door.site for door in frontier),
            constants=tuple(door.site for door in doors if door not in frontier),
            inputs=self.kept_inputs | needs.inputs,
            outlines={call_id(call): _outline(call) for call in skipped},
            sources={door.site: source_of(self.recording, needs.doors[door]) for door in doors},
            bytes_per_sample=sum(door.nbytes for door in frontier) // batch,
            returned_bytes_per_sample=only_returned // batch,
            flops=sum(op.flops for op in ops),
            skipped_flops=sum(op.flops for op in ops if op.index in owner),
            frozen_flops=self.dirt.frozen_flops,
            first_dirty=self.dirt.first,
            leading=frozenset(call_id(call) for call in skipped if call.start < end),
        )

    def _nothing(self, owner: Container[int]) -> str:
        """Return why nothing that is worth storing can be skipped."""
        steady = dict.fromkeys(op.name for op in self.recording.ops if op.index in owner)
        what = "no part of the forward pass that does any work stays the same from epoch to epoch"
        if steady:
            what += f" (no work is counted for {shorten(steady)})"
        named = self.recording.root.module.named_modules()
        scripted = next((path for path, module in named if isinstance(module, torch.jit.ScriptModule)), "")
        if scripted:
            what += f" (calls of a ScriptModule, as {scripted} is, cannot be skipped)"
        lost = lost_speed(sum(op.flops for op in self.recording.ops), self.dirt.frozen_flops, 0)
        remedy = MOVE_HOOK if self.dirt.first.endswith(SEES_THE_CALL) else FREEZE_BEFORE
        return f"{what}: {self.dirt.first}{lost}{remedy}"


def _outline(call: Call) -> str:
    """Return what a call returned as text: how tensors lie in memory, and who other objects are."""

    def lying(tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {tensor.layout} {shape_of(tensor)} {strides_of(tensor)}"

    return " ".join(outline(call.output, lying, lambda thing: f"{type(thing).__name__} {id(thing)}"))
