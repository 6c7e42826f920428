"""Lengths to pad to, and batches that hold one of them."""

from __future__ import annotations

import pytest
import torch

from layerwise.training.lengths import order_by_length, padded_lengths


def drawn(count: int, longest: int = 120, seed: int = 0) -> list[int]:
    """Lengths as those of texts: many short, few long."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator).pow(3) * (longest - 3)).long().add(3).tolist()


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("count", [1, 5, 8, 9, 63, 64, 200, 1003])
def test_few_lengths_that_hold_their_samples(count) -> None:
    # no sample is cut, none is padded above the longest, lengths are multiples of 8 and at most eight
    lengths = drawn(count)
    padded = padded_lengths(lengths, 8)
    assert all(own <= to <= max(lengths) for own, to in zip(lengths, padded, strict=True))
    assert all(to % 8 == 0 or to == max(lengths) for to in padded)
    assert len(set(padded)) <= 8
    # longer samples are padded to no less, and each length has whole batches but the shortest
    assert padded == [to for _, to in sorted(zip(lengths, padded, strict=True))] or sorted(padded) == [
        to for _, to in sorted(zip(lengths, padded, strict=True))
    ]
    counts = [padded.count(to) for to in sorted(set(padded))]
    assert all(number % 8 == 0 and number >= 16 for number in counts[1:])


def test_little_padding() -> None:
    # 1,000 texts get less than a third more tokens; padded to one length they would have over three times
    lengths = drawn(1000)
    assert sum(padded_lengths(lengths, 16)) < 1.33 * sum(lengths)
    assert 1000 * max(lengths) > 3 * sum(lengths)


def test_the_cuts_are_the_best_ones() -> None:
    # against all ways to cut a small set into two runs, where a run costs a batch: none has fewer tokens
    lengths = drawn(24, 90, seed=3)
    order = sorted(lengths)
    padded = padded_lengths(lengths, 4, multiple=1, most=2, least_batches=1)
    by_hand = [(end + 4) * order[end - 1] + (24 - end + 4) * order[-1] for end in range(4, 24, 4)]
    assert sum(padded) + 4 * sum(set(padded)) == min(by_hand) < (24 + 4) * order[-1]


def test_one_length_where_another_saves_nothing() -> None:
    assert padded_lengths([10] * 40 + [12] * 40, 4) == [12] * 80
    assert padded_lengths([], 4) == []


@pytest.mark.parametrize("count", [64, 203])
def test_batches_hold_one_length(count) -> None:
    # every sample once, in as many batches as without lengths, other ones in another epoch
    padded = padded_lengths(drawn(count), 8)
    orders = [order_by_length(padded, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in (*orders, order_by_length(padded, 8, None)):
        assert sorted(order) == list(range(count))
        assert all(len({padded[i] for i in batch}) == 1 for batch in batches(order, 8))
    assert len(set(padded)) > 1
    first, other = (sorted(map(sorted, batches(order, 8))) for order in orders[1:])
    assert first != other  # not the same batches in another order


def test_weights_count_across_lengths() -> None:
    # a class that is four times as rare among long texts as among short ones is drawn as often as it says
    lengths = [8] * 80 + [64] * 80
    rare = torch.tensor([i % 4 == 0 for i in range(80)] + [i % 16 == 0 for i in range(80)])
    weights = torch.where(rare, 0.5 / rare.sum(), 0.5 / (~rare).sum()).double()
    padded = padded_lengths(lengths, 4)
    generator = torch.Generator().manual_seed(0)
    orders = [order_by_length(padded, 4, generator, weights) for _ in range(60)]
    assert all(len(order) == 160 for order in orders)
    assert all(len({padded[i] for i in batch}) == 1 for order in orders for batch in batches(order, 4))
    share = torch.stack([rare[order].double().mean() for order in orders]).mean()
    assert float(share) == pytest.approx(0.5, abs=0.03)
