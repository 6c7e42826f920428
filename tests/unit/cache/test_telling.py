"""What people are told of a cache."""

from __future__ import annotations

from layerwise.cache.samples.phase import Phase
from layerwise.cache.store.decision import Decision
from layerwise.cache.telling import merged


def test_phases_of_several_shapes_are_told_as_one() -> None:
    cached = Phase(decision=Decision("memory", "asked for", 10, 6))
    stored = Phase(decision=Decision("memory", "stored in an earlier pass", 0, 2))
    alone = Phase(reason="only one sample has this shape")
    assert merged([alone]) is alone
    told = merged([cached, stored, alone]).decision
    assert told is not None
    assert (told.bytes_per_sample, told.samples) == (8, 8)
    assert told.reason == (
        "asked for; samples have 3 shapes, 60 B in all; 1 of them not cached: only one sample has this shape"
    )
    told = merged([stored, stored]).decision
    assert told is not None
    assert told.reason == "stored in an earlier pass; samples have 2 shapes"
