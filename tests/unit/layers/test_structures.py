"""Tensors are found and replaced in the same places and the same order, whatever holds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from layerwise.layers.structures import map_tensors, tensors_in


@dataclass(slots=True)
class Base:
    first: torch.Tensor
    second: Any


@dataclass(slots=True)
class Derived(Base):
    third: torch.Tensor


@dataclass
class Mixed(Base):
    third: torch.Tensor
    late: list[Any] = field(default_factory=list)


class Cache:
    """No dataclass; `empty` has no value."""

    __slots__ = ("empty", "keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values


def one_two_three() -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(number) for number in (1, 2, 3))


@pytest.mark.parametrize("kind", [Derived, Mixed])
def test_dataclasses_with_slots_are_looked_into_in_the_order_of_their_fields(kind: Any) -> None:
    one, two, three = one_two_three()
    holder = kind(one, [two], three)
    assert [int(tensor) for tensor in tensors_in({"out": holder})] == [1, 2, 3]
    seen: list[int] = []
    twin = map_tensors(holder, lambda tensor: seen.append(int(tensor)) or tensor * 10)
    assert seen == [1, 2, 3]
    assert type(twin) is kind
    assert [int(tensor) for tensor in tensors_in(twin)] == [10, 20, 30]


def test_other_objects_with_slots_are_looked_into_as_deep_as_those_without() -> None:
    one, two, three = one_two_three()
    assert tensors_in(Cache(one, Base(two, Base(three, None)))) == [one, two, three]
    loop = Base(one, None)
    loop.second = loop
    assert len(tensors_in(loop)) == 3
