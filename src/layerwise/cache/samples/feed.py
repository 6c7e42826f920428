"""`Feed`: what the cache knows of samples of one shape, and in each `Phase`; how they are handed out."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise.cache.changes.alike import keeps_order
from layerwise.cache.cutting.cut import Cut, Site
from layerwise.cache.replay.fixed import Fixed
from layerwise.cache.replay.handed import handed
from layerwise.cache.replay.layout import Layout, copied, in_order
from layerwise.cache.replay.link import Link
from layerwise.cache.samples.batchshape import BatchShape, Kind
from layerwise.cache.samples.reading import LoaderReader
from layerwise.cache.store.column import Column
from layerwise.cache.store.decision import Decision
from layerwise.errors import CacheError
from layerwise.layers.structures import map_tensors, tensors_in

logger = logging.getLogger("layerwise.cache")

_PHASES = 32  # a schedule of an attribute makes one in each epoch
_LARGE_BYTES = 2**16  # a real input larger than this is loaded again rather than stored


@dataclass
class Phase:
    """One combination of trainable parameters and train/eval modes, for one loader.

    Attributes:
        decision: what was chosen; None before.
        verified: a replayed batch was bit for bit the plain one; False again if it is refused later.
        cut: where the pass is cut. This and the following are there once a first batch was replayed.
        ghosts: leaves of the batch that are not loaded.
        fixed: what the skipped calls give for every batch alike.
    """

    decision: Decision | None = None
    verified: bool = False
    cut: Cut = field(init=False)
    ghosts: frozenset[int] = field(init=False)
    fixed: Fixed = field(init=False)

    @property
    def reason(self) -> str:
        """Why it is not cached; ``""`` if it is, and before that is decided."""
        return self.decision.reason if self.decision is not None and self.decision.storage == "off" else ""

    def refuse(self, reason: str) -> None:
        """Decide that it is not cached, if that was not chosen."""
        self.verified = False
        if not self.reason:
            self.decision = Decision("off", reason)


@dataclass
class SiteColumn:
    """The stored values of one site.

    Attributes:
        column: one row a sample.
        layout: how rows make a batch.
        structure: hash of the operations behind the value.
        weights: `quick_state` of the weights behind it when it was filled.
    """

    column: Column
    layout: Layout
    structure: str
    weights: tuple[Any, ...]


@dataclass(eq=False)
class Feed:
    """The samples of a loader that have one shape, and what is stored of them.

    Attributes:
        reader: gives the loader's indices and samples.
        views: draws of each sample that are stored.
        kind: what the samples look like; None if the first batch is to tell.
        members: their indices in the data set; None for all.
        shape: of the batches. There once one was seen.
        holds_under: ways to call the model in which a frozen part is known to give what is stored; first
            that in which it was computed.
        full: number of samples in the batches in which values are computed; 0 before one was seen.
        sizes: batch sizes that give a sample the same bits as `full` does: kernels are chosen by size.
            Values are computed in batches of such a size, and other batches go through the plain model.
            None where last bits do not matter, or `places` tells.
        places: where in a batch, and in one of how many samples, the values of each row were computed;
            int64[rows, 2]. Values count only for that place: there the last bits depend on it. None
            where they do not.
        reload: batches hold something that is not stored: samples are loaded again each epoch. See
            `loads_again`.
        looked: what weights were expected, and how they were, when they were looked at.
        layouts: how the values at each checked site are made of samples.
        sites: stored values.
        leaves: stored tensors of the batch, by number.
        phases: by the state of the model (`ModelState`).
    """

    reader: LoaderReader
    views: int = 1
    kind: Kind | None = None
    members: list[int] | None = None
    shape: BatchShape = field(init=False)
    holds_under: list[Link] = field(default_factory=list)
    full: int = 0
    sizes: set[int] | None = field(default_factory=set)
    places: torch.Tensor | None = None
    reload: bool = False
    looked: Any = None
    layouts: dict[Site, Layout] = field(default_factory=dict)
    sites: dict[Site, SiteColumn] = field(default_factory=dict)
    leaves: dict[int, Column] = field(default_factory=dict)
    phases: dict[Any, Phase] = field(default_factory=dict)

    @property
    def link(self) -> Link:
        """How its batches reached the model when what is stored was first computed."""
        return self.holds_under[0]

    @property
    def indices(self) -> Sequence[int]:
        """Of its samples in the data set."""
        return range(self.reader.size) if self.members is None else self.members

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.indices)

    @property
    def rows(self) -> int:
        """Number of rows that a column has: one for each draw of each sample."""
        return self.size * self.views

    @functools.cached_property
    def _positions(self) -> dict[int, int]:
        return {index: number for number, index in enumerate(self.members or ())}

    def rows_of(self, indices: Sequence[int], view: int) -> torch.Tensor:
        """Return the rows of samples, given by their indices in the data set, in draw `view`; int64."""
        if self.members is not None:
            indices = [self._positions[index] for index in indices]
        first = view * self.size
        return torch.tensor([first + index for index in indices], dtype=torch.int64)

    def neighbour(self, index: int) -> int:
        """Return the index of another sample of this shape.

        Raises:
            CacheError: there is none.
        """
        if self.size == 1:
            raise CacheError(
                "only one sample has this shape, so a part of it cannot be compared with others."
            )
        position = index if self.members is None else self._positions[index]
        return self.indices[(position + 1) % self.size]

    @functools.cached_property
    def digest(self) -> str:
        """Names which samples these are; ``""`` for all of the data set."""
        return "" if self.members is None else hashlib.sha256(repr(self.members).encode()).hexdigest()

    def phase_of(self, key: Any) -> Phase:
        """Return the phase of a state of the model; those that were first met long ago are forgotten."""
        phase = self.phases.setdefault(key, Phase())
        for old in list(self.phases)[:-_PHASES]:
            self.phases.pop(old).verified = False  # it is not told any more what is forgotten
        return phase

    def forget(self) -> None:
        """Forget all that is stored."""
        for kept in (self.sites, self.leaves, self.phases):
            kept.clear()

    def unverify(self) -> None:
        """Have the phases looked at again whose values are not all kept any more."""
        for phase in self.phases.values():
            if phase.verified:
                are_there = all(site in self.sites for site in phase.cut.frontier)
                phase.verified = are_there and phase.fixed.has_constants(phase.cut)

    @property
    def fixed(self) -> list[Fixed]:
        """What is known of each verified phase that is the same for every batch."""
        return [phase.fixed for phase in self.phases.values() if phase.verified]

    @property
    def weights(self) -> list[tuple[Any, ...]]:
        """`quick_state` of the weights behind all that is kept, as it was when that was computed."""
        constants = (constant for fixed in self.fixed for constant in fixed.constants.values())
        return [*(stored.weights for stored in self.sites.values()), *(weights for _, weights in constants)]

    def forget_stale(self, now: Mapping[str, tuple[Any, ...]]) -> bool:
        """Forget what was computed with other weights; return whether there was some.

        Args:
            now: `quick_state` of the weights, by their names.
        """

        def is_stale(weights: tuple[Any, ...]) -> bool:
            return any(now.get(item[0]) != item for item in weights)

        if not any(map(is_stale, self.weights)):
            return False
        for site in [site for site, stored in self.sites.items() if is_stale(stored.weights)]:
            logger.info("prefix cache: the frozen weights before %s changed; computed again", site)
            del self.sites[site]
        for fixed in self.fixed:
            fixed.constants.clear()
        self.unverify()
        return True

    def keep_only(self, cuts: Sequence[Cut]) -> None:
        """Forget the values that none of `cuts` reads, and those that other operations made."""
        made_by: defaultdict[Site, set[str]] = defaultdict(set)
        for cut in cuts:
            for site in cut.frontier:
                made_by[site].add(cut.sources[site].structure)
        self.sites = {s: one for s, one in self.sites.items() if made_by.get(s) == {one.structure}}
        self.unverify()

    def keep_places(self, what: str, count: int) -> None:
        """Keep each value only for the place in the batch at which it was computed.

        Args:
            what: has last bits that depend on it.
            count: samples in the batch in which that was seen.

        Raises:
            CacheError: samples come at other places in each epoch.
        """
        if not keeps_order(self.reader.loader):
            raise CacheError(
                f"the last bits of {what} depend on a sample's place in a batch of {count}, and the loader "
                f"shuffles: a cached run would not be exactly the plain one. Take a multiple of 32 as batch "
                f"size, keep the order (shuffle=False), or pass exact=False."
            )
        self.sizes = None
        if self.places is None:
            self.places = torch.full((self.rows, 2), -1)

    def keep_sizes(self, proved: set[int]) -> None:
        """Keep the batch sizes that are also among those that were proved to give a sample the same bits.

        Raises:
            CacheError: there is none.
        """
        if self.sizes is None:
            return
        sizes = self.sizes & proved if self.sizes else proved
        if not sizes:
            raise CacheError(
                "batches have several sizes, and the first one of this phase gives samples other last bits "
                "than those of which values are stored."
            )
        self.sizes = sizes
        if self.full not in sizes:
            self.full = max(sizes)

    def forget_moved(self, rows: torch.Tensor) -> None:
        """Forget what is stored for `rows`, one batch, if one of them stood elsewhere when it was computed.

        Raises:
            CacheError: a sample stands in the batch twice, so it has no one place.
        """
        if self.places is None:
            return
        here = torch.stack([torch.arange(len(rows)), torch.full((len(rows),), len(rows))], dim=1)
        if not torch.equal(self.places[rows], here):
            for stored in self.sites.values():
                stored.column.forget(rows)
            self.places[rows] = here
            if not torch.equal(self.places[rows], here):
                raise CacheError("a batch holds a sample twice, and its last bits depend on the place.")

    def forget_draws(self, rows: torch.Tensor) -> None:
        """Forget what is stored for `rows` of a former draw, as each loading of a sample is another one."""
        if self.views > 1:
            for column in (*(stored.column for stored in self.sites.values()), *self.leaves.values()):
                column.forget(rows)

    def fits(self, size: int) -> bool:
        """Whether a batch of `size` samples may be replayed."""
        return self.sizes is None or size in self.sizes

    def fitting(self, count: int) -> int:
        """Return the number of samples of the smallest batch in which `count` of them may be computed."""
        return count if self.sizes is None else min(size for size in self.sizes if size >= count)

    def _columns(self, phase: Phase) -> list[Column]:
        """Return all columns that a replay reads in a verified phase."""
        sites = [self.sites[site].column for site in phase.cut.frontier]
        return sites + [self.leaves[number] for number in self.stored_leaves(phase.ghosts)]

    def is_whole(self, phase: Phase) -> bool:
        """Return whether nothing is missing of any row."""
        return all([column.is_whole for column in self._columns(phase)])

    def missing(self, phase: Phase, rows: torch.Tensor) -> torch.Tensor:
        """Return which of `rows` (int64) are not complete; bool."""
        absent = torch.zeros(len(rows), dtype=torch.bool)
        for column in self._columns(phase):
            absent |= column.missing(rows)
        return absent

    def has_values(self, phase: Phase, rows: torch.Tensor) -> bool:
        """Return whether what the sites of a cut hold is there for all of `rows` (int64)."""
        return phase.fixed.has_constants(phase.cut) and all(
            [site in self.sites and self.sites[site].column.has(rows) for site in phase.cut.frontier]
        )

    def values(self, phase: Phase, rows: torch.Tensor, device: torch.device) -> dict[Site, torch.Tensor]:
        """Return what the sites of a cut hold for a batch of `rows`, which must be there (`has_values`)."""
        constants = phase.fixed.constants
        found = {site: copied(constants[site][0]) for site in phase.cut.constants}  # may be written to
        for site in phase.cut.frontier:
            stored = self.sites[site]
            value = stored.layout.from_rows(stored.column.get(rows, device))
            found[site] = value if stored.layout.is_view else value.detach()
        return found

    def handed_out(
        self,
        ghosts: frozenset[int],
        rows: torch.Tensor,
        batch: Any,
        tag: object,
        load: Callable[[], Sequence[torch.Tensor]],
    ) -> tuple[Any, list[torch.Tensor]]:
        """Return a batch for the loop, with ghosts for what is not loaded, and its tensors.

        Args:
            ghosts: leaves that become ghosts.
            rows: which samples.
            batch: the loaded one where samples are loaded again; else None.
            tag: marks the ghosts of this batch.
            load: returns the batch's tensors, for a loop that reads what is a ghost.
        """
        real = tensors_in(batch) if batch is not None else None
        leaves: list[torch.Tensor] = []
        for number, ((shape, dtype), order) in enumerate(zip(self.shape.rows, self.shape.orders)):
            if number in ghosts:
                own = None if self.views > 1 else lambda number=number: load()[number]
                leaves.append(handed((len(rows), *shape), dtype, order=order, tag=(tag, number), load=own))
            elif real is not None:
                leaves.append(real[number])
            else:
                device = self.link.device if number in self.link.leaves else torch.device("cpu")
                leaves.append(in_order(self.leaves[number].get(rows, device), order))
        source = iter(leaves)
        template = batch if batch is not None else self.shape.template
        return map_tensors(template, lambda _: next(source)), leaves

    def ghosts_of(self, cut: Cut, keep_inputs: bool) -> frozenset[int]:
        """Return the leaves of the batch that reach the model and that nothing after the cut reads."""
        if keep_inputs:
            return frozenset()
        read = {self.link.leaves[number] for number in cut.inputs if number < len(self.link.leaves)}
        return frozenset(
            number
            for number in self.link.leaves
            if number is not None and number not in read and self.shape.rows[number][1].is_floating_point
        )

    def loads_again(self, ghosts: frozenset[int]) -> bool:
        """Return whether samples are loaded in each epoch in which these leaves of the batch are ghosts.

        So they are where batches hold something that is not stored, or a real input is large. Of several
        draws large inputs are stored as well: another loading is another draw.
        """
        return bool(self.why_loaded_again(ghosts))

    def why_loaded_again(self, ghosts: frozenset[int]) -> str:
        """Return for people why samples are loaded in each epoch (see `loads_again`); ``""`` if not."""
        if self.reload:
            return (
                "they hold what is no tensor and is not stored (a path, a text: hand out its number instead)"
            )
        if self.views == 1 and not _large_inputs(self.shape.rows, self.link.leaves) <= ghosts:
            return "what runs reads an input that is too large to be stored"
        return ""

    def stored_leaves(self, ghosts: frozenset[int]) -> list[int]:
        """Return the leaves of the batch that are stored; none if samples are loaded again."""
        if self.loads_again(ghosts):
            return []
        return [number for number in range(len(self.shape.rows)) if number not in ghosts]


@functools.lru_cache(maxsize=64)
def _large_inputs(rows: Kind, inputs: tuple[int | None, ...]) -> frozenset[int]:
    """Return which tensors of a batch reach the model and are too large to be stored."""
    sizes = (torch.Size(shape).numel() * dtype.itemsize for shape, dtype in rows)
    return frozenset(number for number, size in enumerate(sizes) if number in inputs and size > _LARGE_BYTES)
