"""`Supply`: one loader whose samples the cache keeps, sorted by shape; `open_supply` says if it can."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.changes.alike import does_the_same, reads_alike
from layerwise.cache.changes.datawatch import DataWatch
from layerwise.cache.remedies import STORE_VIEWS
from layerwise.cache.samples.batchshape import Kind, OtherShapeError, kind_of
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.reading import LoaderReader, Order
from layerwise.cache.store.decision import process_count
from layerwise.errors import CacheError, warn
from layerwise.layers.isolation import unwrap
from layerwise.layers.structures import tensors_in

logger = logging.getLogger("layerwise.cache")

COMPILED = (
    "the model is compiled, as a whole or in part, and what is compiled cannot be skipped. Leave "
    "torch.compile out while the prefix is frozen"
)
_NOT_LOADED = "a sample could not be loaded in this process: "

_LOOKED_AT = 12  # samples whose shapes are compared before the first epoch
_MIXED = (
    "a batch holds samples that have different shapes when each is collated alone, so a sample's padding "
    "depends on the others of its batch, and with it the last bits of what the prefix computes. Let batches "
    "hold samples of one length, each padded to that in every epoch: layerwise.by_length(loader) does."
)


@dataclass
class Supply:
    """One loader, and a `Feed` for each shape that its samples have.

    A sample must have the same shape in every epoch, and a batch must hold samples of one shape. Each shape
    is then cached like a data set of its own: it is looked at, proved and stored by itself.

    Attributes:
        loader: as given; of several alike, the latest.
        reader: gives its indices and samples; where it cannot be read by index there is none, and no feed.
        reason: why nothing of this loader is cached; ``""`` if it may be.
        views: draws of each sample that are stored.
        feeds: one for each shape.
        asked: the user asked for a cache, and is warned where there is none.
        feed_by_index: of each sample; empty where all have one shape.
        epochs: epochs that began.
        handed_out: batches of the epoch under way, or of the last one.
        replays: calls of the model among them that were replayed.
        moves: `ModelState.moves` when what is stored was last compared with the weights.
        called_in: state of the model when it was last called with a batch of this loader.
        not_looked_at: why a call with a batch was not looked at, though one to come may be.
        came: a batch of the epoch under way, or of the last one, came to the model.
        asks_ahead: the loop asked for a batch before it passed on the one before.
        unseen: epochs of which no batch came to the model; another one may have got them.
        is_watched: a batch came within a ``TorchDispatchMode``, and was not looked at for that.
        watch: notices that the dataset was changed.
        changes: how often it was.
    """

    loader: DataLoader[Any]
    reader: LoaderReader = field(init=False)
    reason: str = ""
    views: int = 1
    asked: bool = False
    feeds: list[Feed] = field(default_factory=list)
    feed_by_index: dict[int, Feed] = field(default_factory=dict)
    epochs: int = 0
    handed_out: int = 0
    replays: int = 0
    moves: int = 0
    called_in: int | None = None
    not_looked_at: str = ""
    came: bool = False
    asks_ahead: bool = False
    unseen: int = 0
    is_watched: bool = False
    watch: DataWatch | None = None
    changes: int = 0
    _begun: WeakSet[GeneratorType[Any, None, None]] = field(default_factory=WeakSet, repr=False)

    def refuse(self, reason: str, phase: Phase | None = None, *, warns: bool = False) -> None:
        """Note why this loader is not cached, or a phase; warn if `warns` or a cache was asked for.

        Args:
            reason: a sentence.
            phase: the one; None for the loader.
            warns: although nobody asked for a cache.
        """
        if phase is not None:
            phase.refuse(reason)
        else:
            self.reason = reason
        logger.info("prefix cache off: %s", reason)
        if self.asked or warns:
            warn(f"The prefix cache is off: {reason.rstrip('.')}.")

    def read(self, reader: LoaderReader) -> None:
        """Take samples from `reader`, which so far are thought to have one shape."""
        self.reader, self.feed_by_index = reader, {}
        self.feeds = [Feed(reader, views=self.views)]

    def may_take(self, loader: Any) -> bool:
        """Return whether another loader gives the same samples, and no epoch of this one is under way."""
        under_way = any(epoch.gi_frame is not None for epoch in self._begun)
        return self.views == 1 and not under_way and reads_alike(self.loader, loader)

    def take(self, loader: DataLoader[Any]) -> None:
        """Go on with another loader of the same samples."""
        self.loader = loader
        if self.feeds:
            self.reader.loader = loader

    def begun(self, epoch: Iterator[Any]) -> Iterator[Any]:
        """Note that an epoch has begun, which a generator makes; return it."""
        assert isinstance(epoch, GeneratorType)
        self._begun.add(epoch)
        return epoch

    def forget_changed(self) -> str:
        """Forget all values if the dataset was changed since last asked; return what was, or ``""``."""
        what, size = "", len(self.loader.dataset)  # type: ignore[arg-type]
        if size != self.reader.size:
            what = f"it had {self.reader.size:,} samples, and has {size:,}"
            self.reader.size = size
        if self.watch is not None:
            if not does_the_same(self.watch.collate, self.loader.collate_fn):
                what = "collate_fn"
            self.watch.collate = self.loader.collate_fn
            try:
                with self.reader.unaffected():
                    what = self.watch.changed(self.reader.load_probes) or what
            except Exception as error:  # if the dataset is at fault, the plain loop will say so
                self.refuse(_NOT_LOADED + one_line(error))
                return ""
        if what:
            self.changes += 1
            self.reader.digest = ""
            self.read(self.reader)
        return what

    def plain(self) -> Iterator[Any]:
        """Return an iterator over the loader's own batches."""
        self.epochs += 1
        return self.reader.plain() if self.feeds else iter(self.loader)

    def sort(self) -> bool:
        """Load every sample by itself, and sort them by shape; what was stored before is forgotten.

        Returns:
            Whether that helps: False if all have one shape, or were sorted before, or are random.
        """
        if self.feed_by_index or self.views > 1:
            return False
        with self.reader.unaffected():
            singles = self.reader.load(iter([[index] for index in range(self.reader.size)]))
            members: dict[Kind, list[int]] = {}
            for index, single in enumerate(singles):
                members.setdefault(kind_of(tensors_in(single)), []).append(index)
        if len(members) == 1:
            return False
        self.feeds = [
            Feed(self.reader, views=self.views, kind=kind, members=some) for kind, some in members.items()
        ]
        self.feed_by_index = {index: feed for feed in self.feeds for index in feed.members or ()}
        return True

    def sort_anew(self, other: OtherShapeError) -> None:
        """Sort the samples by shape, as a batch has another than was thought; refuse them if that fails."""
        try:
            reason = "" if self.sort() else str(other)
        except Exception as error:  # the dataset's own code; the loop may pass over what it cannot load
            reason = _NOT_LOADED + one_line(error)
        if reason:
            self.refuse(reason)

    def looks_ragged(self) -> bool:
        """Return whether a few samples, each collated alone, have different shapes."""
        with self.reader.unaffected():
            singles = (self.reader.load_now([index]) for index in self.reader.probes(_LOOKED_AT))
            return len({kind_of(tensors_in(single)) for single in singles}) > 1

    def feed_of(self, indices: Sequence[int]) -> Feed:
        """Return the feed of a batch.

        Raises:
            CacheError: its samples have several shapes, or no indices.
        """
        self.reader.check(indices)
        feeds = {self.feed_by_index[index] for index in indices} if self.feed_by_index else {*self.feeds}
        if len(feeds) > 1:
            raise CacheError(_MIXED)
        return feeds.pop()

    def stored(self, key: Any) -> int:
        """Return how many samples, times views, are stored for the phase `key`."""
        count = 0
        for feed in self.feeds:
            phase = feed.phases.get(key)
            if phase is not None and phase.verified:
                count += feed.rows - int(feed.missing(phase, torch.arange(feed.rows)).sum())
        return count

    def is_idle(self, key: Any) -> bool:
        """Whether nothing was replayed in this epoch, although values of the phase `key` are stored."""
        several = self.epochs > 1 and self.handed_out > 2
        is_off = self.is_off(key) or self.is_off(self.called_in)
        return several and not self.replays and not is_off and self.stored(key) > 0

    def is_off(self, key: Any) -> bool:
        """Whether nothing of this loader is cached in the phase `key`."""
        return bool(self.reason) or all(key in feed.phases and feed.phases[key].reason for feed in self.feeds)

    def missing_frac(self, key: Any, view: int) -> float:
        """Return the share of the samples that have to be loaded in an epoch of the phase `key`."""
        count = 0.0
        for feed in self.feeds:
            phase = feed.phases.get(key)
            if phase is None or not phase.verified or feed.loads_again(phase.ghosts):
                count += feed.size
            elif not feed.is_whole(phase):
                rows = torch.arange(feed.size) + view * feed.size
                count += float(feed.missing(phase, rows).sum())
        return count / max(sum(feed.size for feed in self.feeds), 1)

    def schedule(
        self, order: Order, known: bool, must_load: Callable[[], bool]
    ) -> Generator[tuple[list[int], Any], None, None]:
        """Yield (indices, batch) for one epoch; the batch is None where the caller has to load it.

        It is `Raised` where loading it failed.

        Args:
            order: of the epoch.
            known: `must_load` can be asked at once; otherwise after the first batch.
            must_load: whether most batches have to be loaded; the loader's own workers then do it.
        """
        for indices in () if known else order:
            yield indices, None
            break
        if not must_load():
            for indices in order:
                yield indices, None
            return
        seen: deque[list[int]] = deque()

        def noted() -> Iterator[list[int]]:
            for indices in order.hand_over():
                seen.append(indices)
                yield indices

        loaded = self.reader.load(noted())
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except Exception as error:  # the loop may pass over it and ask for the next one
                if not seen:
                    raise  # the sampler's own
                batch = Raised(error)
            yield seen.popleft(), batch


def open_supply(loader: DataLoader[Any], model: nn.Module, *, views: int, asked: bool) -> Supply:
    """Return the supply of a loader; its `reason` says why nothing of it is cached, if so it is.

    Loads a few samples, twice, to find random augmentation. Where they differ in shape, loads all samples
    once to sort them by it. Where workers are prepared by a function, one loads them as well.

    Args:
        loader: whatever the user gave.
        model: as the user gave it, wrappers included.
        views: draws of each sample that are stored.
        asked: the user asked for a cache, and is warned where there is none.
    """
    supply = Supply(loader, views=views, asked=asked)
    try:
        _refuse_unusable(model)
        supply.read(LoaderReader(loader))
        watch, reader = DataWatch(loader.dataset, loader.collate_fn), supply.reader
        random, samples = reader.randomness()
        if views == 1:
            watch.loaded(samples)
            supply.watch = watch
        if random and views == 1:
            supply.refuse(random + STORE_VIEWS)
        elif not random and reader.differ_in_workers(samples):
            supply.refuse("worker_init_fn makes other samples than are loaded in this process")
        elif supply.looks_ragged():
            supply.sort()
    except CacheError as error:
        supply.refuse(str(error))
    except Exception as error:  # the dataset's own code; if it is at fault, the plain loop will say so
        supply.refuse(_NOT_LOADED + one_line(error))
    return supply


def _refuse_unusable(model: nn.Module) -> None:
    """Raise CacheError if no pass of this model can be cached."""
    inner = unwrap(model)
    compiled = any(type(m).__name__ == "OptimizedModule" for m in (model, getattr(model, "module", model)))
    if compiled or any(getattr(m, "_compiled_call_impl", None) is not None for m in inner.modules()):
        raise CacheError(COMPILED)
    if isinstance(inner, torch.jit.ScriptModule):
        raise CacheError(
            "the model is a ScriptModule, and torch lets nobody watch or skip calls within one. Train the "
            "model from which torch.jit.script or torch.jit.trace made it, while the prefix is frozen"
        )
    if process_count() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in inner.modules()):
        raise CacheError(
            "the model's SyncBatchNorm layers talk to the other processes in each forward pass, and the "
            "cache runs passes of its own, in which the others take no part"
        )


@dataclass(frozen=True)
class Raised:
    """Stands for a batch that could not be loaded."""

    error: Exception


def one_line(error: Exception) -> str:
    """Return an error's class and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
