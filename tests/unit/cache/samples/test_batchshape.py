"""Batches of any make: what is in them is replaced, or they are left alone and the reason is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from cache_loops import both, images, off
from helpers import TinyCNN
from layerwise.cache.samples.batchshape import BatchShape
from layerwise.errors import CacheError

LAST = ("layer2", "fc")


def collating(make: Callable[[Tensor, Tensor], Any], read: Callable[[Any], Any] = lambda b: b) -> Any:
    """Return options of a loop whose batches `make` makes of images and labels, and `read` takes apart."""

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = read(batch)[:2]
        return nn.functional.cross_entropy(model(x), y)

    return {"loader_options": {"collate_fn": lambda samples: make(*default_collate(samples))}, "step": step}


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Plain:
    x: Tensor
    y: Tensor
    name: str = "batch"


@dataclass
class Checking:
    """Looks at what it is given."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y)


class Alike(SimpleNamespace):
    """Says that it is the same as any other."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Alike

    __hash__ = None  # type: ignore[assignment]


class Odd:
    """Cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise LookupError("no")

    __hash__ = None  # type: ignore[assignment]


def attributes(batch: Any) -> Any:
    return batch.x, batch.y


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (Pair, attributes),
        (Plain, attributes),
        (lambda x, y: {"x": x, "more": [{"y": y}]}, lambda b: (b["x"], b["more"][0]["y"])),
        (lambda x, y: (x, y, Odd()), lambda b: b),
    ],
)
def test_tensors_that_are_replaced(make, read) -> None:
    assert "memory, cut at layer1" in both(TinyCNN, images, *LAST, **collating(make, read)).text


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x, y: SimpleNamespace(x=x, y=y), attributes),
        (lambda x, y: Alike(x=x, y=y), attributes),
        (lambda x, y: (SimpleNamespace(x=x * 2), x, y), lambda b: b[1:]),
        (Checking, attributes),
    ],
)
def test_tensors_in_an_object_that_cannot_be_replaced(make, read) -> None:
    text = off(TinyCNN, images, *LAST, **collating(make, read))
    assert "in an object in which others cannot be put in their place" in text


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda x: x.flatten(1).to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "with gradients": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz", "ignore:The PyTorch API of nested")
def test_tensors_of_other_forms(name) -> None:
    # beside those that reach the model
    text = off(TinyCNN, images, *LAST, **collating(lambda x, y: (x, y, FORMS[name](x))))
    assert "sparse, nested, quantised or on meta, or requires gradients" in text


def test_rows_that_are_no_samples() -> None:
    class Joined(TinyCNN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(-1, 3, 8, 8))

    text = off(Joined, images, *LAST, **collating(lambda x, y: (x.flatten(0, 1), y)))
    assert "a batch of 4 samples has the shape (12, 8, 8): the first dimension must count samples" in text
    assert "taken apart in the forward of a module around the model" in text


def test_what_is_no_tensor_is_compared() -> None:
    shape = BatchShape.of({"x": torch.ones(2, 3), "name": "a"}, 2)
    assert not shape.has_other_values({"x": torch.zeros(2, 3), "name": "a"})
    assert shape.has_other_values({"x": torch.ones(2, 3), "name": "b"})
    assert BatchShape.of([torch.ones(2), Odd()], 2).has_other_values([torch.ones(2), Odd()])
    with pytest.raises(CacheError, match="a batch of 2 samples holds no tensors"):
        BatchShape.of([], 2)
