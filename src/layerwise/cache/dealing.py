"""`Dealer`: makes the batches of an `Epoch`: replayed where they can be, else real."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import torch

from layerwise.cache.frozen import FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.remedies import KEEP_APART, STORE_VIEWS
from layerwise.cache.replay.link import versions_of
from layerwise.cache.samples.batchshape import BatchShape
from layerwise.cache.samples.draws import DRAWS
from layerwise.cache.samples.reading import Order
from layerwise.cache.samples.supply import Raised, Supply
from layerwise.cache.traceless import normal_tensors
from layerwise.errors import CacheError
from layerwise.layers.structures import tensors_in

_MISSING_FRAC = 0.1  # above this, the loader's workers load whole batches in place of single samples
_SETTINGS = 16  # new combinations of the modules' attributes: each is looked at by itself
_AT_ONCE = 16  # batches that are made at once: the first after a training step takes by far the longest


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
        self._frozen, self._state = frozen, frozen.state

    def epoch(self, supply: Supply, order: Order) -> Iterator[Live | Raised]:
        """Yield the batches of one epoch, in the order given, and what was raised in place of them."""
        view = supply.epochs % supply.views
        supply.epochs += 1
        supply.handed_out = supply.replays = 0
        supply.came = supply.asks_ahead = False
        key = self.expected_state(supply)
        known = any(key in feed.phases and feed.phases[key].verified for feed in supply.feeds)

        def missing_frac() -> float:
            return supply.missing_frac(self.expected_state(supply), view)

        for indices, batch in supply.schedule(order, known, lambda: missing_frac() > _MISSING_FRAC):
            group = [indices]
            if batch is None and not supply.reason and not missing_frac():
                group += order.ahead(_AT_ONCE - 1)
            for live in [self._dealt(supply, one, batch, view) for one in group]:
                if isinstance(live, Live) and live.key != self.expected_state(supply):
                    live = self._dealt(supply, live.indices, batch, view)
                supply.handed_out += isinstance(live, Live)
                yield live

    def _dealt(self, supply: Supply, indices: list[int], batch: Any, view: int) -> Live | Raised:
        """Return one batch, or what was raised in place of it; see `deal`."""
        try:
            if isinstance(batch, Raised):
                raise batch.error
            with normal_tensors():
                live = self.deal(supply, indices, batch, view=view)
        except Exception as error:
            return Raised(error)
        reader = live.feed.reader
        if reader.has_drawn and supply.views == 1 and not supply.reason:
            reader.has_drawn = False
            is_alone = self._frozen.thread in (None, get_ident())  # else the model may have drawn them
            if is_alone or reader.draws(indices):
                supply.refuse(DRAWS + STORE_VIEWS)  # the first samples did not
                if batch is not None:  # loading it again would be another draw
                    live = self.deal(supply, indices, batch, view=view)
        return live

    def expected_state(self, supply: Supply) -> int:
        """Return the state in which a batch will probably come to the model; it is looked at anew then.

        That of now, unless no batch of this loader ever came in it: some loops change the modes between
        asking for a batch and calling the model, above all after a validation. Where nothing is cached in the
        state in which the last one came, there is nothing to lose.
        """
        now, last = self._state.last, supply.called_in
        if last is None or any(now in feed.phases for feed in supply.feeds) or supply.is_off(last):
            return now
        return last if self._state.differ_in_modes(now, last) else now

    def is_off(self, supply: Supply) -> bool:
        """Return whether nothing of an epoch that begins now will be cached.

        Where nothing is cached in the present modes, the loop may change them before it calls the model.
        """
        now = self.expected_state(supply)
        used = {key for feed in supply.feeds for key, phase in feed.phases.items() if phase.verified}
        late = any(self._state.differ_in_modes(now, key) for key in used)
        return supply.is_off(now) and not (late and not supply.reason)

    def deal(self, supply: Supply, indices: list[int], batch: Any, *, view: int) -> Live:
        """Return one batch.

        Args:
            supply: the loader.
            indices: of its samples.
            batch: the loaded batch; None if it was not loaded.
            view: which draw of the samples.
        """
        key = self.expected_state(supply)
        if self._state.settings.new > _SETTINGS and not supply.reason:
            changed = self._state.settings.changed
            supply.refuse(
                f"the attributes of the model's modules change from batch to batch ({changed}){KEEP_APART}"
            )
        try:
            feed = supply.feed_of(indices)
        except CacheError as error:
            if not supply.reason:
                supply.refuse(str(error))
            feed = supply.feeds[0]
            rows = torch.empty(0, dtype=torch.int64)
        else:
            rows = feed.rows_of(indices, view)
        phase = feed.phases.get(key)
        live = Live(supply, feed, rows, indices, key, phase)
        if live.may_be_replayed and self._replayed(live, batch):
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

    def _replayed(self, live: Live, batch: Any) -> bool:
        """Compute what is missing of a batch, and put ghosts in place of its inputs; say if that went."""
        feed, phase = live.feed, live.phase
        assert phase is not None
        try:
            batch = self._frozen.complete(live, batch)
            load = functools.cache(functools.partial(feed.reader.leaves, live.indices))
            live.batch, live.leaves = feed.handed_out(phase.ghosts, live.rows, batch, live.tag, load)
        except (CacheError, OSError) as error:
            live.not_completed(error)
            return False
        live.versions, live.replayed = versions_of(live.leaves), True
        return True
