"""Where a forward pass can be cut: which module calls to skip, and which of their values to keep.

The words:

*dirty*
    An operation whose result may differ in the next epoch (`layerwise.cache.cutting.dirty`).
*skipped call*
    A highest module call without a dirty operation that works on the model's input.
*site*
    A place where a cached value enters the replayed pass: an output of a skipped call, or an argument of
    a call that does run. The latter where it is smaller: a head behind a pooling needs only the pooled
    vector.

Everything here reads a `Recording` and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Set
from dataclasses import dataclass

import torch
from torch import nn

from layerwise.cache.changes.outlines import outline
from layerwise.cache.cutting.cut import CallId, Cut, NothingToSkipError, Site
from layerwise.cache.cutting.dirty import find_dirty
from layerwise.cache.cutting.doors import (
    Door,
    Read,
    calls_inside,
    given,
    handed_through,
    has_grown,
    is_rebuildable,
    reads_of,
    returns_numbers,
    source_of,
    taken,
)
from layerwise.cache.remedies import FREEZE_BEFORE
from layerwise.errors import shorten
from layerwise.layers.memory import collectors, collects_below
from layerwise.layers.operators import SHAPE_ONLY
from layerwise.layers.recording import Call, Recording
from layerwise.layers.structures import tensors_in

_CANDIDATES = 64  # calls tried as cut-at-the-input, smallest first
MOST_MIXED = 4  # values that are found to mix samples one by one: each takes a recording and some passes


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
        mixed: where values were found that mix the samples of a batch, so that what made them must run.
        at_inputs: also cut at the arguments of calls, where that stores less. The code between modules
            then runs on ghosts; False where it needs values.

    Raises:
        NothingToSkipError: nothing can be skipped; says which operation is in the way.
    """
    return _Search(recording, trainable, changing, mixed).find(at_inputs)


@dataclass(frozen=True)
class _Needs:
    """What a replay needs when some calls are skipped and some get their arguments from the cache.

    Attributes:
        doors: where values are handed in -> the value.
        inputs: the model's inputs that what runs still reads.
        unskippable: skipped calls of which something else than an output is needed: it left by a side
            door (an attribute, a closure).
    """

    doors: dict[Door, Read]
    inputs: set[int]
    unskippable: set[Call]


class _Search:
    """State of one search: built once for a recording and a set of trainable parameters."""

    def __init__(
        self,
        recording: Recording,
        trainable: frozenset[str],
        changing: frozenset[int],
        mixed: Set[Site],
    ) -> None:
        self.recording = recording
        self.dirt = find_dirty(recording, trainable, changing, _writers(recording, mixed))
        self.dirty, self.depends = self.dirt.flags, recording.input_dependent
        self.reads, returned = reads_of(recording)
        kept = (Read(key, recording.values[key].writer) for key in recording.kept_keys)
        self.returned = frozenset([*returned, *kept])
        self.keeping = _calls_with(recording, recording.keeping)
        self.collected = [
            call for call in recording.calls if call.end > call.start and collectors(call.module)
        ]
        self.kept_inputs = frozenset(  # cheap to load, and a ghost could not decide a branch
            number
            for number, tensor in enumerate(recording.inputs)
            if not tensor.is_floating_point() or tensor.numel() <= 1
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
            if not tried.unskippable and self._stored_bytes(tried) < self._stored_bytes(needs):
                entered, needs = (*entered, call), tried
        return self._cut(owner, needs, only_returned)

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
        return f"{what}: {self.dirt.first}{FREEZE_BEFORE}"

    def _settled(self, returned: Set[Read]) -> tuple[dict[int, Call], _Needs]:
        """Return which call each skipped operation is in, and what a replay needs that returns `returned`."""
        unskippable: set[Call] = set()
        while True:
            owner = self._skippable(unskippable)
            needs = self._needs(owner, returned)
            must_run = needs.unskippable | self._cheap_to_run(owner, needs)
            if not must_run:
                return owner, needs
            unskippable |= must_run

    def _skippable(self, unskippable: set[Call]) -> dict[int, Call]:
        """Map each operation inside a skipped call to that call: the highest ones that may be skipped."""
        owner: dict[int, Call] = {}
        to_visit = [*reversed(self.recording.root.children)]
        while to_visit:
            call = to_visit.pop()
            span = range(call.start, call.end)
            if (
                call not in unskippable
                and not self._is_of_model(call)
                and call not in self.keeping
                and not any(self.dirty[index] for index in span)
                and any(self.depends[index] for index in span)
                and is_rebuildable(call)
                and not (returns_numbers(call) and any(self.recording.ops[index].syncs for index in span))
            ):
                owner.update(dict.fromkeys(span, call))
            else:
                to_visit += reversed(call.children)
        return owner

    def _is_of_model(self, call: Call) -> bool:
        """Whether a call is one of the model itself, which may call itself: a replay begins in such a one."""
        return call.module is self.recording.root.module

    def _needs(self, owner: dict[int, Call], returned: Set[Read], entered: tuple[Call, ...] = ()) -> _Needs:
        """Return what a replay needs.

        Walks backwards: an operation that runs in the replay and whose value is needed needs what it
        reads. A value made in a skipped call must be one of its outputs.
        """
        wanted = set(returned)
        running = {read.writer for read in wanted}  # operations whose result is needed
        inputs = {
            value.input
            for value in (self.recording.values[read.key] for read in wanted)
            if value.kind == "input"
        }
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
        explained: set[Read] = set()
        unskippable: set[Call] = set()
        for call in dict.fromkeys(owner.values()):
            through = self._handed_through(call)
            for slot, read in enumerate(given(call)):
                if read in wanted:
                    explained.add(read)
                    if slot not in through:
                        doors[Door(call, "out", slot)] = read
                        if not self._is_clean(read):  # a view of a weight, or of what learning layers made
                            unskippable.add(call)
        by_side_door = (read.writer for read in wanted - explained if read.writer is not None)
        unskippable |= {owner[writer] for writer in by_side_door if writer in owner}
        handed_out = Counter(read.key for door, read in doors.items() if door.side == "out")
        unskippable |= {  # what is stored for two doors is one tensor no more: a write through one is lost
            door.call for door, read in doors.items() if read.key in written and handed_out[read.key] > 1
        }
        for call in self.collected:
            skipped = owner.get(call.start)
            if skipped in (None, call) or wanted.isdisjoint(given(call)):
                continue  # the hooks of a call that is skipped itself do run in a replay
            if _is_collected_outside(call, skipped):
                unskippable.add(skipped)
        return _Needs(doors, inputs, unskippable)

    def _handed_through(self, call: Call) -> dict[int, int]:
        """Return the output slots that are arguments -> the argument's slot; what is detached is another."""
        arguments, outputs, reads = tensors_in(call.arguments), tensors_in(call.output), given(call)
        return {
            slot: number
            for slot, number in handed_through(call).items()
            if outputs[slot] is arguments[number] or self._is_clean(reads[slot])
        }

    def _is_clean(self, read: Read) -> bool:
        return read.writer is not None and not self.dirty[read.writer]

    def _is_storable(self, read: Read) -> bool:
        return self._depends(read) and self._is_clean(read)

    def _depends(self, read: Read) -> bool:
        return read.writer is not None and self.depends[read.writer]

    def _cheap_to_run(self, owner: dict[int, Call], needs: _Needs) -> set[Call]:
        """Return the calls at a door that only look up or shape inputs which are at hand anyway.

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
        for call in {door.call for door in needs.doors}:
            inner = [self.recording.ops[index] for index in range(call.start, call.end)]
            outside = {source for op in inner for source in op.sources if not call.start <= source < call.end}
            if (
                not any(op.flops for op in inner)
                and all(set(op.inputs) <= self.kept_inputs for op in inner)
                and all(at_hand[source] for source in outside)
            ):
                cheap.add(call)
        return cheap

    def _enterable(self, owner: dict[int, Call]) -> list[Call]:
        """Return running calls with a clean argument that a dirty operation inside reads, smallest first."""
        sized = []
        for call in self.recording.calls:
            if self._is_of_model(call) or call.start in owner or has_grown(call):
                continue
            clean = {read for read in taken(call) if self._is_storable(read)}
            dirty = (index for index in range(call.start, call.end) if self.dirty[index])
            if any(not clean.isdisjoint(self.reads[index]) for index in dirty):
                doors = (Door(call, "in", slot) for slot, read in enumerate(taken(call)) if read in clean)
                sized.append((sum(door.nbytes for door in doors), call.start, call))
        return [call for _, _, call in sorted(sized, key=lambda item: item[:2])][:_CANDIDATES]

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
        return read.writer is not None and batch > 1 and len(shape) > 1 and shape[0] == batch

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
            skipped={_id(call): call.module for call in skipped},
            entered={_id(call): call.module for call in entered},
            inside={_id(call): calls_inside(call, counted) for call in skipped},
            passes={_id(call): through for call in skipped if (through := self._handed_through(call))},
            frontier=tuple(map(_site, frontier)),
            constants=tuple(_site(door) for door in doors if door not in frontier),
            inputs=self.kept_inputs | needs.inputs,
            outlines={_id(call): _outline(call) for call in skipped},
            sources={_site(door): source_of(self.recording, needs.doors[door]) for door in doors},
            bytes_per_sample=sum(door.nbytes for door in frontier) // batch,
            returned_bytes_per_sample=only_returned // batch,
            flops=sum(op.flops for op in ops),
            skipped_flops=sum(op.flops for op in ops if op.index in owner),
            first_dirty=self.dirt.first,
            leading=frozenset(_id(call) for call in skipped if call.start < end),
        )


def _calls_with(recording: Recording, modules: Container[nn.Module]) -> set[Call]:
    """Return the calls of some modules, and those that they are in."""
    found: set[Call] = set()
    for call in recording.calls:
        around: Call | None = call if call.module in modules else None
        while around is not None and around not in found:
            found.add(around)
            around = around.parent
    return found


def _writers(recording: Recording, sites: Set[Site]) -> set[int]:
    """Return the operations that made the values at some sites; of the most sites, all later ones as well."""
    found = set()
    for call in recording.calls if sites else ():
        for site in sites:
            if site.call == _id(call):
                reads = given(call) if site.side == "out" else taken(call)
                found |= {read.writer for read in reads[site.slot : site.slot + 1] if read.writer is not None}
    return found if len(sites) < MOST_MIXED else {*range(min(found, default=0), len(recording.ops))}


def _is_collected_outside(call: Call, around: Call) -> bool:
    """Whether a hook hands what `call` returned to code outside of another call, which it is in."""
    while call is not around and call.parent is not None:
        call = call.parent
        if collects_below(call.module):
            return False
    return True


def _outline(call: Call) -> str:
    """Return what a call returned as text: other objects are told by who they are."""
    return " ".join(outline(call.output, _lying, lambda thing: f"{type(thing).__name__} {id(thing)}"))


def _lying(tensor: torch.Tensor) -> str:
    """Return how a tensor lies in memory; of one without strides its type."""
    is_plain = tensor.layout == torch.strided and not tensor.is_nested
    return f"{tensor.dtype} {(tuple(tensor.shape), tensor.stride()) if is_plain else tensor.layout}"


def _id(call: Call) -> CallId:
    return CallId(call.path, call.nth)


def _site(door: Door) -> Site:
    return Site(_id(door.call), door.side, door.slot)
