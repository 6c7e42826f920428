"""`Feed`: what the cache knows about one loader: its samples' stored values, and how to hand them out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from layerwise.cache.cut import CallId, Cut, Site
from layerwise.cache.decision import Decision
from layerwise.cache.ghost import ghost
from layerwise.cache.layout import Layout
from layerwise.cache.link import Link
from layerwise.cache.reading import LoaderReader
from layerwise.cache.replay import Skeleton
from layerwise.cache.store import Column
from layerwise.errors import CacheError
from layerwise.layers.structures import map_tensors, tensors_in

_LARGE_BYTES = 2**16  # a real input larger than this is loaded again rather than stored


@dataclass
class SiteColumn:
    """The stored values of one site.

    Attributes:
        column: one row a sample.
        layout: how rows make a batch.
        structure: hash of the operations behind the value.
        weights: `quick_state` of the weights behind it when it was filled.
        key: name under which it can be shared; ``""`` if it is not.
    """

    column: Column
    layout: Layout
    structure: str
    weights: tuple[Any, ...]
    key: str = ""


@dataclass
class Phase:
    """One combination of trainable parameters and train/eval modes, for one loader.

    Attributes:
        cut: where the pass is cut; None before the first batch was seen, or if it cannot be.
        reason: why it is not cached; ``""`` if it is.
        verified: a replayed batch was bit for bit the plain one.
        ghosts: leaves of the batch that are not loaded.
        decision: what was chosen.
    """

    cut: Cut | None = None
    reason: str = ""
    verified: bool = False
    ghosts: frozenset[int] = frozenset()
    decision: Decision | None = None


@dataclass
class BatchShape:
    """How the loader's batches look: learned from the first one.

    Attributes:
        template: its structure, with meta tensors.
        blank: its structure, with None in place of tensors.
        rows: for each tensor, its shape without the first dimension, and type.
    """

    template: Any
    blank: Any
    rows: list[tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, batch: Any, size: int) -> BatchShape:
        """Learn from a batch of `size` samples.

        Raises:
            CacheError: a tensor's first dimension does not count samples.
        """
        leaves = tensors_in(batch)
        if not leaves or any(leaf.dim() == 0 or leaf.shape[0] != size for leaf in leaves):
            shapes = [tuple(leaf.shape) for leaf in leaves]
            raise CacheError(
                f"the tensors of a batch of {size} samples have the shapes {shapes}: the first dimension "
                f"must count samples."
            )
        template = map_tensors(batch, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
        if len(tensors_in(template)) != len(leaves):
            raise CacheError(f"tensors inside a {type(batch).__name__} cannot be replaced.")
        blank = map_tensors(batch, lambda tensor: None)
        return cls(template, blank, [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves])

    def check(self, batch: Any, size: int) -> list[torch.Tensor]:
        """Return the tensors of another batch of the same shape.

        Raises:
            CacheError: its samples have other shapes.
        """
        other = BatchShape.of(batch, size)
        if other.rows != self.rows:
            raise CacheError(
                f"samples differ in shape from batch to batch ({self.rows[0][0]}, then "
                f"{other.rows[0][0]}): padding to the longest of a batch changes the last bits of what the "
                f"prefix computes. Pad to one length (padding='max_length')."
            )
        return tensors_in(batch)


@dataclass
class Feed:
    """One loader and what is stored of its samples.

    Attributes:
        loader: as given.
        reader: gives its indices and samples; None if it cannot be read by index.
        reason: why nothing of this loader is cached; ``""`` if it may be.
        views: draws of each sample that are stored.
        shape: of its batches, once known.
        link: how its batches reach the model, once known.
        full: number of samples in the batches in which values are computed.
        sizes: batch sizes that give a sample the same bits as `full` does: kernels are chosen by size.
            Values are computed in batches of such a size, and other batches go through the plain model.
            None where last bits do not matter.
        reload: batches hold something that is not stored: samples are loaded again each epoch.
        skeletons: of the skipped calls of all phases.
        constants: values that do not depend on the input.
        layouts: how the values at each checked site are made of samples.
        sites: stored values.
        leaves: stored tensors of the batch, by number.
        phases: by trainable parameters and modes.
        epochs: epochs that began.
        unseen: batches in a row that were handed out and never reached the model.
    """

    loader: DataLoader[Any]
    reader: LoaderReader | None = None
    reason: str = ""
    views: int = 1
    shape: BatchShape | None = None
    link: Link | None = None
    full: int = 0
    sizes: set[int] | None = field(default_factory=set)
    reload: bool = False
    skeletons: dict[CallId, Skeleton] = field(default_factory=dict)
    constants: dict[Site, torch.Tensor] = field(default_factory=dict)
    layouts: dict[Site, Layout] = field(default_factory=dict)
    sites: dict[Site, SiteColumn] = field(default_factory=dict)
    leaves: dict[int, Column] = field(default_factory=dict)
    phases: dict[Any, Phase] = field(default_factory=dict)
    epochs: int = 0
    unseen: int = 0

    @property
    def rows(self) -> int:
        """Number of rows that a column of this loader has."""
        assert self.reader is not None
        return self.reader.size * self.views

    def fits(self, size: int) -> bool:
        """Whether a batch of `size` samples may be replayed."""
        return self.sizes is None or size in self.sizes

    def columns_of(self, cut: Cut, ghosts: frozenset[int]) -> list[Column] | None:
        """Return all columns that replaying `cut` reads, or None if one of them does not exist."""
        assert self.shape is not None
        if any(site not in self.sites for site in cut.frontier):
            return None
        columns = [self.sites[site].column for site in cut.frontier]
        if not self.reload:
            wanted = [number for number in range(len(self.shape.rows)) if number not in ghosts]
            if any(number not in self.leaves for number in wanted):
                return None
            columns += [self.leaves[number] for number in wanted]
        return columns

    def missing(self, cut: Cut, ghosts: frozenset[int], rows: torch.Tensor) -> torch.Tensor:
        """Return which of `rows` (int64) are not complete; bool."""
        columns = self.columns_of(cut, ghosts)
        if columns is None:
            return torch.ones(len(rows), dtype=torch.bool)
        absent = torch.zeros(len(rows), dtype=torch.bool)
        for column in columns:
            absent |= column.missing(rows)
        return absent

    def values(self, cut: Cut, rows: torch.Tensor, device: torch.device) -> dict[Site, torch.Tensor]:
        """Return what the sites of `cut` hold for a batch of `rows`."""
        found = {site: self.constants[site] for site in cut.constants}
        for site in cut.frontier:
            stored = self.sites[site]
            found[site] = stored.layout.from_rows(stored.column.get(rows).to(device))
        return found

    def handed_out(
        self, ghosts: frozenset[int], rows: torch.Tensor, batch: Any, tag: object
    ) -> tuple[Any, list[torch.Tensor]]:
        """Return a batch for the loop, with ghosts for what is not loaded, and its tensors.

        Args:
            ghosts: leaves that become ghosts.
            rows: which samples.
            batch: the loaded one where samples are loaded again; else None.
            tag: marks the ghosts of this batch.
        """
        assert self.shape is not None
        real = tensors_in(batch) if batch is not None else None
        leaves: list[torch.Tensor] = []
        for number, (shape, dtype) in enumerate(self.shape.rows):
            if number in ghosts:
                leaves.append(ghost((len(rows), *shape), dtype, tag=(tag, number)))
            elif real is not None:
                leaves.append(real[number])
            else:
                leaf = self.leaves[number].get(rows)
                used = self.link is not None and number in self.link.leaves
                leaves.append(leaf.to(self.link.device) if used and self.link is not None else leaf)
        source = iter(leaves)
        template = batch if batch is not None else self.shape.template
        return map_tensors(template, lambda _: next(source)), leaves

    def ghosts_of(self, cut: Cut, keep_inputs: bool) -> frozenset[int]:
        """Return the leaves of the batch that reach the model and that nothing after the cut reads."""
        assert self.link is not None
        assert self.shape is not None
        if keep_inputs:
            return frozenset()
        read = {self.link.leaves[number] for number in cut.inputs if number < len(self.link.leaves)}
        return frozenset(
            number
            for number in self.link.leaves
            if number not in read and self.shape.rows[number][1].is_floating_point
        )

    def stored_leaves(self, ghosts: frozenset[int]) -> dict[int, int]:
        """Return the leaves to store -> their bytes a sample; none if samples are loaded again."""
        assert self.shape is not None
        if self.reload:
            return {}
        sizes = {
            number: torch.Size(shape).numel() * dtype.itemsize
            for number, (shape, dtype) in enumerate(self.shape.rows)
            if number not in ghosts
        }
        used = set(self.link.leaves) if self.link is not None else set()
        if any(size > _LARGE_BYTES and number in used for number, size in sizes.items()):
            self.reload = True
            return {}
        return sizes

    def schedule(
        self, known: bool, must_load: Callable[[], bool]
    ) -> Generator[tuple[list[int], Any], None, None]:
        """Yield (indices, batch) for one epoch; the batch is None where the caller has to load it.

        Args:
            known: `must_load` can be asked at once; otherwise after the first batch.
            must_load: whether most batches have to be loaded; the loader's own workers then do it.
        """
        assert self.reader is not None
        if known and not must_load():
            for indices in self.reader.epoch():
                yield indices, None
            return
        source = self.reader.epoch(ahead=False)
        if not known:
            for indices in source:
                yield indices, None
                break
            if not must_load():
                for indices in source:
                    yield indices, None
                return
        seen: deque[list[int]] = deque()

        def noted() -> Iterator[list[int]]:
            for indices in source:
                seen.append(indices)
                yield indices

        for batch in self.reader.load(noted()):
            yield seen.popleft(), batch


def padded(rows: Sequence[int], size: int) -> list[int]:
    """Return `rows` repeated until there are `size` of them.

    >>> padded([3, 4], 5)
    [3, 4, 3, 4, 3]
    """
    return [rows[number % len(rows)] for number in range(max(size, len(rows)))]
