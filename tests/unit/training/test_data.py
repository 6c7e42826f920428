"""The order of samples and their augmentation depend on seed, epoch and index, and on nothing else."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from layerwise.errors import DataError
from layerwise.layers.randomness import seed_everything
from layerwise.training.data import EpochBatches, open_batches
from layerwise.training.labels import labels_of
from layerwise.training.randomness import epoch_seed, get_random_state, set_random_state


class Noisy(Dataset):
    """Adds random numbers of all three generators to the index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        return torch.tensor([index + torch.rand(()).item(), np.random.rand(), random.random()]), index % 2


def flat(batches) -> list:
    return list(itertools.chain.from_iterable(batches))


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.float32), torch.arange(count) % 2)


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    # Same seed and epoch, same order; another of either, another order; every sample exactly once.
    order = EpochBatches(50, 8, seed=3)
    order.set_epoch(2)
    first = list(order)
    torch.rand(5)
    order.set_epoch(1)
    other = list(order)
    order.set_epoch(2)
    assert list(order) == first != other
    assert sorted(flat(first)) == list(range(50))
    generator = torch.Generator().manual_seed(epoch_seed(3, 2))
    assert flat(first) == torch.randperm(50, generator=generator).tolist()
    again = EpochBatches(50, 8, seed=4)
    again.set_epoch(2)
    assert list(again) != first


def test_an_epoch_can_begin_at_any_batch() -> None:
    # The rest of an epoch is the tail of the whole one.
    order = EpochBatches(21, 4, seed=0)
    order.set_epoch(5)
    whole = list(order)
    assert [len(b) for b in whole] == [4, 4, 4, 4, 4, 1]
    for start in range(7):
        order.set_epoch(5, start)
        assert list(order) == whole[start:]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_batches(world: int, drop_last: bool) -> None:
    # Every process gets equally many batches, and together they see every sample of the epoch.
    shares = []
    for rank in range(world):
        order = EpochBatches(22, 4, seed=1, drop_last=drop_last, rank=rank, world=world)
        shares.append(list(order))
        assert len(shares[-1]) == len(order)
    assert len({len(share) for share in shares}) == 1
    assert len({i for share in shares for batch in share for i in batch}) == (20 if drop_last else 22)


def test_augmentation_is_the_same_in_workers_and_after_a_restart() -> None:
    # A sample's random numbers do not depend on the process that loads it or on where the epoch began.
    here = open_batches(Noisy(), train=True, batch_size=3, seed=1)
    workers = open_batches(Noisy(), train=True, batch_size=3, seed=1, workers=2)
    whole = list(here.epoch(4))
    for one, other in zip(whole, workers.epoch(4), strict=True):
        assert torch.equal(one[0], other[0])
    for one, other in zip(whole[2:], here.epoch(4, 2), strict=True):
        assert torch.equal(one[0], other[0])
    assert not torch.equal(whole[0][0], next(here.epoch(5))[0])


def test_loading_leaves_the_global_generators_alone() -> None:
    # Dropout draws the same numbers whether or not the data set augments at random.
    seed_everything(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    seed_everything(0)
    list(open_batches(Noisy(), train=True, batch_size=3).epoch(0))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]


def test_random_state_round_trip() -> None:
    # All three generators go on from the state that was saved.
    saved = get_random_state()
    first = torch.rand(3), np.random.rand(3), random.random()
    set_random_state(saved)
    assert torch.equal(torch.rand(3), first[0])
    assert np.array_equal(np.random.rand(3), first[1])
    assert random.random() == first[2]


def test_a_plain_loader_gets_our_order_and_keeps_its_settings() -> None:
    # Shuffling loaders shuffle by our order, sequential ones stay sequential; batch size is theirs.
    shuffled = open_batches(
        DataLoader(numbers(9), batch_size=4, shuffle=True), train=True, batch_size=1, seed=7
    )
    assert shuffled.exact
    epoch = [batch[0].tolist() for batch in shuffled.epoch(1)]
    assert [len(b) for b in epoch] == [4, 4, 1]
    assert (
        flat(epoch) == torch.randperm(9, generator=torch.Generator().manual_seed(epoch_seed(7, 1))).tolist()
    )
    plain = open_batches(DataLoader(numbers(9), batch_size=4), train=True, batch_size=1)
    assert flat(batch[0].tolist() for batch in plain.epoch(1)) == list(range(9))


def test_a_loader_with_its_own_sampler_is_fast_forwarded() -> None:
    # Its order comes from the global generator; skipping draws the same order and leaves today's state.
    class Mine(torch.utils.data.Sampler):
        def __iter__(self):
            yield from torch.randperm(9).tolist()

        def __len__(self) -> int:
            return 9

    loader = DataLoader(numbers(9), batch_sampler=BatchSampler(Mine(), 2, False))
    batches = open_batches(loader, train=True, batch_size=1)
    assert not batches.exact
    seed_everything(5)
    state = get_random_state()
    whole = [batch[0].tolist() for batch in batches.epoch(0)]
    torch.rand(7)
    present = torch.get_rng_state()
    rest = batches.epoch(0, 2, random_state=state)
    head = next(rest)[0].tolist()
    assert torch.equal(torch.get_rng_state(), present)
    assert [head, *(batch[0].tolist() for batch in rest)] == whole[2:]


def test_data_that_cannot_be_used_is_told() -> None:
    # Empty sets, things that are no data, weights on a foreign sampler.
    with pytest.raises(DataError, match="no samples"):
        open_batches(numbers(0), train=True, batch_size=2)
    pair = (torch.zeros(4, 2), torch.zeros(4))  # what shift and advise take; its items are no samples
    with pytest.raises(
        DataError, match=r"train is a pair of tensors; .* torch.utils.data.TensorDataset\(inputs, labels\)"
    ):
        open_batches(pair, train=True, batch_size=2)
    with pytest.raises(DataError, match="train is an int"):
        open_batches(3, train=True, batch_size=2)

    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

        def __len__(self) -> int:
            return 3

    with pytest.raises(DataError, match="sampler of its own"):
        open_batches(DataLoader(Stream()), train=True, batch_size=1, weighted=True)
    with pytest.raises(DataError, match=r"val is an iterable data set \(Stream\).*DataLoader\(val"):
        open_batches(Stream(), train=False, batch_size=1)
    with pytest.raises(DataError, match="labels of an iterable data set"):
        labels_of(Stream())


def test_the_name_of_a_folder_is_no_data() -> None:
    # It has a length and items, its letters, which went into the model.
    with pytest.raises(
        DataError, match=r"val is a str; expected a map-style data set .* layerwise.open_images"
    ):
        open_batches("photos", train=False, batch_size=2)


def test_batches_by_length_hold_every_sample_once_and_little_padding():
    # Grouping loses no sample, keeps the smaller last batch last, differs by epoch, and saves padding.
    lengths = torch.randint(1, 100, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    grouped, plain = (EpochBatches(103, 8, seed=1, lengths=known) for known in (lengths, None))

    def padded(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    first = list(grouped)
    assert sorted(index for batch in first for index in batch) == list(range(103))
    assert [len(batch) for batch in first] == [8] * 12 + [7]
    assert padded(first[:-1]) < 0.8 * padded(list(plain)[:-1])
    grouped.set_epoch(1)
    assert list(grouped) != first
    grouped.set_epoch(0, start=3)
    assert list(grouped) == first[3:]


def test_lengths_do_not_change_the_set_that_is_validated():
    # Without shuffling, short samples come first, and the smaller batch last; all of them come.
    order = EpochBatches(9, 2, shuffle=False, lengths=[40, 1, 39, 2, 5, 38, 6, 37, 3]).order()
    assert order == [3, 4, 6, 8, 0, 2, 5, 7, 1]


def test_a_sampler_that_counts_epochs_is_told_the_epoch() -> None:
    # As DistributedSampler and its like need it: without it each epoch has the order of the first.
    class Counting(torch.utils.data.Sampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch, 5])

        def __len__(self) -> int:
            return 2

    batches = open_batches(DataLoader(numbers(6), batch_size=2, sampler=Counting()), train=True, batch_size=1)
    assert [flat(x.tolist() for x, _ in batches.epoch(epoch)) for epoch in (0, 3)] == [[0, 5], [3, 5]]


def test_a_sampler_of_its_own_cannot_be_combined_with_everything() -> None:
    # Drawing by weight and sharing between processes need the order to be ours.
    loader = DataLoader(numbers(6), batch_size=2, sampler=[0, 1])
    with pytest.raises(
        DataError, match=r"train is a DataLoader with a sampler of its own; sampler='weighted'"
    ):
        open_batches(loader, train=True, batch_size=1, weighted=True)
    with pytest.raises(DataError, match=r"cannot be shared between 2 processes. Give fit the data set"):
        open_batches(loader, train=True, batch_size=1, world=2)
