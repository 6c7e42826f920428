"""What is stored of samples, and what of them is loaded again."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cache_loops import both, images
from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.fixed import Fixed
from layerwise.cache.replay.layout import Layout
from layerwise.cache.replay.link import find_link
from layerwise.cache.samples.batchshape import BatchShape
from layerwise.cache.samples.feed import Feed, Phase, SiteColumn
from layerwise.cache.samples.reading import LoaderReader
from layerwise.cache.stock import CachePool
from layerwise.cache.store.column import Column, RowSpec
from layerwise.errors import CacheError


def feed_of(count: int = 4) -> Feed:
    feed = Feed(LoaderReader(DataLoader(TensorDataset(torch.arange(count)), 2)))
    batch = [torch.arange(2)]
    link = find_link(batch, batch, {})
    assert link is not None
    feed.shape, feed.holds_under = BatchShape.of(batch, 2), [link]
    return feed


def cut_of(**changes: Any) -> Cut:
    empty: dict[str, Any] = {
        name: {} for name in ("skipped", "entered", "inside", "passes", "sources", "outlines")
    }
    return Cut(**{**empty, "frontier": (), "constants": (), "inputs": frozenset(), **changes})


def phase_of(cut: Cut, ghosts: frozenset[int] = frozenset()) -> Phase:
    phase = Phase(verified=True)
    phase.cut, phase.ghosts = cut, ghosts
    phase.fixed = Fixed(cast(Any, None))
    return phase


def test_phases_that_were_met_long_ago_are_forgotten() -> None:
    # a schedule of an attribute makes a new one in each epoch
    feed = feed_of()
    first = feed.phase_of(0)
    for key in range(1, 32):
        feed.phase_of(key)
    assert feed.phase_of(0) is first
    feed.phase_of(32)
    assert list(feed.phases) == list(range(1, 33))


def test_a_batch_is_not_complete_without_its_own_tensors_and_the_constants() -> None:
    feed, rows = feed_of(), torch.arange(2)
    table = Site(CallId("positions", 0), "out", 0)
    feed.leaves[0] = Column(feed.rows, RowSpec((), torch.int64, torch.int64))
    assert feed.missing(phase_of(cut_of()), rows).all()  # labels, of which nothing is stored
    assert not feed.missing(phase_of(cut_of(), frozenset({0})), rows).any()
    assert feed.has_values(phase_of(cut_of()), rows)
    phase = phase_of(cut_of(constants=(table,)))
    assert not feed.has_values(phase, rows)
    phase.fixed.constants[table] = torch.ones(1), ()
    assert feed.has_values(phase, rows)


def test_values_that_are_not_all_stored_are_not_handed_out() -> None:
    feed, cpu = feed_of(), torch.device("cpu")
    site = Site(CallId("body", 0), "out", 0)
    phase = phase_of(cut_of(frontier=(site,)))
    assert not feed.has_values(phase, torch.arange(2))
    column = Column(feed.rows, RowSpec((1, 3), torch.float32, torch.float32))
    feed.sites[site] = SiteColumn(column, Layout(dim=0, per_sample=1, order=(0, 1)), "", ())
    column.put(torch.arange(2), torch.ones(2, 1, 3))
    assert feed.has_values(phase, torch.arange(2))
    assert torch.equal(feed.values(phase, torch.arange(2), cpu)[site], torch.ones(2, 3))
    assert not feed.has_values(phase, torch.arange(3))


def test_beside_a_sample_stands_another_one_of_its_shape() -> None:
    feed = feed_of()
    assert [feed.neighbour(index) for index in range(4)] == [1, 2, 3, 0]
    feed.members = [1, 3]
    assert [feed.neighbour(index) for index in (1, 3)] == [3, 1]
    feed.members = [2]
    with pytest.raises(CacheError, match="only one sample has this shape"):
        feed.neighbour(2)


def test_sizes_of_batches_are_those_of_all_phases() -> None:
    # values are computed in batches of one of them
    feed = feed_of()
    feed.full = 3
    feed.keep_sizes({4, 2})
    assert (feed.sizes, feed.full) == ({4, 2}, 4)
    feed.keep_sizes({2, 1})
    assert (feed.sizes, feed.full) == ({2}, 2)
    with pytest.raises(CacheError, match="batches have several sizes"):
        feed.keep_sizes({4, 3})
    assert feed.sizes == {2}
    feed.sizes = None  # last bits do not count
    feed.keep_sizes({4})
    assert feed.sizes is None


class Wide(nn.Module):
    """Takes images of more bytes than are stored of a real input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 8, 8), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(("size", "again"), [(72, 0), (80, 6)])
def test_large_inputs_that_the_loop_wants_are_loaded_and_not_stored(size, again) -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        assert type(batch[0]) is Tensor
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    cached = both(Wide, lambda: images(6, size), "head", step=step, keep_inputs=True)
    assert "memory, cut at" in cached.text
    assert cached.loads[1:] == [again, again]


class Branches(nn.Module):
    """Two branches read the images."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 2, 8, 8), nn.Conv2d(3, 2, 8, 8)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.one(x) * self.other(x)).mean((2, 3)))


def learning_later() -> frozenset[str]:
    return frozenset(name for name, _ in Branches().named_parameters() if not name.startswith("one"))


@pytest.mark.parametrize(("size", "again"), [(72, 0), (80, 6)])
def test_large_inputs_of_a_later_phase_are_not_loaded_before_it(size, again) -> None:
    # at 80 x 80 the images are too large to be stored; the second phase reads them, the first does not
    def unfreeze(model: nn.Module, epoch: int) -> None:
        model.get_submodule("other").requires_grad_(epoch > 2)

    pool = CachePool(upcoming={learning_later(): 3})
    cached = both(Branches, lambda: images(6, size), "head", epochs=6, before_epoch=unfreeze, pool=pool)
    assert "off" not in cached.text
    assert cached.loads[1:3] == [0, 0]
    assert cached.loads[4:] == [again, again]


@pytest.mark.parametrize(("budget_bytes", "held"), [(12_000, 6 * (4 * 2 + 8)), (400_000, 377_232)])
def test_inputs_that_a_later_phase_reads_count_as_what_it_needs(budget_bytes, held) -> None:
    # with those of 62 KB a sample it does not fit, and so is looked at again when it comes
    pool = CachePool(upcoming={learning_later(): 3})
    cached = both(Branches, lambda: images(6, 72), "head", budget_bytes=budget_bytes, pool=pool)
    assert sum(column.nbytes for column in cached.cache.stock._held) == held
