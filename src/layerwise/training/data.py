"""Batches in an order that can be begun again anywhere: a function of seed and epoch, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from layerwise.errors import DataError, named_kind
from layerwise.layers.randomness import drawn, kept_random_state
from layerwise.training.labels import labels_of, sampling_weights
from layerwise.training.lengths import order_by_length, padded_lengths
from layerwise.training.randomness import epoch_seed, sample_randomness, set_random_state

if TYPE_CHECKING:
    from layerwise.cache.prefix import PrefixCache

Data = Any
"""A map-style data set, or a `torch.utils.data.DataLoader`."""


NO_BATCH = (
    "a data loader gives no batch in this epoch. It has to give its data anew each time it is gone through: "
    "let the __iter__ of its data set begin again, and look whether there are samples at all."
)


class EpochBatches(Sampler[list[int]]):
    """Batches of sample indices; the order of an epoch depends on the seed and the epoch alone.

    ``torch.randperm(size)`` from a generator seeded with `epoch_seed`; with `weights`, as many draws
    with replacement, each sample with a probability in proportion to its weight. In several processes
    each takes every `world`-th batch, and the first batches are repeated until all have equally many.

    Args:
        size: number of samples.
        batch_size: samples in a batch; the last one of an epoch may be smaller.
        seed: of the order.
        shuffle: False keeps the order of the data set in every epoch.
        weights: float64[size], for drawing with replacement instead of shuffling.
        drop_last: leave out a smaller last batch.
        lengths: of each sample, in tokens: a batch holds samples that are padded to one length, so that
            little of it is padding, and no sample's depends on the others. None does not look at lengths.
        rank: number of this process.
        world: number of processes.

    Attributes:
        padded: to how many tokens each sample has to be padded, in every epoch (`padded_lengths`); None
            without `lengths`.
        draws_at_once: True: nothing is drawn after the first batch, so batches may be asked for early.
    """

    draws_at_once = True

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Tensor | None = None,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        least = {} if shuffle else {"least_batches": 1}
        self.padded = None if lengths is None else padded_lengths(lengths, batch_size, **least)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.weights, self.drop_last = shuffle, weights, drop_last
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and its first batch."""
        self.epoch, self.start = epoch, start

    def order(self) -> list[int]:
        """Return the indices of all samples of the chosen epoch, in order, before they are batched."""
        generator = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        if self.padded is not None:
            return order_by_length(self.padded, self.batch_size, generator, self.weights)
        if generator is None:
            return list(range(self.size))
        if self.weights is not None:
            drawn = torch.multinomial(self.weights, self.size, replacement=True, generator=generator)
        else:
            drawn = torch.randperm(self.size, generator=generator)
        return cast("list[int]", drawn.tolist())

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        stop = self.size - self.size % self.batch_size if self.drop_last else self.size
        batches = [order[i : min(i + self.batch_size, stop)] for i in range(0, stop, self.batch_size)]
        while self.shuffle and len(batches) % self.world:
            batches.append(batches[len(batches) % self.world - 1])
        yield from batches[self.rank :: self.world][self.start :]

    def __len__(self) -> int:
        batches = self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)
        if self.shuffle:  # the first ones are repeated
            return -(-batches // self.world)
        return len(range(self.rank, batches, self.world))


class SeededSamples(Dataset[Any]):
    """A data set whose random augmentation depends on (seed, epoch, index) alone.

    So a sample comes out the same whichever worker loads it and however often the run was interrupted.

    Args:
        data: any map-style data set.
        seed: of the augmentation.
        padded: to how many tokens ``data.pad`` fills up each sample; None leaves them.

    Attributes:
        has_drawn: a sample that was loaded in this process drew random numbers.
    """

    def __init__(self, data: Any, seed: int, padded: Sequence[int] | None = None) -> None:
        self.data, self.seed, self.padded, self.epoch = data, seed, padded, 0
        self.has_drawn = False

    def __getitem__(self, index: int) -> Any:
        with sample_randomness(self.seed, self.epoch, index):
            before = drawn()
            sample = self.data[index]
            self.has_drawn |= drawn() != before
        return sample if self.padded is None else self.data.pad(sample, self.padded[index])

    def __len__(self) -> int:
        return len(self.data)


class Batches:
    """The batches of one data set, epoch by epoch, from any batch on.

    Attributes:
        loader: the `DataLoader` behind it (what the cache reads).
        data: the data set that the caller gave.
        exact: whether the order is ours, so that skipping batches costs nothing. False for a loader
            with a sampler of its own: its batches are drawn and thrown away instead.
    """

    def __init__(self, loader: DataLoader[Any], data: Any, *, exact: bool) -> None:
        self.loader, self.data, self.exact = loader, data, exact

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def batch_size(self) -> int | None:
        """Samples of the largest batch; None where a loader of the caller's own does not tell."""
        size = getattr(self.loader.batch_sampler, "batch_size", None)
        count = samples_in(self.data)
        return size if size is None or count is None else min(size, count)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and the first batch, of the next iteration of `loader`.

        A data set with a method ``set_epoch`` is told the epoch; of a loader with a sampler of its own the
        loader and the samplers are, too.
        """
        parts: tuple[Any, ...] = (self.data,)
        if self.exact:
            cast(EpochBatches, self.loader.batch_sampler).set_epoch(epoch, start)
            cast(SeededSamples, self.loader.dataset).epoch = epoch
        else:
            parts = (self.loader, self.loader.sampler, self.loader.batch_sampler, self.data)
        for part in parts:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def epoch(
        self,
        epoch: int,
        start: int = 0,
        *,
        random_state: dict[str, Any] | None = None,
        cache: PrefixCache | None = None,
    ) -> Generator[Any, None, None]:
        """Yield the batches of `epoch` from batch `start` on.

        Args:
            epoch: number of the epoch, from 0.
            start: how many batches to leave out at the beginning.
            random_state: state of the global generators when the epoch first began. A loader of the
                caller's own draws its order from them, so it gets that state back while `start`
                batches are thrown away; then the present state is put in place again.
            cache: hands the batches out; None for the loader itself.

        Raises:
            DataError: a loader of the caller's own gives no batch.
        """
        self.begin(epoch, start)
        source = self.loader if cache is None else cache.batches(self.loader)
        if self.exact:
            yield from source
            return
        if not start:
            batch: Any = None
            for batch in source:
                yield batch
            if batch is None:
                raise DataError(NO_BATCH)
            return
        with kept_random_state():
            if random_state is not None:
                set_random_state(random_state)
            batches = iter(source)
            for _ in range(start):
                next(batches, None)
        yield from batches


def open_batches(
    data: Data,
    *,
    train: bool,
    batch_size: int,
    name: str | None = None,
    seed: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int = 0,
    weighted: bool = False,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Return the batches of a data set or a data loader.

    A `DataLoader` over a map-style data set with torch's own random or sequential order gives its data
    set, batch size, collate function, workers and drop_last, and gets our order in place of its own
    (shuffled where it shuffled), so that a run on it can be resumed exactly. A loader with another
    sampler, or over an iterable data set, is used as it is.

    Args:
        data: what to go through.
        train: whether to shuffle a data set.
        batch_size: for a data set; a loader has its own.
        name: of the data in messages; None is ``"train"`` or ``"val"``.
        seed: of the order and the augmentation.
        collate: for a data set that has no ``collate`` of its own; a loader has its own. Batches of a
            data set that tells the ``lengths`` of its samples hold samples of about one length, and are
            padded to one that depends on nothing else if it has a method ``pad(sample, length)``.
        workers: processes that load samples of a data set; 0 loads in this one.
        weighted: draw with replacement, all classes equally often (`sampling_weights`).
        drop_last: leave out a smaller last batch, of a data set.
        rank: number of this process.
        world: number of processes.

    Raises:
        DataError: `data` is neither, is empty, or cannot be combined with `weighted` or `world`.
    """
    what = name or ("train" if train else "val")
    if isinstance(data, DataLoader):
        loader = data
        # with batch_sampler=, loader.sampler is idle
        sampler = getattr(loader.batch_sampler, "sampler", None)
        is_torchs = type(sampler) in (RandomSampler, SequentialSampler)
        ours = type(loader.batch_sampler) is BatchSampler and is_torchs
        if isinstance(loader.dataset, IterableDataset) or not ours:
            if weighted:
                raise DataError(
                    f"{what} is a DataLoader with a sampler of its own; sampler='weighted' needs to draw "
                    "the samples itself. Give fit the data set, or leave sampler out."
                )
            if world > 1:
                raise DataError(
                    f"{what} is a DataLoader with a sampler of its own, which cannot be shared between "
                    f"{world} processes. Give fit the data set."
                )
            if samples_in(loader.dataset) == 0:
                raise DataError(f"{what} holds no samples.")
            return Batches(loader, loader.dataset, exact=False)
        source, shuffle = cast(Any, loader.dataset), type(sampler) is RandomSampler
        grouping = cast(BatchSampler, loader.batch_sampler)
        batch_size, drop_last = grouping.batch_size, grouping.drop_last
        collate, workers = loader.collate_fn, loader.num_workers
    else:
        _require_map_style(data, what)
        source, shuffle = data, train
        collate = getattr(data, "collate", collate)  # texts know their own padding
    if not len(source):
        raise DataError(f"{what} holds no samples.")
    order = EpochBatches(
        len(source),
        batch_size,
        seed=seed,
        shuffle=shuffle,
        weights=sampling_weights(labels_of(source)) if weighted else None,
        drop_last=drop_last,
        lengths=getattr(source, "lengths", None),
        rank=rank,
        world=world,
    )
    padded = order.padded if getattr(source, "pads_samples", hasattr(source, "pad")) else None
    ours_loader = DataLoader(
        SeededSamples(source, seed, padded),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),  # else each epoch would draw from the global generator
        pin_memory=torch.cuda.is_available(),
    )
    return Batches(ours_loader, source, exact=True)


def _require_map_style(data: Any, what: str) -> None:
    """Raise `DataError` for what is no map-style data set, with how to make one of it."""
    if isinstance(data, IterableDataset):  # has __getitem__ too, which raises
        raise DataError(
            f"{what} is an iterable data set ({type(data).__name__}); expected a map-style data set or a "
            f"DataLoader. Wrap it: DataLoader({what}, batch_size=...)."
        )
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(p, Tensor) for p in data):
        raise DataError(
            f"{what} is a pair of tensors; expected a map-style data set or a DataLoader. Make one: "
            f"torch.utils.data.TensorDataset(inputs, labels)."
        )
    if isinstance(data, str) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"{what} is {named_kind(data)}; expected a map-style data set (with __len__ and "
            "__getitem__) or a DataLoader. Of a folder of images: layerwise.open_images(...).train"
        )


def samples_in(data: Any) -> int | None:
    """Return the number of samples of a data set; None for an iterable one that does not tell."""
    return len(data) if hasattr(data, "__len__") else None
