"""The reader asks samplers as DataLoader's own iterator does, and leaves the random numbers as it does."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from layerwise.cache.samples.reading import LoaderReader
from layerwise.errors import CacheError

DATA = TensorDataset(torch.arange(23))


class Lazy(Sampler):
    """Draws each index from the global generator at the moment when it is asked for."""

    def __iter__(self):
        for _ in range(23):
            yield int(torch.randint(0, 23, ()))

    def __len__(self) -> int:
        return 23


class Eager(Sampler):
    """Draws a whole epoch, in batches, at the moment when it is iterated over."""

    def __iter__(self):
        return iter(torch.randperm(23).split(4))

    def __len__(self) -> int:
        return 6


def loaders():
    generator = torch.Generator().manual_seed(3)
    return {
        "sequential": lambda **k: DataLoader(DATA, 4, **k),
        "shuffled": lambda **k: DataLoader(DATA, 4, shuffle=True, **k),
        "drop_last": lambda **k: DataLoader(DATA, 4, shuffle=True, drop_last=True, **k),
        "generator": lambda **k: DataLoader(DATA, 4, shuffle=True, generator=generator, **k),
        "replacement": lambda **k: DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True), **k),
        "batch sampler": lambda **k: DataLoader(
            DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, False), **k
        ),
        "lazy": lambda **k: DataLoader(DATA, 4, sampler=Lazy(), **k),
        "eager": lambda **k: DataLoader(DATA, batch_sampler=Eager(), **k),
    }


WORKERS = {"num_workers": 1}
LIVING = {**WORKERS, "persistent_workers": True}


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, {}) for name in loaders()),
        *((name, WORKERS) for name in ("shuffled", "lazy", "eager")),
        *((name, LIVING) for name in ("shuffled", "eager")),
    ],
)
def test_same_order_and_same_draws(name, workers) -> None:
    # three epochs, with draws of the loop's own between batches

    def walk(read):
        torch.manual_seed(0)
        loader = loaders()[name](**workers)
        seen = []
        epoch = read(loader)
        for _ in range(3):
            for batch in epoch():
                seen.append((batch, float(torch.rand(()))))
        return seen, torch.get_rng_state()

    def by_loader(loader):
        return lambda: (batch[0].tolist() for batch in loader)

    def by_reader(loader):
        return LoaderReader(loader).order

    (plain, state), (read, same) = walk(by_loader), walk(by_reader)
    assert plain == read
    assert torch.equal(state, same)


SAMPLERS = {
    "subset": lambda generator: SubsetRandomSampler(range(20), generator=generator),
    "weighted": lambda generator: WeightedRandomSampler([1.0] * 23, 20, generator=generator),
    "distributed": lambda generator: DistributedSampler(DATA, num_replicas=1, rank=0),
    "random": lambda generator: RandomSampler(DATA, generator=generator),
    "several rounds": lambda generator: RandomSampler(DATA, num_samples=60, generator=generator),
    "with replacement": lambda generator: RandomSampler(DATA, replacement=True, generator=generator),
    "own": lambda generator: Lazy(),
}
LAZY = ("several rounds", "with replacement", "own")


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_asking_early_draws_nothing_more(name, own_generator, drop_last) -> None:
    def loader():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(3) if own_generator else None
        sampler = SAMPLERS[name](generator)
        return DataLoader(DATA, 4, sampler=sampler, generator=generator, drop_last=drop_last), generator

    def states(generator):
        return torch.get_rng_state().tolist(), generator and generator.get_state().tolist()

    plain, plain_generator = loader()
    batches = iter(plain)
    first = next(batches)
    after_one = states(plain_generator)
    rest = list(batches)
    asked, generator = loader()
    order = LoaderReader(asked).order()
    found = [next(order)]
    early = order.ahead(100)
    assert states(generator) == after_one
    assert len(early) == (0 if name in LAZY else len(plain) - 2)
    found += [*early, *order]
    assert found == [batch[0].tolist() for batch in (first, *rest)]
    assert states(generator) == states(plain_generator)
    assert order.ahead(3) == []


def test_loading_gives_the_collated_batches() -> None:
    reader = LoaderReader(DataLoader(DATA, 4))
    before = torch.get_rng_state()
    found = [batch[0].tolist() for batch in reader.load(iter([[3, 1], [22]]))]
    assert found == [[3, 1], [22]]
    assert reader.load_now([5, 5])[0].tolist() == [5, 5]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("index", [23, -1, "a", 1.5])
def test_indices_outside_the_dataset(index) -> None:
    class Odd:
        batch_size = 1

        def __iter__(self):
            return iter([[0], [index]])

    reader = LoaderReader(DataLoader(DATA, batch_sampler=Odd()))
    first, second = reader.order()
    reader.check(first)
    with pytest.raises(CacheError, match="not indices from 0 to 22"):
        reader.check(second)


class Endless:
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def test_loaders_of_another_kind() -> None:
    class Own(DataLoader):
        def __iter__(self):
            return iter([])

    for loader, why in (
        ([1, 2], "a list, not a torch"),
        (Own(DATA), "iterates in its own way"),
        (DataLoader(DATA, batch_size=None), "does not batch"),
        (DataLoader(torch.arange(1), 1), "fewer than two samples"),
        (DataLoader(Endless(), 1, sampler=[0, 1]), "the dataset Endless has no length"),
    ):
        with pytest.raises(CacheError, match=why):
            LoaderReader(loader)


GENERATOR = torch.Generator()


def elsewhere() -> None:
    thread = threading.Thread(target=torch.rand, args=(1,))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("draw", "draws"),
    [
        (lambda: torch.rand(1), True),
        (lambda: torch.zeros(2).bernoulli_(), True),
        (lambda: np.random.rand(), True),
        (random.random, True),
        (lambda: torch.rand(1, generator=GENERATOR), False),
        (elsewhere, False),
        (lambda: None, False),
    ],
)
def test_who_draws_is_told_by_thread(draw, draws) -> None:
    # the state of a global generator does not tell it
    class Drawing(TensorDataset):
        def __getitem__(self, index):
            draw()
            return super().__getitem__(index)

    reader = LoaderReader(DataLoader(Drawing(torch.arange(8.0)), 4))
    assert reader.draws([1, 2]) is draws


@pytest.mark.parametrize("draw", ["global", "own", "none"])
def test_draws_of_a_worker_are_told(draw) -> None:
    # of one sample alone; what the worker drew before it began does not count
    class Drawing(TensorDataset):
        def __getitem__(self, index):
            if index == 6:
                draws[draw]()
            return super().__getitem__(index)

    def prepare(worker: int) -> None:
        random.seed(worker)

    data = Drawing(torch.arange(8))
    data.own = random.Random(0)
    draws = {"global": random.random, "own": lambda: data.own.random(), "none": lambda: None}
    reader = LoaderReader(DataLoader(data, 2, num_workers=1, worker_init_fn=prepare))
    told = []
    for batch in reader.load(iter([[0, 1], [6, 7], [2, 3]])):
        told.append((batch[0].tolist(), reader.has_drawn))
        reader.has_drawn = False
    assert told == [([0, 1], False), ([6, 7], draw != "none"), ([2, 3], False)]
