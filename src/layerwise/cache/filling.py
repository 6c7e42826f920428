"""The recording pass on its own: the frozen prefix of all samples, without training.

Two things may make it faster than the same work in the first epoch: batches of another size, and
batch-norms that are folded into convolutions. Each is tried on one batch first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident

import torch

from layerwise.cache.comparing import same_bits
from layerwise.cache.cutting.cut import Cut, Values
from layerwise.cache.folding import FOLD_TOLERANCE, Folding, find_pairs, relative_difference
from layerwise.cache.frozen import FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.proof.evenness import OpLog, uneven_places
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.supply import Supply
from layerwise.errors import CacheError
from layerwise.layers.recording import record
from layerwise.layers.structures import tensors_in


@dataclass(frozen=True)
class Filled:
    """What a recording pass did.

    Attributes:
        samples: that were computed, views counted.
        batch_size: of its batches.
        folded: number of batch-norms that were folded into convolutions.
        difference: largest difference of folded values from plain ones on the first batch, relative to
            the largest number of each value; 0.0 where nothing was folded.
        notes: what was asked for and not done, and why.
    """

    samples: int
    batch_size: int
    folded: int = 0
    difference: float = 0.0
    notes: tuple[str, ...] = ()


def total(parts: Sequence[Filled]) -> Filled:
    """Return what was done for samples of several shapes as one."""
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Filled(
        sum(part.samples for part in parts),
        max(part.batch_size for part in parts),
        max(part.folded for part in parts),
        max(part.difference for part in parts),
        tuple(notes),
    )


@dataclass(frozen=True)
class Filling:
    """A recording pass over the samples of one feed.

    Attributes:
        frozen: computes samples.
        supply: the loader.
        feed: of those of its samples that are to be computed.
        phase: under way, and verified: the values of its cut are computed, and those of later phases for
            which there is room.
    """

    frozen: FrozenPart
    supply: Supply
    feed: Feed
    phase: Phase

    def run(self, batch_size: int | None, *, fold: bool) -> Filled:
        """Compute and store what is missing.

        Args:
            batch_size: of this pass; None for the loader's.
            fold: fold batch-norms.
        """
        feed, notes = self.feed, []
        folding, difference = None, 0.0
        if fold:
            try:
                folding, difference = self._folding()
            except CacheError as error:
                notes.append(f"nothing is folded: {str(error).rstrip('.')}")
        size, reason = batch_size or feed.full, ""
        if size != feed.full and feed.places is not None:
            reason = "last bits depend on the place in a batch"
        elif size > feed.size and feed.sizes is not None:
            size = feed.full  # no batch is so large
        elif feed.sizes is not None and size not in feed.sizes:
            reason = self._other_bits(size)
            feed.sizes = feed.sizes if reason else feed.sizes | {size}
        if reason:
            notes.append(f"batches of {size} are not used: {reason}")
            size = feed.full
        done = sum(self._fill(size, view, folding) for view in range(feed.views))
        return Filled(done, size, 0 if folding is None else len(folding), difference, tuple(notes))

    def _fill(self, size: int, view: int, folding: Folding | None) -> int:
        """Compute the samples of which something is missing, in batches of `size`; return how many."""
        frozen, feed, phase, samples = self.frozen, self.feed, self.phase, self.feed.indices
        frozen.thread = get_ident()
        batches = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
        rows = [feed.rows_of(batch, view) for batch in batches]
        absent = [int(feed.missing(phase, some).sum()) for some in rows]
        wanted = [number for number, count in enumerate(absent) if count]
        loaded = feed.reader.load(iter([batches[number] for number in wanted]))
        with frozen.in_a_row() if wanted and folding is None else contextlib.nullcontext():
            for number, batch in zip(wanted, loaded):
                with folding or contextlib.nullcontext():
                    key = frozen.state.number()
                    live = Live(self.supply, feed, rows[number], batches[number], key, phase)
                    frozen.complete(live, batch)
        return sum(absent)

    def _other_bits(self, size: int) -> str:
        """Return how a batch of `size` samples differs from batches of `feed.full`; ``""`` if no bit does."""
        feed, full = self.feed, self.feed.full
        taken = [feed.indices[number % feed.size] for number in range(-(-size // full) * full)]
        leaves = feed.shape.check(feed.reader.load_now(taken), len(taken))
        runs: list[OpLog] = []

        def compute(start: int, count: int) -> Values:
            runs.append(OpLog())
            values = self._computed([leaf[start : start + count] for leaf in leaves], log=runs[-1])
            return {site: feed.sites[site].layout.to_rows(value) for site, value in values.items()}

        values = compute(0, size)
        for start in range(0, size, full):
            for site, rows in compute(start, full).items():
                part = values[site][start : start + full]
                if not same_bits(part, rows[: len(part)]):
                    return f"the last bits of the value at {site} differ from those in batches of {full}"
        within, between = uneven_places(runs[1].runs, full, runs[0].runs, size)
        if within or between:
            return f"the last bits of {within or between} depend on the size of the batch"
        return ""

    def _folding(self) -> tuple[Folding, float]:
        """Return the folding, and its relative difference on the first batch.

        Raises:
            CacheError: nothing can be folded, or values would differ by too much.
        """
        feed, model = self.feed, self.frozen.model
        leaves = tensors_in(feed.reader.load_now(feed.indices[: feed.full]))
        with torch.no_grad():
            recording = record(model, *feed.link.build(leaves))
            folding = Folding(model, find_pairs(recording, self._cuts))
        plain = self._computed(leaves)
        with folding:
            folded = self._computed(leaves)
        if not len(folding):
            raise CacheError("no frozen batch-norm follows a frozen convolution directly")
        difference = relative_difference(plain, folded)
        if not difference <= FOLD_TOLERANCE:
            raise CacheError(
                f"values would differ by {difference:.1e} of the largest, more than {FOLD_TOLERANCE:.0e}"
            )
        return folding, difference

    @property
    def _cuts(self) -> list[Cut]:
        return self.frozen.stored_cuts(self.feed, self.phase.cut)

    def _computed(self, leaves: list[torch.Tensor], log: OpLog | None = None) -> Values:
        """Return the stored values of a batch that has these tensors, computed anew."""
        link, cuts = self.feed.link, self._cuts
        found = self.frozen.run(link, cuts, link.build(leaves), batch=len(leaves[0]), log=log)
        return {site: found.values[site] for cut in cuts for site in cut.frontier}
