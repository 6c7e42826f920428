"""A loader that was made anew is known to read the same samples, or is not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from layerwise.cache.changes.alike import does_the_same, reads_alike

DATA = TensorDataset(torch.arange(9))


def collate(samples: list[Any], scale: float = 1.0, **options: Any) -> Tensor:
    return torch.stack([sample[0] for sample in samples]) * scale


def bounded(limit: float) -> Any:
    return lambda samples: collate(samples).clamp(max=limit)


class Collate:
    """Makes batches; of two objects nobody knows whether they do the same."""

    def __call__(self, samples: list[Any]) -> Tensor:
        return collate(samples)

    def batch(self, samples: list[Any]) -> Tensor:
        return collate(samples)


ONE = Collate()
SAME = {  # what is made anew in each epoch
    "function": lambda: collate,
    "lambda": lambda: bounded(2.0),
    "partial": lambda: functools.partial(collate, scale=2.0),
    "partial of a partial": lambda: functools.partial(functools.partial(collate, scale=2.0), key="x"),
    "partial of a lambda": lambda: functools.partial(bounded(2.0)),
    "dictionary of a partial": lambda: functools.partial(collate, key=ONE),
    "method": lambda: ONE.batch,
    "object": lambda: ONE,
}


@pytest.mark.parametrize("name", SAME)
def test_functions_that_do_the_same(name) -> None:
    assert does_the_same(SAME[name](), SAME[name]())
    assert reads_alike(*(DataLoader(DATA, 3, collate_fn=SAME[name]()) for _ in range(2)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (bounded(1.0), bounded(2.0)),
        (bounded(1.0), bounded(1)),
        (collate, bounded(1.0)),
        (functools.partial(collate, scale=1.0), functools.partial(collate, scale=2.0)),
        (functools.partial(collate, scale=1.0), functools.partial(collate, key=1.0)),
        (functools.partial(collate, [1]), functools.partial(collate, [1])),  # it may be written to
        (functools.partial(collate), collate),
        (functools.partial(bounded(1.0)), functools.partial(bounded(2.0))),
        (Collate(), Collate()),
        (Collate().batch, Collate().batch),
        (collate, None),
    ],
)
def test_functions_that_are_not_known_to_do_the_same(one, other) -> None:
    assert not does_the_same(one, other)


def test_a_class_of_loaders_of_the_users_own_is_not_known() -> None:
    class Own(DataLoader):
        pass

    assert reads_alike(DataLoader(DATA, 3), DataLoader(DATA, 3))
    assert not reads_alike(DataLoader(DATA, 3), Own(DATA, 3))
    assert not reads_alike(Own(DATA, 3), Own(DATA, 3))


def test_the_same_part_of_a_data_set() -> None:
    one, same, other = (DataLoader(Subset(DATA, part), 3) for part in (range(6), list(range(6)), range(5)))
    assert reads_alike(one, same)
    assert not reads_alike(one, other)
    assert not reads_alike(one, DataLoader(DATA, 3))
    assert not reads_alike(one, DataLoader(Subset(DATA, range(6)), 2))
