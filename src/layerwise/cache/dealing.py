"""`Dealer`: makes the batches of an `Epoch`: replayed where they can be, else real."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from layerwise.cache.cutting.book import OtherStateError
from layerwise.cache.frozen import FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.replay.link import versions_of
from layerwise.cache.samples.batchshape import BatchShape, OtherShapeError
from layerwise.cache.samples.feed import Phase
from layerwise.cache.samples.reading import DRAWS, LoaderReader, Order
from layerwise.cache.samples.supply import Raised, Supply
from layerwise.cache.traceless import normal_tensors
from layerwise.errors import CacheError
from layerwise.layers.structures import tensors_in

_MISSING_FRAC = 0.1  # above this, the loader's workers load whole batches in place of single samples
_SETTINGS = 16  # new combinations of the modules' attributes: each is looked at by itself
_AHEAD = 64  # batches that a loop may ask for before it passes the first of them to the model
_REAL_AHEAD = 8  # the same of batches that are loaded, as those of the first epoch: they take memory
_PATIENCE = 2  # epochs of which nothing came to the model


class Epoch(Iterator[Any]):
    """One epoch's batches. It begins when a loader's would: when it is iterated over, not when it is made.

    Args:
        begin: draws what an epoch draws at its beginning, and returns its batches.
    """

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Epoch:
        self._begun()
        return self

    def __next__(self) -> Any:
        batch = next(self._begun())
        if isinstance(batch, Raised):  # a generator that raised would have no more batches
            raise batch.error
        return batch

    def _begun(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = self._begin()
        return self._batches


class Dealer:
    """Makes batches.

    Args:
        frozen: computes what is missing.
    """

    def __init__(self, frozen: FrozenPart) -> None:
        self._frozen, self._book = frozen, frozen.book

    def epoch(self, supply: Supply, order: Order) -> Iterator[Live | Raised]:
        """Yield the batches of one epoch, in the order given, and what was raised in place of them."""
        view = supply.epochs % supply.views
        supply.epochs += 1
        supply.handed_out = supply.replays = 0
        supply.came = supply.asks_ahead = False
        known = self._is_known(supply)
        for indices, batch in supply.schedule(order, known, lambda: self._must_load(supply, view)):
            try:
                if isinstance(batch, Raised):
                    raise batch.error
                with normal_tensors():
                    live = self.deal(supply, indices, batch, view=view)
            except Exception as error:
                yield Raised(error)
                continue
            if live.feed.reader.has_drawn and supply.views == 1 and not supply.reason:
                supply.refuse_random(DRAWS)  # the first samples did not
            supply.handed_out += 1
            yield live

    def expected_state(self, supply: Supply) -> int:
        """Return the state in which a batch will probably come to the model; it is looked at anew then.

        That of now, unless no batch of this loader ever came in it: some loops change the modes between
        asking for a batch and calling the model, above all after a validation.
        """
        now, last = self._book.last_state, supply.called_in
        if last is None or any(now in feed.phases for feed in supply.feeds):
            return now
        return last if self._book.differ_in_modes(now, last) else now

    def deal(self, supply: Supply, indices: list[int], batch: Any, *, view: int) -> Live:
        """Return one batch.

        Args:
            supply: the loader.
            indices: of its samples.
            batch: the loaded batch; None if it was not loaded.
            view: which draw of the samples.
        """
        key = self.expected_state(supply)
        if self._book.settings.new > _SETTINGS and not supply.reason:
            supply.refuse("the attributes of the model's modules change from batch to batch")
        try:
            feed = supply.feed_of(indices)
        except CacheError as error:
            if not supply.reason:
                supply.refuse(str(error))
            feed = supply.feeds[0]
            live = Live(supply, feed, torch.empty(0, dtype=torch.int64), indices, key)
        else:
            live = Live(supply, feed, feed.rows_of(indices, view), indices, key)
        phase = live.phase = feed.phases.get(key)
        usable = not supply.reason and phase is not None and phase.verified and not phase.reason
        if usable and phase is not None and feed.fits(len(indices)) and self._replayed(live, phase, batch):
            return live
        sorted_anew = not (supply.reason or any(feed is one for one in supply.feeds))
        if sorted_anew or self.expected_state(supply) != key:
            return self.deal(supply, indices, batch, view=view)
        live.batch = batch if batch is not None else feed.reader.load_now(indices)
        live.leaves = tensors_in(live.batch)
        live.versions = versions_of(live.leaves)
        settled = phase is not None and (phase.verified or phase.reason)
        size = feed.reader.batch_size or len(indices)  # a smaller last batch tells less
        tells = len(indices) >= min(size, feed.size) and (not feed.sizes or feed.fits(len(indices)))
        if tells and not (supply.reason or settled):
            try:
                live.shape = BatchShape.of(live.batch, len(indices))
            except CacheError as error:
                supply.refuse(str(error))
        return live

    def _replayed(self, live: Live, phase: Phase, batch: Any) -> bool:
        """Compute what is missing of a batch, and put ghosts in place of its inputs; say if that went."""
        try:
            batch = self._frozen.complete(live.feed, phase, live, batch)
            load = functools.cache(functools.partial(_load, live.feed.reader, live.indices))
            live.batch, live.leaves = live.feed.handed_out(phase.ghosts, live.rows, batch, live.tag, load)
        except OtherShapeError as error:
            live.sort_anew(error)
            return False
        except OtherStateError:
            return False
        except (CacheError, OSError) as error:
            live.supply.refuse(str(error), phase)
            return False
        live.versions, live.replayed = versions_of(live.leaves), True
        return True

    def _is_known(self, supply: Supply) -> bool:
        """Whether this epoch can start without looking at a batch first."""
        key = self.expected_state(supply)
        return any(key in feed.phases and feed.phases[key].verified for feed in supply.feeds)

    def _must_load(self, supply: Supply, view: int) -> bool:
        """Whether the loader's workers had better load every batch of this epoch."""
        return supply.missing_frac(self.expected_state(supply), view) > _MISSING_FRAC

    def drop_used(self, supply: Supply, at_hand: deque[Live], *, over: bool = False) -> None:
        """Drop the batches with which the loop is done; give up where none ever comes to the model.

        Loops that ask for batches ahead (a prefetcher, Accelerate) have some at hand that are still to come.

        Args:
            supply: whose batches.
            at_hand: what was handed out and not dropped, in order.
            over: none of them comes any more.
        """
        if any(live.seen for live in at_hand):
            supply.came = True
            supply.asks_ahead |= not at_hand[-1].seen
        awaited = [live for live in at_hand if live.is_awaited]
        real = [live for live in awaited if not live.replayed]
        dropped = {*awaited} if over else {*awaited[:-_AHEAD], *real[:-_REAL_AHEAD]}
        at_hand.clear()
        at_hand.extend(live for live in awaited if live not in dropped)
        supply.unseen += over and not supply.came
        if supply.unseen >= _PATIENCE and supply.called_in is None and not supply.reason:
            supply.refuse("the loop does not pass the loader's batches to this model as they are")


def _load(reader: LoaderReader, indices: list[int]) -> list[torch.Tensor]:
    with reader.unaffected():
        return tensors_in(reader.load_now(indices))
