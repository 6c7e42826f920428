"""`Stock`: where stored values live: the choice of storage, the budget, and what can be shared."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from layerwise.cache.changes.datawatch import DataNames
from layerwise.cache.changes.fingerprint import data_digest, named_tensors, quick_state, weights_digest
from layerwise.cache.cutting.cut import Cut, Site, Source, Values
from layerwise.cache.replay.layout import Layout
from layerwise.cache.samples.feed import Feed, SiteColumn
from layerwise.cache.store.column import Column, RowSpec, Where
from layerwise.cache.store.decision import Decision, Storage, decide, process_count
from layerwise.cache.store.room import format_bytes, free_memory_bytes
from layerwise.cache.store.shelf import NoPlaceError, Shelf
from layerwise.files import free_disk_bytes

logger = logging.getLogger("layerwise.cache")

_MEMORY_FRAC = 0.25  # of the memory that is free now
_DISK_FRAC = 0.5  # of the free space of the cache folder's disk


@dataclasses.dataclass
class CachePool:
    """Values that several caches of one process share, such as those of a search's trials.

    Attributes:
        columns: by what they depend on; grows.
        upcoming: what runs to come will train, names of parameters -> epochs. A run that trains fewer
            parameters stores in its own first pass what they need, so begin with the one that trains
            the fewest. Only a hint: a wrong one costs space and nothing else.
        names: of the datasets, so that they are read for it only once.
    """

    columns: dict[str, Column] = dataclasses.field(default_factory=dict)
    upcoming: Mapping[frozenset[str], int] = dataclasses.field(default_factory=dict)
    names: DataNames = dataclasses.field(default_factory=DataNames, repr=False)


class Stock:
    """Makes columns, within a budget, and finds those that were made before.

    Args:
        model: whose weights the values depend on.
        storage: what the user asked for.
        budget_bytes: most bytes to hold in memory; in files where they are asked for. None for a part of
            what is free.
        folder: of a lasting cache, in which ``~`` is resolved; None if there is none.
        dtype: in which wider floating-point values are stored; None for their own.
        pool: columns that several caches of this process share; None if there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        storage: Storage,
        budget_bytes: int | None,
        folder: str | Path | None,
        dtype: torch.dtype | None,
        pool: CachePool | None,
    ) -> None:
        self._model = model
        self._storage: Storage = storage
        self._dtype = dtype
        self._pool = pool
        self.shelf = Shelf(None if folder is None else Path(folder).expanduser())
        self._memory_bytes = int(free_memory_bytes() * _MEMORY_FRAC) if budget_bytes is None else budget_bytes
        is_of_files = storage == "disk" or folder is not None
        self._disk_bytes = budget_bytes if is_of_files else None
        self._held: WeakSet[Column] = WeakSet()

    def _spare(self, where: Where) -> int:
        columns: set[Column] = {*self._held, *(self._pool.columns.values() if self._pool is not None else ())}
        held = sum(column.nbytes for column in columns if column.where == where)
        if where == "memory":
            return max(self._memory_bytes - held, 0)
        free = int(free_disk_bytes(self.shelf.root) * _DISK_FRAC)
        return free if self._disk_bytes is None else min(free, max(self._disk_bytes - held, 0))

    # -- sharing ------------------------------------------------------------------------------

    @property
    def _shares(self) -> bool:
        return self._pool is not None or self.shelf.lasting

    def _data_digest(self, feed: Feed) -> str:
        reader = feed.reader
        if not reader.digest:
            dataset, collate = reader.loader.dataset, reader.loader.collate_fn
            names = DataNames() if self._pool is None else self._pool.names
            with reader.unaffected():
                reader.digest = names.name_of(
                    _inner(dataset),
                    collate,
                    lambda: data_digest(dataset, reader.load_now, reader.size, collate),
                )
        return reader.digest

    def _key(self, feed: Feed, source: Source | None, what: str, spec: RowSpec) -> str:
        """Return the name of a column: all that its values depend on. ``""`` if nothing is shared.

        Nor are draws: values of one, and labels of another, do not belong together.
        """
        if not self._shares or feed.places is not None or feed.views > 1:
            return ""
        weights = weights_digest(named_tensors(self._model), source.tensors) if source is not None else ""
        parts = (
            f"torch {torch.__version__} {_processor(feed.link.device)}",
            what,
            weights,
            source.structure if source is not None else "",
            self._data_digest(feed) + feed.digest,
            str(spec),
            f"{feed.link.autocast} {feed.link.device.type} {feed.link.dtypes} {feed.link.orders}",
            feed.link.name,
            _bits_of(feed),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]

    def _shared(self, key: str, rows: int, spec: RowSpec) -> Column | None:
        if self._pool is not None and key in self._pool.columns:
            column = self._pool.columns[key]
            return column if column.spec == spec and len(column.filled) == rows else None
        return self.shelf.find(key, rows, spec) if key else None

    def adopt(self, feed: Feed, cuts: Iterable[Cut], values: Values, rows: torch.Tensor) -> None:
        """Give `feed` the columns of `cuts` that others have filled, if they agree with `values`.

        Args:
            feed: whose samples.
            cuts: whose sites.
            values: just computed for `rows`: what is stored for some of these must be the same, bit for bit
                where it is exact, else but for rounding.
            rows: int64.
        """
        for cut in cuts if self._shares else ():
            for site, spec in self._lacking_sites(feed, cut, values).items():
                column = self._shared(self._key(feed, cut.sources[site], str(site), spec), feed.rows, spec)
                if column is None or not column.filled[rows].any():
                    continue  # its name does not tell in which modes it was computed
                fresh = feed.layouts[site].to_rows(values[site])
                if column.agrees(rows, fresh, exact=feed.sizes is not None):
                    logger.info("prefix cache: found the values at %s, computed before", site)
                    feed.sites[site] = self._site_column(column, feed.layouts[site], cut.sources[site])

    def _site_column(self, column: Column, layout: Layout, source: Source) -> SiteColumn:
        weights = quick_state(named_tensors(self._model), source.tensors)
        return SiteColumn(column, layout, source.structure, weights)

    # -- making -------------------------------------------------------------------------------

    def _lacking_sites(self, feed: Feed, cut: Cut, values: Values) -> dict[Site, RowSpec]:
        """Return the sites of `cut` with a value and without a column, and what one row of each is like."""
        found = {}
        for site in cut.frontier:
            if site in values and site not in feed.sites:
                rows = feed.layouts[site].to_rows(values[site])
                found[site] = RowSpec(tuple(rows.shape[1:]), rows.dtype, self._stored_as(rows.dtype))
        return found

    def _stored_as(self, computed: torch.dtype) -> torch.dtype:
        narrow = self._dtype
        if narrow is None or not computed.is_floating_point or computed.itemsize <= narrow.itemsize:
            return computed
        return narrow

    def _lacking_leaves(self, feed: Feed, ghosts: frozenset[int]) -> dict[int, RowSpec]:
        """Return the numbers of the batch's own tensors that are to be stored and have no column."""
        rows = {number: feed.shape.rows[number] for number in feed.stored_leaves(ghosts)}
        return {n: RowSpec(shape, dtype, dtype) for n, (shape, dtype) in rows.items() if n not in feed.leaves}

    def _lacking_bytes(self, feed: Feed, cut: Cut, ghosts: frozenset[int], values: Values) -> int:
        """Return how many bytes a sample takes of which there is no column yet."""
        sites, leaves = self._lacking_sites(feed, cut, values), self._lacking_leaves(feed, ghosts)
        return sum(spec.row_bytes for spec in (*sites.values(), *leaves.values()))

    def decide(
        self,
        feed: Feed,
        cut: Cut,
        ghosts: frozenset[int],
        values: Values,
        *,
        batch: int,
        prefix_s: float,
        suffix_s: float,
        epochs: int | None,
    ) -> Decision:
        """Choose whether and where to store what `cut` needs; see `decide`."""
        choice = decide(
            self._storage,
            bytes_per_sample=self._lacking_bytes(feed, cut, ghosts, values),
            samples=feed.rows,
            batch=batch,
            prefix_s=prefix_s,
            suffix_s=suffix_s,
            epochs=epochs,
            memory_bytes=self._spare("memory"),
            disk_bytes=self._spare("disk"),
            shared=self.shelf.lasting,
            processes=process_count(),
        )
        there = [feed.sites[site].column.spec for site in cut.frontier if site in feed.sites]
        lacking = self._lacking_sites(feed, cut, values).values()
        if any(spec.stored != spec.dtype for spec in (*there, *lacking)):
            short = str(self._dtype).removeprefix("torch.")
            choice = dataclasses.replace(choice, reason=f"{choice.reason}; stored as {short}, not exact")
        return choice

    def provide(self, feed: Feed, cut: Cut, ghosts: frozenset[int], values: Values, where: Where) -> None:
        """Make the columns of `cut` and of the batch's own tensors that do not exist yet.

        Raises:
            NoPlaceError: see `Shelf.create`.
        """
        for site, spec in self._lacking_sites(feed, cut, values).items():
            source, what = cut.sources[site], f"{type(self._model).__name__} {site}"
            column = self._made(self._key(feed, source, str(site), spec), feed.rows, spec, where, what)
            feed.sites[site] = self._site_column(column, feed.layouts[site], source)
        for number, spec in self._lacking_leaves(feed, ghosts).items():
            what = f"batch tensor {number}"
            key = self._key(feed, None, what, spec)
            shared = self._shared(key, feed.rows, spec)
            feed.leaves[number] = shared or self._made(key, feed.rows, spec, where, what)

    def _made(self, key: str, rows: int, spec: RowSpec, where: Where, what: str) -> Column:
        column = self.shelf.create(key, rows, spec, what) if where == "disk" else Column(rows, spec)
        self._held.add(column)
        if self._pool is not None and key:
            self._pool.columns[key] = column
        return column

    def provide_later(
        self, feed: Feed, later: Iterable[tuple[int, Cut]], values: Values, where: Where
    ) -> None:
        """Make columns for the phases to come, those first that save most work per byte, while they fit."""
        places: list[Where] = [where]
        if where == "memory" and self._storage == "auto":
            places.append("disk")
        ranked = []
        for epochs, cut in later:
            if all(site in values for site in cut.frontier):
                ghosts = feed.ghosts_of(cut, keep_inputs=False)
                size = self._lacking_bytes(feed, cut, ghosts, values)
                ranked.append((epochs * cut.skipped_flops / max(size, 1), cut, ghosts))
        for _, cut, ghosts in sorted(ranked, key=lambda item: -item[0]):
            size = self._lacking_bytes(feed, cut, ghosts, values) * feed.rows  # some are made by now
            why = format_bytes(size)
            for place in places:
                if size <= self._spare(place):
                    try:
                        self.provide(feed, cut, ghosts, values, place)
                        break
                    except NoPlaceError as error:  # less room than the disk says: a quota, another process
                        why = str(error)
            else:
                logger.info(
                    "prefix cache: no room for a later phase (%s); it will be looked at again when it comes",
                    why,
                )


def _inner(dataset: Any) -> Any:
    """Return the dataset inside the wrapper that each run of `layerwise.fit` puts around it."""
    wrapped = type(dataset).__module__.startswith("layerwise.") and hasattr(dataset, "data")
    return dataset.data if wrapped else dataset


def _processor(device: torch.device) -> str:
    """Return what chooses torch's kernels on this machine, and so last bits: machines may share a folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{torch.backends.cpu.get_cpu_capability()} {name}"


def _bits_of(feed: Feed) -> str:
    """Return what a feed's last bits depend on besides what is computed."""
    if feed.sizes is None:
        return "not exact"
    return f"batches of {feed.full}" if feed.sizes == {feed.full} else ""
