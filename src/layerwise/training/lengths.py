"""Samples of about one length together: which lengths to pad to, and batches that hold one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLE = 8  # tokens: lengths that kernels like, and few different ones
_MOST = 8  # lengths
_LEAST_BATCHES = 2  # of one length, so that the samples of a batch differ from epoch to epoch
_POSITIONS = 64  # places between two lengths that are weighed


def padded_lengths(
    lengths: Sequence[int],
    batch_size: int,
    *,
    multiple: int = _MULTIPLE,
    most: int = _MOST,
    least_batches: int = _LEAST_BATCHES,
) -> list[int]:
    """Return to how many tokens each sample is padded: the same in every epoch, and few different lengths.

    Sorted by length, samples are cut into runs of whole batches, each padded to its longest sample. Cuts lie
    `least_batches` apart or a multiple of that (of many batches, at 64 places). Of all such cuts those are
    taken that leave the fewest tokens, those of one more batch of each length counted in, which is about what
    the prefix cache spends on looking at it. The samples that make no whole batch are the shortest ones.

    Args:
        lengths: of the samples, in tokens.
        batch_size: samples in a batch.
        multiple: lengths are rounded up to a multiple of it, but not above the longest sample.
        most: different lengths at most.
        least_batches: batches of one length at least.

    >>> padded_lengths([3, 60, 5, 9, 58, 30, 8, 33], 2, least_batches=1)
    [16, 60, 16, 16, 60, 60, 16, 60]
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    longest = max(lengths, default=0)
    batches, rest = divmod(len(lengths), batch_size)
    step = max(least_batches, -(-batches // _POSITIONS))
    ends = [rest + number * batch_size for number in range(step, batches - least_batches + 1, step)]
    ends = [0, *ends, len(lengths)]

    def width(end: int) -> int:  # of a run that ends there
        return min(-(-lengths[order[end - 1]] // multiple) * multiple, longest) if end else 0

    # best[k][e]: (tokens, where the last run begins) for the samples up to ends[e] in k runs.
    best = [{0: (0, 0)}]
    for _ in range(min(most, len(ends) - 1)):
        found: dict[int, tuple[int, int]] = {}
        for end in range(1, len(ends)):
            tokens = width(ends[end])
            options = [
                (before + (ends[end] - ends[start] + batch_size) * tokens, start)
                for start, (before, _) in best[-1].items()
                if start < end
            ]
            if options:
                found[end] = min(options)
        best.append(found)
    last = len(ends) - 1
    runs = min((k for k in range(1, len(best)) if last in best[k]), key=lambda k: best[k][last][0], default=0)
    padded = [0] * len(lengths)
    end = last
    for k in range(runs, 0, -1):
        start = best[k][end][1]
        for index in order[ends[start] : ends[end]]:
            padded[index] = width(ends[end])
        end = start
    return padded


def order_by_length(
    padded: Sequence[int], batch_size: int, generator: torch.Generator | None, weights: Tensor | None = None
) -> list[int]:
    """Return the samples in an order of which every `batch_size` neighbours are padded to one length.

    Samples are shuffled within their length, and the batches of all lengths are shuffled. What is left over
    of a length comes at the end; with `padded_lengths` that is one batch of the shortest.

    Args:
        padded: length that each sample is padded to; all but the shortest shared by whole batches.
        batch_size: samples in a batch.
        generator: shuffles; None goes from the shortest to the longest, in the order of the data set.
        weights: float64[samples]: draw with replacement. Each batch draws its length by the weights of the
            samples that have it, and then its samples, so that every sample is drawn as often as its weight
            says.
    """
    groups = [[i for i, length in enumerate(padded) if length == one] for one in sorted(set(padded))]
    if weights is not None:
        assert generator is not None
        totals = torch.stack([weights[group].sum() for group in groups])
        order: list[int] = []
        while len(order) < len(padded):
            group = groups[int(torch.multinomial(totals, 1, generator=generator))]
            count = min(batch_size, len(padded) - len(order))
            drawn = torch.multinomial(weights[group], count, replacement=True, generator=generator)
            order += [group[i] for i in drawn.tolist()]
        return order
    batches, left = [], []
    for group in groups:
        if generator is not None:
            group = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        rest = len(group) % batch_size
        left += group[:rest]
        batches += [group[i : i + batch_size] for i in range(rest, len(group), batch_size)]
    numbers = list(range(len(batches)))
    if generator is not None:
        numbers = torch.randperm(len(batches), generator=generator).tolist()
    return [index for number in numbers for index in batches[number]] + left
