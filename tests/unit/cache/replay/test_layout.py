"""Taking a batch apart into rows and putting it together again changes no bit and no stride."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from layerwise.cache.replay.layout import Layout, copied, find_layout, has_gaps, memory_order
from layerwise.errors import CacheError


def pair(make, batch=6, other=4):
    one, two = make(batch), make(other)
    layout = find_layout(one, batch, two, other, where="a value")
    return one, layout


@pytest.mark.parametrize(
    "make",
    [
        lambda b: torch.randn(b, 5),
        lambda b: torch.randn(b, 5, 3, 4).to(memory_format=torch.channels_last),
        lambda b: torch.randn(7, b, 5),  # sequence first
        lambda b: torch.randn(b * 9, 5),  # windows of one sample side by side
        lambda b: torch.randn(b, 4, 1, 1).to(memory_format=torch.channels_last),
        lambda b: torch.randn(b),
        lambda b: torch.randn(b, 1, 5).expand(-1, 7, -1),
        lambda b: torch.randn(4, b, 1, 1).expand(-1, -1, 3, 2),
    ],
)
def test_round_trip(make) -> None:
    value, layout = pair(make)
    assert layout is not None
    back = layout.from_rows(layout.to_rows(value).contiguous())
    assert torch.equal(back, value)
    assert back.stride() == value.stride()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    again = layout.from_rows(layout.to_rows(value)[order])
    assert torch.equal(layout.to_rows(again)[order.argsort()], layout.to_rows(value))
    assert layout.shape(tuple(value.shape), 6) == tuple(value.shape)


def test_samples_that_lie_a_whole_batch_apart() -> None:
    value, layout = pair(lambda b: torch.randn(2 * b, 5, 3, 3).to(memory_format=torch.channels_last))
    assert layout is not None
    layout = dataclasses.replace(layout, apart=True)
    one, other = value.chunk(2)
    assert torch.equal(layout.to_rows(value).permute(0, 1, 4, 2, 3), torch.stack([one, other], dim=1))
    back = layout.from_rows(layout.to_rows(value).contiguous())
    assert torch.equal(back, value)
    assert back.stride() == value.stride()


def test_of_repeated_numbers_one_is_stored() -> None:
    # kernels sum in another order where the memory holds each of them
    value, layout = pair(lambda b: torch.randn(b, 1, 5).expand(-1, 7, -1))
    assert layout.to_rows(value).numel() == 6 * 5
    assert copied(value).stride() == value.stride() == (5, 0, 1)
    assert copied(value).untyped_storage().nbytes() == 6 * 5 * 4


def test_a_value_that_does_not_grow_has_no_layout() -> None:
    assert pair(lambda b: torch.randn(3, 3))[1] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda b: torch.randn(b, b),
        lambda b: torch.randn(b + 1, 3),
        lambda b: torch.randn(b + b // 6, 3),
        lambda b: torch.randn(b - 4 // b, 3),
        lambda b: torch.randn(*[b] * b),
    ],
)
def test_what_is_not_made_of_samples_is_refused(make) -> None:
    # similarity between samples, an extra row, another number of dimensions: none can be taken apart
    with pytest.raises(CacheError, match="cannot be taken apart"):
        pair(make)


def test_memory_order_of_a_view() -> None:
    assert memory_order(torch.randn(2, 3, 4).transpose(1, 2)) == (0, 2, 1)
    assert Layout(0, 1, (0, 2, 1)).to_rows(torch.randn(2, 3, 4)).shape == (2, 1, 4, 3)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(6, 7, 8)[:, 1:],
        torch.randn(6, 4, 5, 9)[..., 2:7],
        torch.randn(6, 4, 5, 9).permute(0, 2, 3, 1)[:, :, 1:],
    ],
)
def test_gaps_in_memory_survive(value) -> None:
    # a linear layer takes another kernel for a slice of a longer sequence, and rounds in another way
    layout = find_layout(value, 6, value[:2], 2, where="x")
    assert layout is not None
    for part in (value, value[[3, 1]]):
        again = layout.from_rows(layout.to_rows(part).clone())
        assert again.stride() == value.stride()
        assert torch.equal(again, part)
    assert copied(value).stride() == value.stride()
    assert copied(value).data_ptr() != value.data_ptr()


def test_gaps_that_depend_on_the_batch_do_not() -> None:
    # sequence first: in the memory of a batch of 4 there is no room for one of 6
    _, layout = pair(lambda b: torch.randn(7, b, 9)[..., 1:], 4, 2)
    larger = torch.randn(7, 6, 9)[..., 1:]
    assert torch.equal(layout.from_rows(layout.to_rows(larger)), larger)


@pytest.mark.parametrize("value", [torch.randn(3, 4).t(), torch.randn(3, 1).expand(3, 5), torch.randn(0, 4)])
def test_no_gaps(value) -> None:
    assert not has_gaps(value)
    assert torch.equal(copied(value), value)
