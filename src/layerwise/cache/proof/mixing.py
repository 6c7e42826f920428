"""Prove on one batch that a cut is exact: samples do not touch each other, nothing is secretly random."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch

from layerwise.cache.comparing import is_near, same_bits, same_but_for_tensors
from layerwise.cache.cutting.cut import CallId, Site, Values
from layerwise.cache.replay.capturing import Skeleton
from layerwise.cache.replay.layout import Layout, find_layout
from layerwise.errors import CacheError
from layerwise.layers.structures import tensors_in

logger = logging.getLogger("layerwise.cache")

_TELLING = 256  # numbers of each value to compare: two routines round only some of them differently
_LARGE = 1e4  # times what a sample holds
_FIRST, _LAST, _MISSING, _HUGE = range(4)
_ONE_BATCH = (_FIRST, _LAST, _MISSING, _HUGE)
_OTHER_BATCH = (_MISSING, _FIRST, _FIRST, _FIRST)


class PlaceError(CacheError):
    """A sample's last bits depend on its place in the batch: in another order the plain loop differs too."""


class MixedError(CacheError):
    """The value at a site depends on several samples of the batch."""

    def __init__(self, message: str, site: Site) -> None:
        super().__init__(message)
        self.site = site


Run = Callable[[list[int], int], Values]
"""Runs the prefix on some samples of the batch (by position), under a seed; returns rows by site."""


def compare_skeletons(one: Mapping[CallId, Skeleton], other: Mapping[CallId, Skeleton]) -> None:
    """Fill in the layouts of `one` from what the same calls returned at another batch size.

    Raises:
        CacheError: an output is not made of samples side by side, or holds a number that depends on the
            batch size.
    """
    for call, skeleton in one.items():
        twin = other.get(call)
        if twin is None:
            raise CacheError(f"{call.path} runs at one batch size and not at another.")
        where = f"the output of {call.path}"
        pairs = list(zip(tensors_in(skeleton.output), tensors_in(twin.output)))
        if len(tensors_in(twin.output)) != len(tensors_in(skeleton.output)):
            raise CacheError(f"{where} has a different structure at another batch size.")
        if not same_but_for_tensors(skeleton.output, twin.output):
            raise CacheError(
                f"{where} holds a number that depends on the batch size, or what cannot be compared."
            )
        skeleton.layouts = [find_layout(a, skeleton.batch, b, twin.batch, where=where) for a, b in pairs]


def find_layouts(
    sites: Iterable[Site], full: Values, batch: int, part: Values, part_batch: int, chosen: list[int]
) -> dict[Site, Layout]:
    """Return how each site's value is made of samples, from two batch sizes.

    Of the `part_batch` samples behind `part` the first stand at the positions `chosen` in the whole batch.

    Raises:
        MixedError: a value does not grow with the batch although it depends on the input, or is not made
            of samples side by side.
    """
    layouts = {}
    for site in sites:
        try:
            layout = find_layout(full[site], batch, part[site], part_batch, where=f"the value at {site}")
        except CacheError as error:
            raise MixedError(str(error), site) from error
        if layout is None:
            raise MixedError(
                f"the value at {site} depends on the input and has the shape {tuple(full[site].shape)} for "
                f"{batch} and for {part_batch} samples: it mixes the samples of a batch.",
                site,
            )
        rows, part_rows = layout.to_rows(full[site]), layout.to_rows(part[site])
        if layout.per_sample > 1 and not is_near(rows[chosen], part_rows[: len(chosen)]):
            layout = dataclasses.replace(layout, apart=True)  # if that is wrong, too, samples are mixed
        layouts[site] = layout
    return layouts


def size_sensitive(full: Values, part: Values, chosen: list[int], run: Run, indices: Sequence[int]) -> bool:
    """Return whether a sample's bits depend on how many samples are computed with it.

    Compares the values of a whole batch with those of some of its samples, which were computed on their
    own, in another order and under another seed. Equal bits prove that no sample reads another, that the
    place in the batch does not matter, and that nothing draws random numbers that the recording cannot
    see (numpy's, Python's). Where these samples have few numbers (a pooled vector of a last, small batch),
    equal bits can be luck: others of the batch are then computed in the same number. Differences that are
    only rounding are traced to the batch size: the whole batch, in another order and under yet another seed,
    must give the same bits.

    Args:
        full: values of the whole batch, as rows (`Layout.to_rows`); so are all others.
        part: values of the samples `chosen`, computed on their own.
        chosen: positions in the batch.
        run: to compute more.
        indices: of the batch's samples in the data set: one that stands in it twice tells nothing new.

    Raises:
        PlaceError: their last bits depend on the place in the batch.
        MixedError: the values depend on the other samples.
        CacheError: they are random.
    """
    unequal = _unequal(full, chosen, part)
    everything = list(range(len(indices)))
    compared, rest = list(chosen), [position for position in everything if position not in chosen]
    size = len(chosen)
    while not unequal and len(rest) >= size and _few_numbers(full, compared, indices):
        rest = at_other_places(rest)
        chosen, rest = rest[:size], sorted(rest[size:])
        part = run(chosen, 1)
        unequal = _unequal(full, chosen, part)
        compared += chosen
    if not unequal:
        return False
    other = at_other_places(everything)
    moved = _unequal(full, other, run(other, 3))
    again = run(everything, 2) if moved else full
    for site in moved:
        if not same_bits(full[site], again[site]):
            raise CacheError(
                f"the value at {site} differs when the same batch is computed again: the frozen part draws "
                f"random numbers that torch does not know of (numpy's or Python's)."
            )
    for site in unequal:
        if not is_near(full[site][chosen], part[site]):
            raise MixedError(
                f"the value at {site} of one sample depends on the other samples of its batch.", site
            )
    if moved:
        raise PlaceError(f"the value at {moved[0]}")
    return True


def at_other_places(positions: Sequence[int]) -> list[int]:
    """Return ascending positions backwards, and so that odd ones get even places and even ones odd places.

    Kernels treat the last rows of a matrix in another way, or every second one, by where it lies in memory.

    >>> at_other_places(range(4)), at_other_places(range(5))
    ([3, 2, 1, 0], [3, 4, 1, 2, 0])
    """
    odd, even = ([position for position in positions[::-1] if position % 2 == rest] for rest in (1, 0))
    paired = [position for pair in zip(odd, even) for position in pair]
    return paired + odd[len(even) :] + even[len(odd) :]


def _unequal(full: Values, positions: list[int], part: Values) -> list[Site]:
    """Return the sites at which samples of the batch have other bits than `part`, computed from them."""
    return [site for site, rows in full.items() if not same_bits(rows[positions], part[site])]


def _few_numbers(full: Values, positions: list[int], indices: Sequence[int]) -> bool:
    """Return whether some site has too few numbers at these positions; zeros have no bits to differ in."""
    distinct = list({indices[position]: position for position in positions}.values())
    return any(
        rows.is_floating_point() and int((rows[distinct] != 0).sum()) < _TELLING for rows in full.values()
    )


def check_companions(
    layouts: Mapping[Site, Layout],
    known: Values,
    leaves: Sequence[torch.Tensor],
    strange: Container[int | None],
    run: Callable[[list[torch.Tensor], int], Values],
) -> None:
    """Compute some samples beside strange ones, and compare; last bits do not count.

    Some operations mix samples for some inputs only: an expert passes over tokens once it is full, a missing
    value is filled with the batch's mean, a batch is scaled down where a number in it is large. The first
    batch need not show it. So there are copies of a sample beside it, a sample of missing values (NaN) and
    one of large numbers. The compiled code of other libraries than torch need not survive such numbers
    (torchvision's deformable convolution reads at a place that it computes of a NaN): where it runs, there
    are only the copies.

    Args:
        layouts: of the sites to compare.
        known: what the sites hold for some samples, as rows.
        leaves: the tensors of these samples.
        strange: numbers of those tensors in which there may be other numbers than the data's.
        run: gives the values for other samples, under a seed.

    Raises:
        MixedError: a sample's values depend on its companions.
    """
    kinds = [
        _kinds(leaf) if number in strange else leaf[[0, -1, 0, -1]] for number, leaf in enumerate(leaves)
    ]
    try:
        one, other = (run([kind[list(batch)] for kind in kinds], 4) for batch in (_ONE_BATCH, _OTHER_BATCH))
    except CacheError:
        raise
    except Exception as error:  # a model may refuse such samples, and then need not be asked
        logger.debug("prefix cache: strange samples were not computed: %s", error)
        return
    for site, layout in layouts.items():
        if site not in one or site not in other:
            continue  # with such samples the model takes another way
        first, last = known[site][0], known[site][-1]
        rows, other_rows = layout.to_rows(one[site]), layout.to_rows(other[site])
        pairs = [(rows[0], first), (rows[1], last), (rows[2], other_rows[0])]
        pairs += [(row, first) for row in other_rows[1:]]
        if not all(is_near(a, b) for a, b in pairs):
            raise MixedError(
                f"the value at {site} of one sample depends on the other samples of its batch: not in the "
                f"first batch, but beside copies of itself, or samples that hold NaN or large numbers.",
                site,
            )


def _kinds(leaf: torch.Tensor) -> torch.Tensor:
    """Return four samples: the first, the last, one of missing values, one of large numbers."""
    kinds = leaf[[0, -1, 0, -1]].clone()
    if kinds.is_floating_point():
        kinds[_MISSING] = float("nan")
        kinds[_HUGE] *= _LARGE
    return kinds
