"""`FrozenPart`: runs the frozen part of a model, and stores what it gives."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.fingerprint import joint_state, named_tensors, quick_state
from layerwise.cache.changes.modelstate import OtherStateError
from layerwise.cache.cutting.book import CutBook
from layerwise.cache.cutting.cut import Cut, Values
from layerwise.cache.live import Live
from layerwise.cache.proof.evenness import OpLog
from layerwise.cache.remedies import LET_IT_LEARN
from layerwise.cache.replay.capturing import Captured, capture
from layerwise.cache.replay.kernels import backend_state
from layerwise.cache.replay.link import Link
from layerwise.cache.samples.feed import Feed
from layerwise.cache.samples.supply import Supply
from layerwise.cache.traceless import BeforePass, traceless
from layerwise.errors import CacheError
from layerwise.layers.devices import clock_s
from layerwise.layers.holding import told
from layerwise.layers.isolation import uncompiled
from layerwise.layers.randomness import drawn_outside_torch, seed_everything
from layerwise.layers.snapshot import Snapshot
from layerwise.layers.structures import Arguments

_BUSY: set[nn.Module] = set()  # models that run for a cache

MOVING = f"the frozen weights change while an epoch runs{LET_IT_LEARN}"


class FrozenPart:
    """Runs the frozen part of a model up to a cut, for the cache's own purposes.

    Args:
        model: the model.
        book: knows its cuts and its state.

    Attributes:
        thread: in which the loop calls the model; None before it did.
    """

    def __init__(self, model: nn.Module, book: CutBook) -> None:
        self.model, self.book, self.state = model, book, book.state
        self.thread: int | None = None
        self._before: BeforePass | None = None  # the model before and after each pass of a row

    @property
    def busy(self) -> bool:
        """Whether the model runs for a cache just now, this one or another, and not for the loop."""
        return self.model in _BUSY

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within: it does."""
        was_busy = self.busy
        _BUSY.add(self.model)
        try:
            yield
        finally:
            if not was_busy:
                _BUSY.discard(self.model)

    @contextlib.contextmanager
    def in_a_row(self) -> Iterator[None]:
        """Within: passes follow each other, and nobody else changes the model: its state is noted once."""
        before = BeforePass(self.model)
        if before.is_lasting:
            self._before = before
        else:
            before.put_back()
        try:
            yield
        finally:
            self._before = None

    def run(
        self,
        link: Link,
        cuts: list[Cut],
        given: Arguments,
        *,
        batch: int,
        skeletons: bool = False,
        seed: int | None = None,
        log: OpLog | None = None,
    ) -> Captured:
        """Run the model up to the last site, leaving no trace in it, its arguments and the random numbers.

        Gradients are on where the loop has them on: some kernels give other last bits without. Frozen layers
        keep nothing for them.

        Under autocast, what is noted in `log` comes from a pass of its own: a mode switches autocast off
        within an operation, which matters to those that call others (torch's fused attention).

        Raises:
            CacheError: it does not call the modules that it called on the first batch.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.running())
            stack.enter_context(traceless(self.model, self._before))  # it may go another way, to its end
            stack.enter_context(torch.set_grad_enabled(link.grad))
            for kind, enabled, dtype in link.autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            if seed is not None:
                seed_everything(seed)
            if log is not None:
                stack.enter_context(self._logged(log))
            started_s = clock_s(link.device)
            found = capture(self.model, cuts, link.apart(given), batch=batch, skeletons=skeletons)
            found.seconds = clock_s(link.device) - started_s
        if found.not_come:
            raise CacheError(
                f"{min(found.not_come).path} runs for some samples of a batch and not for others."
            )
        is_cast = any(enabled for _, enabled, _ in link.autocast)
        if log is not None and (is_cast or log.enters_autocast):
            return self.run(link, cuts, given, batch=batch, skeletons=skeletons, seed=seed)
        return found

    @contextlib.contextmanager
    def _logged(self, log: OpLog) -> Iterator[None]:
        """Within: `log` notes what runs, compiled functions included.

        Raises:
            CacheError: Python's or numpy's random numbers were drawn.
        """
        before = self._drawn()
        with uncompiled(), log:
            yield
        if self._drawn() != before:
            raise CacheError(
                "the frozen part draws random numbers of Python's or numpy's, and what they decide cannot be "
                "seen."
            )

    def _drawn(self) -> tuple[Any, ...]:
        """Return what Python's and numpy's generators have drawn, the model's own ones included."""
        own = Snapshot(self.model.modules(), generators_only=True).generators
        states = [str(told(one)) for one in own if not isinstance(one, torch.Generator)]
        return *drawn_outside_torch(), *states

    def complete(self, live: Live, batch: Any) -> Any:
        """Compute and store what is missing of a batch's samples.

        Args:
            live: names the samples; its phase is under way, and verified.
            batch: the loaded batch; None if it was not loaded.

        Returns:
            The loaded batch if one must be handed out, else None.

        Raises:
            OtherStateError: something is missing, and the model would now compute something else, or may be
                running in another thread.
            CacheError: a batch cannot be taken apart as the first one could.
        """
        feed, phase = live.feed, live.phase
        assert phase is not None
        count = len(live.indices)
        feed.forget_moved(live.rows)
        loads = feed.loads_again(phase.ghosts)
        if not loads and feed.is_whole(phase):
            return None
        absent = feed.missing(phase, live.rows)
        if feed.places is not None and absent.any():
            absent[:] = True  # each at its place
        if loads and batch is None:
            batch = feed.reader.load_now(live.indices)
        if absent.any():
            if self.thread not in (None, get_ident()):  # the batch is completed when it comes
                raise OtherStateError("the model may be running")
            if self.state.number() != live.key:
                raise OtherStateError("values of a former state would be computed")
            if self.weights_moved(live.supply):
                raise CacheError(MOVING)
            if backend_state(feed.link.device) != feed.link.backends:
                raise CacheError(
                    "the model is called under other settings of torch (sdpa_kernel, torch.backends, "
                    "threads, a TorchFunctionMode) than those under which batches are made. Put them around "
                    "the whole loop."
                )
            where = absent.nonzero().flatten().tolist()
            if batch is None:
                part = feed.reader.load_now([live.indices[i] for i in where])
                leaves = feed.shape.check(part, len(where))
            else:
                part, leaves = batch, feed.shape.check(batch, count)
                leaves = leaves if len(where) == count else [leaf[where] for leaf in leaves]
            if not feed.reload and feed.shape.has_other_values(part):
                if feed.views > 1:
                    raise CacheError(
                        "batches hold numbers or texts that are no tensors and differ from batch to batch. "
                        "They would be loaded again, and with views= that is another draw. Leave them out."
                    )
                feed.reload = loads = True  # numbers or texts that differ from batch to batch
                batch = batch if batch is not None else feed.reader.load_now(live.indices)
            found = self._captured(feed, self.stored_cuts(feed, phase.cut), leaves, len(where))
            self.put(feed, found.values, leaves, live.rows[absent])
        elif loads:
            feed.shape.check(batch, count)
        return batch if loads else None

    def stored_cuts(self, feed: Feed, cut: Cut) -> list[Cut]:
        """Return the cuts whose values are stored: this one, and later ones for which there is room."""
        later = [other for _, other in self.book.later(feed.link.form)]
        return [cut, *(other for other in later if all(site in feed.sites for site in other.frontier))]

    def _captured(self, feed: Feed, cuts: list[Cut], leaves: list[torch.Tensor], count: int) -> Captured:
        """Run the prefix on the given samples; some of them are repeated if bits need a larger batch."""
        size = feed.fitting(count)
        if size != count:
            repeated = [number % count for number in range(size)]
            leaves = [leaf[repeated] for leaf in leaves]
        found = self.run(feed.link, cuts, feed.link.build(leaves), batch=size)
        if size != count:
            for site, value in found.values.items():
                if site in feed.sites:
                    layout = feed.sites[site].layout
                    found.values[site] = layout.from_rows(layout.to_rows(value)[:count])
        return found

    def put(self, feed: Feed, values: Values, leaves: list[torch.Tensor], rows: torch.Tensor) -> None:
        """Store what is not there yet of the values and tensors of a batch of `rows` (int64)."""
        feed.forget_draws(rows)
        wanted = torch.ones(len(rows), dtype=torch.bool)
        if feed.views > 1:  # a sample that stands there twice was drawn twice
            first = {row: place for place, row in reversed([*enumerate(rows.tolist())])}
            wanted = torch.tensor([first[row] == place for place, row in enumerate(rows.tolist())])
        # one after the other: what is put in rows may be a copy
        stored = ((feed.sites[site], value) for site, value in values.items() if site in feed.sites)
        made = ((one.column, one.layout.to_rows(value)) for one, value in stored)
        loaded = ((column, leaves[number].detach()) for number, column in feed.leaves.items())
        for column, given in itertools.chain(made, loaded):
            absent = column.missing(rows) & wanted
            if absent.any():
                column.put(rows[absent], given if bool(absent.all()) else given[absent])

    def weights_moved(self, supply: Supply) -> bool:
        """Return whether frozen weights changed since this was last asked; what is stale is forgotten."""
        moves = self.state.look_at_weights()
        if moves == supply.moves:
            return False
        supply.moves = moves  # they may have been written with what they held, as DDP does at its start
        return self.drop_stale(supply.feeds)

    def drop_stale(self, feeds: Iterable[Feed]) -> bool:
        """Forget stored values whose weights changed since they were computed; return whether some were."""
        behind = [(feed, states) for feed in feeds if (states := feed.weights)]
        if not behind:
            return False
        tensors = named_tensors(self.model)
        jointly = functools.cache(lambda names: joint_state([tensors[name] for name in sorted(names)]))
        each = functools.cache(lambda names: {item[0]: item for item in quick_state(tensors, names)})
        stale = False
        for feed, states in behind:  # most of them have the same weights behind
            names = frozenset(name for state in states for name, *_ in state if name in tensors)
            looked = states, jointly(names)
            if looked != feed.looked:
                stale |= feed.forget_stale(each(names))
                feed.looked = looked
        return stale
