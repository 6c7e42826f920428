"""`Guards`: calls in which nothing is dirty, and which must run all the same."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Set

from torch import nn

from layerwise.cache.cutting.dirty import Dirt
from layerwise.cache.cutting.doors import Door, Read, given, has_numbers, is_rebuildable
from layerwise.layers.recording import Call, Op, Recording


class Guards:
    """What must run in a replay of one recording.

    Args:
        recording: of the model.
        dirt: of the recording.
    """

    def __init__(self, recording: Recording, dirt: Dirt) -> None:
        self._recording, self._dirt = recording, dirt
        self._keeping = _calls_with(recording, recording.keeping)
        self._collected = [call for call in recording.calls if call.is_collected]

    def may_skip(self, call: Call) -> bool:
        """Return whether a call may be skipped, as far as it can be told from the call alone.

        Not one of the model itself, in which a replay begins; nor one that keeps what it computed, or
        returns what cannot be built anew, or numbers that it may have read from data.
        """
        return (
            call.module is not self._recording.root.module
            and call not in self._keeping
            and is_rebuildable(call)
            and not (has_numbers(call.output) and any(op.syncs for op in self._ops_in(call)))
        )

    def must_run(
        self, owner: Mapping[int, Call], doors: Mapping[Door, Read], wanted: Set[Read], written: Set[int]
    ) -> set[Call]:
        """Return the calls of which what runs needs something that no stored value can stand for.

        Args:
            owner: operation -> the skipped call that it is in.
            doors: where stored values are handed in.
            wanted: the values that what runs reads.
            written: keys of the values that what runs writes to in place.
        """
        return (
            self._with_side_door(owner, wanted)
            | self._of_others(doors)
            | self._written_twice(doors, written)
            | self._collected_outside(owner, wanted)
        )

    def _with_side_door(self, owner: Mapping[int, Call], wanted: Set[Read]) -> set[Call]:
        """Return the calls that a value leaves by another way than as an output: an attribute, a closure."""
        returned = {read for call in set(owner.values()) for read in given(call)}
        makers = {read.writer for read in wanted - returned}
        return {call for maker, call in owner.items() if maker in makers}

    def _of_others(self, doors: Mapping[Door, Read]) -> set[Call]:
        """Return the calls that return a view of a weight, or of what learning layers made."""
        return {door.call for door, read in doors.items() if not self._dirt.is_clean(read)}

    def _written_twice(self, doors: Mapping[Door, Read], written: Set[int]) -> set[Call]:
        """Return the calls where one tensor enters twice: stored, it is two, and a write to one is lost."""
        entering = Counter(read.key for read in doors.values())
        return {door.call for door, read in doors.items() if read.key in written and entering[read.key] > 1}

    def _collected_outside(self, owner: Mapping[int, Call], wanted: Set[Read]) -> set[Call]:
        """Return the calls in which a hook of an inner call hands what that returned to code outside."""
        skipped = set(owner.values())  # hooks of what is skipped itself do run
        return {
            outer
            for call in self._collected
            if not wanted.isdisjoint(given(call))
            for outer in itertools.takewhile(lambda outer: not outer.collects, _around(call))
            if outer in skipped
        }

    def cheap_to_run(self, doors: Iterable[Door], kept: Set[int]) -> set[Call]:
        """Return the calls at a door that only look up or shape inputs which are at hand anyway.

        The decoder's token embedding of a sequence-to-sequence model is one: running it costs less than
        storing its output. `kept` are the inputs that are at hand; for the others see `must_run`.
        """
        costly = self._recording.fed_by(lambda op: op.flops > 0 or not set(op.inputs) <= kept)
        return {door.call for door in doors if not any(costly[door.call.start : door.call.end])}

    def _ops_in(self, call: Call) -> list[Op]:
        return self._recording.ops[call.start : call.end]


def _calls_with(recording: Recording, modules: Container[nn.Module]) -> set[Call]:
    """Return the calls of some modules, and those that they are in."""
    calls = (call for call in recording.calls if call.module in modules)
    return {one for call in calls for one in (call, *_around(call))}


def _around(call: Call) -> Iterator[Call]:
    """Yield the calls that a call is in, the innermost first."""
    while call.parent is not None:
        call = call.parent
        yield call
