"""Batches of texts of like length: less padding, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, *, window: int = 50
) -> list[list[int]]:
    """Return batches of samples of like length that still come in a random order.

    A random order is cut into windows of ``window * batch_size`` samples; each is sorted by length and
    cut into batches, and the batches of a window are put back in the order in which their first samples
    stood. So samples meet others of their length, and different ones each epoch. The longest batch of
    all comes first: if it does not fit into memory, that shows at once.

    Args:
        order: a random permutation of sample indices (or part of one); not changed.
        lengths: of all samples, by index, in tokens.
        batch_size: samples in a batch; the last one of the last window may be smaller.
        window: batches that are sorted together; 1 leaves the order as it is.

    Returns:
        Batches that hold each index of `order` once.

    >>> group_by_length([3, 0, 2, 1], lengths=[9, 1, 8, 2], batch_size=2)
    [[0, 2], [3, 1]]
    """
    size = window * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), size):
        inside = order[start : start + size]
        place = {index: position for position, index in enumerate(inside)}
        by_length = sorted(inside, key=lambda index: -lengths[index])
        cut = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
        partial = cut.pop() if len(cut[-1]) < batch_size else None
        cut.sort(key=lambda batch: place[batch[0]])
        batches += [*cut, *([partial] if partial else [])]
    if batches:
        longest = max(range(len(batches)), key=lambda at: max(lengths[index] for index in batches[at]))
        batches[0], batches[longest] = batches[longest], batches[0]
    return batches


class LengthGroupedBatches(Sampler[list[int]]):
    """A batch sampler for `torch.utils.data.DataLoader` that groups samples by length.

    The order of an epoch is a function of the seed and the epoch alone, so it can be begun anywhere.

    Args:
        lengths: of all samples, in tokens.
        batch_size: samples in a batch.
        seed: of the order.
        shuffle: False sorts all samples by length, longest first, in every epoch.
        window: batches that are sorted together; see `group_by_length`.

    >>> batches = LengthGroupedBatches([5, 9, 4, 8], 2, seed=1)
    >>> sorted(map(sorted, batches))
    [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 50,
    ) -> None:
        self.lengths, self.batch_size, self.seed = tuple(lengths), batch_size, seed
        self.shuffle, self.window = shuffle, window
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration goes through, and its first batch."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.lengths)
        if self.shuffle:
            # Spread over the seeds, so that seed 0 epoch 1 is not seed 1 epoch 0.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order: list[int] = torch.randperm(count, generator=generator).tolist()
            batches = group_by_length(order, self.lengths, self.batch_size, window=self.window)
        else:
            batches = group_by_length(range(count), self.lengths, self.batch_size, window=max(count, 1))
        yield from batches[self.start :]

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)
