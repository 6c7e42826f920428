"""Prove on one batch that a cut is exact: samples do not touch each other, nothing is secretly random."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from layerwise.cache.comparing import is_near, same_bits
from layerwise.cache.cutting.cut import CallId, Site
from layerwise.cache.replay.capturing import Skeleton
from layerwise.cache.replay.layout import Layout, find_layout
from layerwise.errors import CacheError
from layerwise.layers.structures import map_tensors, tensors_in

_TELLING = 256  # numbers of each value to compare: two routines round only some of them differently


class PlaceError(CacheError):
    """A sample's last bits depend on its place in the batch: in another order the plain loop differs too."""


class MixedError(CacheError):
    """The value at a site depends on several samples of the batch."""

    def __init__(self, message: str, site: Site) -> None:
        super().__init__(message)
        self.site = site


Run = Callable[[list[int], int], Mapping[Site, torch.Tensor]]
"""Runs the prefix on some samples of the batch (by position), under a seed; returns values by site."""


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
        if not _same_constants(skeleton.output, twin.output):
            raise CacheError(
                f"{where} holds a number that depends on the batch size, or what cannot be compared."
            )
        skeleton.layouts = [find_layout(a, skeleton.batch, b, twin.batch, where=where) for a, b in pairs]


def _same_constants(one: Any, other: Any) -> bool:
    """Whether two structures are equal, their tensors left aside."""
    blank = [map_tensors(structure, lambda tensor: None) for structure in (one, other)]
    try:
        return bool(blank[0] == blank[1])
    except (RuntimeError, ValueError, TypeError):  # objects without a usable equality
        return False


def find_layouts(
    sites: Iterable[Site],
    full: Mapping[Site, torch.Tensor],
    batch: int,
    part: Mapping[Site, torch.Tensor],
    part_batch: int,
    chosen: list[int],
) -> dict[Site, Layout]:
    """Return how each site's value is made of samples, from two batch sizes.

    Args:
        sites: where.
        full: values of a whole batch.
        batch: its number of samples.
        part: values of some samples.
        part_batch: their number.
        chosen: positions in the batch of the first of them.

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
        apart = dataclasses.replace(layout, apart=True)
        if layout.per_sample > 1 and not _fits(layout, full[site], part[site], chosen):
            layout = apart if _fits(apart, full[site], part[site], chosen) else layout
        layouts[site] = layout
    return layouts


def _fits(layout: Layout, full: torch.Tensor, part: torch.Tensor, chosen: list[int]) -> bool:
    return is_near(layout.to_rows(full)[chosen], layout.to_rows(part)[: len(chosen)])


def size_sensitive(
    layouts: Mapping[Site, Layout],
    full: Mapping[Site, torch.Tensor],
    batch: int,
    part: Mapping[Site, torch.Tensor],
    chosen: list[int],
    run: Run,
    indices: Sequence[int],
) -> bool:
    """Return whether a sample's bits depend on how many samples are computed with it.

    Compares the values of a whole batch with those of some of its samples, which were computed on their
    own, in another order and under another seed. Equal bits prove that no sample reads another, that the
    place in the batch does not matter, and that nothing draws random numbers that the recording cannot
    see (numpy's, Python's). Where these samples have few numbers (a pooled vector of a last, small batch),
    equal bits can be luck: others of the batch are then computed in the same number. Differences that are
    only rounding are traced to the batch size: the whole batch, in another order and under yet another seed,
    must give the same bits.

    Args:
        layouts: of the sites to compare.
        full: values of the whole batch.
        batch: its number of samples.
        part: values of the samples `chosen`, computed on their own.
        chosen: positions in the batch.
        run: to compute more.
        indices: of the batch's samples in the data set: one that stands in it twice tells nothing new.

    Raises:
        PlaceError: their last bits depend on the place in the batch.
        MixedError: the values depend on the other samples.
        CacheError: they are random.
    """
    unequal = _unequal(layouts, full, chosen, part)
    compared, rest = list(chosen), [position for position in range(batch) if position not in chosen]
    size = len(chosen)
    while not unequal and len(rest) >= size and _few_numbers(layouts, full, _distinct(compared, indices)):
        rest = at_other_places(rest)
        chosen, rest = rest[:size], sorted(rest[size:])
        part = run(chosen, 1)
        unequal = _unequal(layouts, full, chosen, part)
        compared += chosen
    if not unequal:
        return False
    everything = list(range(batch))
    other = at_other_places(everything)
    moved = _unequal(layouts, full, other, run(other, 3))
    again = run(everything, 2) if moved else full
    for site in moved:
        if not same_bits(full[site], again[site]):
            raise CacheError(
                f"the value at {site} differs when the same batch is computed again: the frozen part draws "
                f"random numbers that torch does not know of (numpy's or Python's)."
            )
    for site in unequal:
        layout = layouts[site]
        if not is_near(layout.to_rows(full[site])[chosen], layout.to_rows(part[site])):
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


def _unequal(
    layouts: Mapping[Site, Layout],
    full: Mapping[Site, torch.Tensor],
    positions: list[int],
    part: Mapping[Site, torch.Tensor],
) -> list[Site]:
    """Return the sites at which samples of the batch have other bits than `part`, computed from them."""
    return [
        site
        for site, layout in layouts.items()
        if not same_bits(layout.to_rows(full[site])[positions], layout.to_rows(part[site]))
    ]


def _distinct(positions: list[int], indices: Sequence[int]) -> list[int]:
    return list({indices[position]: position for position in positions}.values())


def _few_numbers(
    layouts: Mapping[Site, Layout], full: Mapping[Site, torch.Tensor], positions: list[int]
) -> bool:
    """Return whether some site has too few numbers at these positions; zeros have no bits to differ in."""
    return any(
        full[site].is_floating_point() and int((layout.to_rows(full[site])[positions] != 0).sum()) < _TELLING
        for site, layout in layouts.items()
    )
