"""`by_length`: a loader whose batches are padded to lengths that do not change from epoch to epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from layerwise.cache.changes.alike import is_same_data
from layerwise.cache.samples.prepared import inner, reading
from layerwise.errors import DataError, named_kind
from layerwise.layers.randomness import kept_random_state, seed_everything
from layerwise.layers.structures import map_tensors, tensors_in
from layerwise.training.data import EpochBatches

Shape = tuple[int, ...]
"""The dimensions of all tensors of one sample, one after the other."""


class ByLength(DataLoader[Any]):
    """What `by_length` returns."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that comes next, and its order; without it, one epoch follows the other."""
        order: Any = self.batch_sampler
        order.set_epoch(epoch)


def by_length(loader: DataLoader[Any], *, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of the same samples, in batches that hold samples padded to one length.

    A collate function that pads to the longest sample of a batch gives a sample another padding in each
    epoch, and a network's last bits depend on it, so `PrefixCache` keeps nothing of such a loader. Here
    samples of about one length share their batches, and all that may share one are padded to the longest of
    them, in every epoch. That is also less padding than random batches have.

    How to pad is left to the collate function: it gets the longest samples of a length beside those of the
    batch, and their rows are dropped again. Texts, pairs of source and target, and images with masks are the
    same to it. Every sample is loaded once when this is called.

    The order is a function of `seed` and the epoch. It is shuffled if the given loader shuffled; otherwise it
    goes from the shortest samples to the longest, so what a model predicts is not in the order of the data
    set. In several processes each takes the share that the given loader took.

    Args:
        loader: over a map-style data set, in torch's random or sequential order; as it is, or as Accelerate
            has prepared it: then so is what is returned. In several processes prepare it before; Accelerate
            fills the last batch up with samples of any length.
        seed: of the order.

    Returns:
        A loader with batch size, workers and ``drop_last`` of the given one; that one itself if all samples
        have one shape.

    Raises:
        DataError: the loader draws in a way of its own, is no map-style one, or its collate function makes
            something of samples that cannot be cut into rows.
    """
    given = inner(loader)
    batch_size, drop_last, shuffle, rank, world = _way(given)
    data: Any = given.dataset
    collate: Callable[[list[Any]], Any] = given.collate_fn
    with kept_random_state():
        shapes = [_shape(collate([data[index]])) for index in range(len(data))]
        if len(set(shapes)) == 1:
            return loader
        ragged = _ragged(shapes)
        sizes = [sum(shape[position] for position in ragged) for shape in shapes]
        order = _Epochs(
            len(shapes),
            batch_size,
            seed=seed,
            shuffle=shuffle,
            lengths=sizes,
            drop_last=drop_last,
            rank=rank,
            world=world,
        )
        assert order.padded is not None
        longest = {}
        for one in set(order.padded):
            members = [index for index, padded in enumerate(order.padded) if padded == one]
            longest[one] = sorted({max(members, key=lambda i: shapes[i][position]) for position in ragged})
        padding = functools.partial(_collate, collate, _Longest(data, longest))
        with_length = _WithLength(data, order.padded)
        for one, fillers in longest.items():
            _check(padding, with_length, [order.padded.index(one), *fillers])
        for position in ragged:
            by_size = sorted(range(len(shapes)), key=lambda index: shapes[index][position])
            _check_order(collate, data, by_size[0], by_size[-1])
    made = ByLength(
        with_length,
        batch_sampler=order,
        collate_fn=padding,
        num_workers=given.num_workers,
        pin_memory=given.pin_memory,
        timeout=given.timeout,
        worker_init_fn=given.worker_init_fn,
        multiprocessing_context=given.multiprocessing_context,
        generator=given.generator,
        prefetch_factor=given.prefetch_factor,
        persistent_workers=given.persistent_workers,
    )
    return made if given is loader else cast("DataLoader[Any]", reading(loader, made))


class _Epochs(EpochBatches):
    """`EpochBatches` that go on to the next epoch by themselves."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        self.set_epoch(self.epoch + 1)
        yield from batches


class _WithLength(Dataset[Any]):
    """Samples, each with the length that it is padded to."""

    def __init__(self, data: Any, padded: Sequence[int]) -> None:
        self.data, self.padded = data, padded

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[index], self.padded[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        read = getattr(self.data, "__getitems__", None)
        samples = read(indices) if read else [self.data[index] for index in indices]
        return [(sample, self.padded[index]) for sample, index in zip(samples, indices)]

    def __len__(self) -> int:
        return len(self.data)

    def is_same_as(self, other: _WithLength) -> bool:
        """Return whether another one is known to give the same samples."""
        return is_same_data(self.data, other.data) and self.padded == other.padded


class _Longest:
    """The longest samples of each length.

    Args:
        data: the samples.
        longest: for each length, the indices of the samples that give it.
    """

    def __init__(self, data: Any, longest: dict[int, list[int]]) -> None:
        self.data, self.longest = data, longest

    def of(self, lengths: Iterable[int]) -> list[Any]:
        """Return those of some lengths."""
        return [self.data[index] for length in sorted({*lengths}) for index in self.longest[length]]

    def is_same_as(self, other: _Longest) -> bool:
        """Return whether others are known to be the same samples."""
        return is_same_data(self.data, other.data) and self.longest == other.longest


def _collate(collate: Callable[[list[Any]], Any], longest: _Longest, items: list[tuple[Any, int]]) -> Any:
    """Return a batch that is padded to the length of its samples, by a function that pads to the longest.

    Raises:
        DataError: the function left samples out.
    """
    samples = [*(sample for sample, _ in items), *longest.of(length for _, length in items)]
    batch = collate(samples)
    if any(len(tensor) != len(samples) for tensor in tensors_in(batch)):
        shapes = [tuple(tensor.shape) for tensor in tensors_in(batch)]
        raise DataError(
            f"the collate function makes tensors of the shapes {shapes} of {len(samples)} samples; expected "
            f"{len(samples)} rows. Leave samples out in the data set, by torch.utils.data.Subset."
        )
    return map_tensors(batch, lambda tensor: tensor[: len(items)])


def _way(loader: Any) -> tuple[int, bool, bool, int, int]:
    """Return batch size, ``drop_last``, whether it shuffles, and number and count of the sharing processes.

    Raises:
        DataError: the samples are drawn otherwise.
    """
    is_plain = getattr(type(loader), "__iter__", None) is DataLoader.__iter__
    if not is_plain or isinstance(loader.dataset, IterableDataset):
        kind = named_kind(loader.dataset if is_plain else loader)
        raise DataError(f"by_length got {kind}; expected a torch DataLoader over a map-style data set.")
    batches: Any = loader.batch_sampler
    rank, world, parts = 0, 1, 1
    if hasattr(batches, "process_index"):  # of Accelerate, around the loader's own
        rank, world = batches.process_index, batches.num_processes
        parts = world if batches.split_batches else 1
        batches = batches.batch_sampler
    sampler: Any = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return batches.batch_size, batches.drop_last, sampler.shuffle, sampler.rank, sampler.num_replicas
    if not isinstance(sampler, RandomSampler | SequentialSampler):
        kind = named_kind(batches if sampler is None else sampler)
        raise DataError(
            f"by_length makes batches itself, and this loader's are made by {kind}; expected torch's "
            f"random or sequential order. Give it DataLoader(data, batch_size, shuffle=True, collate_fn=...)."
        )
    return batches.batch_size // parts, batches.drop_last, isinstance(sampler, RandomSampler), rank, world


def _shape(batch: Any) -> Shape:
    """Return the shape of the one sample of a batch.

    Raises:
        DataError: the batch cannot be cut into rows.
    """
    tensors = tensors_in(batch)
    for tensor in tensors:
        if not tensor.dim() or len(tensor) != 1:
            raise DataError(
                f"the collate function makes a tensor of the shape {tuple(tensor.shape)} of one sample; "
                f"expected (1, ...): the first dimension of all must count samples."
            )
    _refuse_lists(batch, outermost=True)
    return tuple(size for tensor in tensors for size in tensor.shape[1:])


def _refuse_lists(part: Any, *, outermost: bool = False) -> None:
    """Raise DataError if a batch holds something of each sample that is no tensor."""
    is_list = isinstance(part, tuple | list | np.ndarray)
    if is_list and not outermost and not tensors_in(part):
        raise DataError(
            f"the collate function makes {named_kind(part)} of one sample, {part!r:.60}; expected "
            f"tensors. Leave out what the model does not need."
        )
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, tuple | list) else ()
    for one in parts:
        _refuse_lists(one)


def _ragged(shapes: Sequence[Shape]) -> list[int]:
    """Return at which positions the shapes differ.

    Raises:
        DataError: some have more dimensions than others.
    """
    if len({len(shape) for shape in shapes}) > 1:
        other = next(index for index, shape in enumerate(shapes) if len(shape) != len(shapes[0]))
        raise DataError(
            f"samples 0 and {other} are collated into tensors of other numbers of dimensions, {shapes[0]} "
            f"and {shapes[other]}; expected the same, with other lengths."
        )
    return [position for position, sizes in enumerate(zip(*shapes)) if len(set(sizes)) > 1]


def _check(padding: Callable[[Any], Any], data: _WithLength, indices: list[int]) -> None:
    """Raise DataError unless samples of one length are padded to one shape."""
    shapes = {index: _shape(padding([data[index]])) for index in indices}
    if len(set(shapes.values())) > 1:
        one, other = indices[0], next(i for i in indices if shapes[i] != shapes[indices[0]])
        raise DataError(
            f"beside the longest of their length, samples {one} and {other} are collated into the shapes "
            f"{shapes[one]} and {shapes[other]}; expected one shape: the collate function must pad all "
            f"samples of a batch to the longest."
        )


def _check_order(collate: Callable[[list[Any]], Any], data: Any, least: int, most: int) -> None:
    """Raise DataError if a collate function sorts the samples of a batch, of which the last are dropped."""
    made = []
    for order in ([least, most], [most, least]):
        seed_everything(0)
        made.append(tensors_in(collate([data[index] for index in order])))
    if all(map(torch.equal, *made)):
        raise DataError(
            f"the collate function makes the same batch of the samples {least} and {most} in either order; "
            f"expected rows in the order of the samples. Sort them in the model, or in the loop "
            f"(pack_padded_sequence has enforce_sorted=False)."
        )
