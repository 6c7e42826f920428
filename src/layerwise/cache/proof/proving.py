"""`prove`: find out on one batch how values are made of samples, and that no sample needs the others.

Some of the batch's samples are loaded and computed again, in other places of a batch of another size and
under other seeds. What comes of it must be the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerwise.cache.comparing import same_bits
from layerwise.cache.cutting.cut import Cut, Values
from layerwise.cache.proof.evenness import OTHER_ORDER, OpLog, uneven_places
from layerwise.cache.proof.mixing import (
    PlaceError,
    at_other_places,
    check_companions,
    compare_skeletons,
    find_layouts,
    size_sensitive,
)
from layerwise.cache.replay.capturing import Captured
from layerwise.cache.replay.link import Link
from layerwise.cache.samples.feed import Feed
from layerwise.errors import CacheError

_COLLATED = "a sample of a batch depends on the other samples that are collated with it."


def prove(
    feed: Feed,
    link: Link,
    cuts: list[Cut],
    found: Captured,
    log: OpLog,
    indices: Sequence[int],
    leaves: Sequence[torch.Tensor],
    run_prefix: Callable[..., Captured],
    *,
    exact: bool,
) -> None:
    """Note in `feed` the layouts of some cuts' values, and where their bits hold.

    Args:
        feed: whose samples.
        link: how the model is called.
        cuts: of this phase, and of later ones.
        found: what the prefix gave for the whole batch; gets the layouts of its skeletons.
        log: of such a pass.
        indices: of the batch's samples.
        leaves: the batch's tensors.
        run_prefix: `layerwise.cache.frozen.FrozenPart.run`.
        exact: keep values whose last bits depend on the place in the batch only for that place.

    Raises:
        MixedError: a value cannot be taken apart into samples, or depends on the other samples.
        CacheError: the values are random, or cannot be known for other reasons.
    """
    if exact and log.packing:
        raise CacheError(
            f"the frozen part lays the samples of a batch end to end, without their padding ({log.packing}), "
            f"so that last bits of one depend on the lengths of the others. Make nn.TransformerEncoder with "
            f"enable_nested_tensor=False, do not pack sequences, or pass exact=False."
        )
    count = len(indices)
    part_leaves, chosen = _loaded_again(feed, indices, leaves)
    part_count = len(part_leaves[0])
    part_log = OpLog()
    part = run_prefix(
        link, cuts, link.build(part_leaves), batch=part_count, skeletons=True, seed=1, log=part_log
    )
    compare_skeletons(found.skeletons, part.skeletons)
    sites = dict.fromkeys(site for cut in cuts for site in cut.frontier)
    constants = dict.fromkeys(site for cut in cuts for site in cut.constants)
    for site in (*sites, *constants):
        if site not in found.values or site not in part.values:
            raise CacheError(f"{site} is not reached each time the model runs.")
    for site in constants:
        if not same_bits(found.values[site], part.values[site]):
            raise CacheError(
                f"the value at {site} differs from batch to batch, although no operation that torch sees "
                f"links it to the input (numpy?)."
            )
    layouts = find_layouts(sites, found.values, count, part.values, part_count, chosen)
    feed.layouts |= layouts

    def in_rows(values: Values) -> Values:
        return {site: layout.to_rows(values[site]) for site, layout in layouts.items()}

    def run_batch(again: list[torch.Tensor], seed: int) -> Values:
        return run_prefix(link, cuts, link.build(again), batch=len(again[0]), seed=seed).values

    def run(positions: list[int], seed: int) -> Values:
        values = run_batch([leaf[positions] for leaf in leaves], seed)
        for site in layouts:
            if site not in values:
                raise CacheError(f"{site} runs for some samples of a batch and not for others.")
        return in_rows(values)

    seen = {site: rows[: len(chosen)] for site, rows in in_rows(part.values).items()}
    place, sensitive = "", True
    try:
        sensitive = size_sensitive(in_rows(found.values), seen, chosen, run, indices)
    except PlaceError as error:
        place = str(error)
    few = [leaf[: len(chosen)] for leaf in part_leaves]
    check_companions(layouts, seen, few, () if log.foreign else link.leaves, run_batch)
    if not exact:
        feed.sizes = None
        return
    within, between = ("", "") if place else uneven_places(log.runs, count, part_log.runs, part_count)
    if between == OTHER_ORDER and count > 1:  # torch multiplies one sample otherwise
        twice, twice_log = [torch.cat([leaf, leaf]) for leaf in leaves], OpLog()
        run_prefix(link, cuts, link.build(twice), batch=2 * count, log=twice_log)
        within, again = uneven_places(log.runs, count, twice_log.runs, 2 * count)
        if again == OTHER_ORDER:  # in pieces of so many samples: what is not tried is not proved
            within = within or next((str(run.function) for run in log.runs if run.is_by_sample), "")
    if place or within:
        feed.keep_places(place or within, count)
    else:
        feed.keep_sizes({count} if sensitive or between else {count, part_count})


def _loaded_again(
    feed: Feed, indices: Sequence[int], leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[int]]:
    """Return some of the batch's samples, loaded once more, and which positions of the batch they are.

    A sample that is a batch by itself gets another one beside it, which is not of the batch.

    Raises:
        CacheError: they are not the same this time, or one of them is not when it is collated with itself.
    """
    chosen = _positions(feed, len(indices)) if len(indices) > 1 else [0]
    beside = [feed.neighbour(indices[0])] if len(indices) == 1 else []
    drawn = [leaf[chosen] for leaf in leaves]
    if feed.views > 1 and not beside:  # each loading draws anew
        return drawn, chosen
    with feed.reader.unaffected():
        batch = feed.reader.load_now([indices[position] for position in chosen] + beside)
    again = feed.shape.check(batch, len(chosen) + len(beside))
    if feed.views > 1:
        return [torch.cat([leaf, part[1:]]) for leaf, part in zip(drawn, again)], chosen
    if feed.shape.has_other_values(batch):
        feed.reload = True  # per-sample values that are not tensors (names, strings)
    if not all(same_bits(leaf, part[: len(chosen)]) for leaf, part in zip(drawn, again)):
        raise CacheError(_COLLATED)
    for copies in (2, 3):  # however often its label was counted so far, it is another number now
        with feed.reader.unaffected():
            batch = feed.reader.load_now([indices[chosen[0]]] * copies)
        if not all(map(same_bits, feed.shape.check(batch, copies), (leaf[[0] * copies] for leaf in drawn))):
            raise CacheError(_COLLATED)
    return again, chosen


def _positions(feed: Feed, count: int) -> list[int]:
    """Return the positions to compute on their own: as many as the last, smaller batch has, else two.

    They are the last ones of the batch, at other places. A batch of one is avoided where the data do not
    make one: a batch-norm that learns cannot train on it.
    """
    backwards = at_other_places(range(count))
    tail = feed.size % count
    if tail and not getattr(feed.reader.loader.batch_sampler, "drop_last", False):
        return backwards[:tail]
    return backwards[:2] if count > 2 else [*backwards, backwards[0]]
