"""`FrozenPart`: runs the frozen part of a model, and stores what it gives."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from layerwise.cache.changes.fingerprint import joint_state, named_tensors, quick_state
from layerwise.cache.cutting.book import CutBook, OtherStateError
from layerwise.cache.cutting.cut import Cut, Site
from layerwise.cache.live import Live
from layerwise.cache.proof.evenness import ElementwiseLog
from layerwise.cache.replay.link import Link, backend_state
from layerwise.cache.replay.passes import Captured, capture
from layerwise.cache.samples.feed import Feed, Phase, padded
from layerwise.cache.samples.supply import Supply
from layerwise.cache.traceless import traceless
from layerwise.errors import CacheError
from layerwise.layers.isolation import uncompiled
from layerwise.layers.randomness import drawn_outside_torch, seed_everything

logger = logging.getLogger("layerwise.cache")

_BUSY: WeakSet[nn.Module] = WeakSet()  # models that run for a cache

MOVING = "the frozen weights change while an epoch runs"


class FrozenPart:
    """Runs the frozen part of a model up to a cut, for the cache's own purposes.

    Args:
        model: the model.
        book: knows its cuts, and whether its weights move.

    """

    def __init__(self, model: nn.Module, book: CutBook) -> None:
        self.model, self.book = model, book

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

    def run(
        self,
        link: Link,
        cuts: list[Cut],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        batch: int,
        skeletons: bool,
        seed: int | None = None,
        log: ElementwiseLog | None = None,
    ) -> Captured:
        """Run the model up to the last site, leaving no trace in it, its arguments and the random numbers.

        Gradients are on where the loop has them on: some kernels give other last bits without. Frozen layers
        keep nothing for them.

        Raises:
            CacheError: it does not call the modules that it called on the first batch.
        """
        args, kwargs = link.apart(args, kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.running())
            stack.enter_context(traceless(self.model))  # it may go another way, and run to its end
            stack.enter_context(torch.set_grad_enabled(link.grad))
            for kind, enabled, dtype in link.autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            if seed is not None:
                seed_everything(seed)
            before = drawn_outside_torch() if log is not None else ()
            with contextlib.ExitStack() as watching:
                if log is not None:  # it does not see what compiled functions do
                    watching.enter_context(uncompiled())
                    watching.enter_context(log)
                found = capture(self.model, cuts, args, kwargs, batch=batch, skeletons=skeletons)
            if log is not None and drawn_outside_torch() != before:
                raise CacheError(
                    "the frozen part draws random numbers of Python's or numpy's, and what they decide "
                    "cannot be seen."
                )
        if found.not_come:
            raise CacheError(
                f"{min(found.not_come).path} runs for some samples of a batch and not for others."
            )
        return found

    def complete(self, feed: Feed, phase: Phase, live: Live, batch: Any) -> Any:
        """Compute and store what is missing of a batch's samples.

        Args:
            feed: whose samples.
            phase: under way, and verified.
            live: names the samples.
            batch: the loaded batch; None if it was not loaded.

        Returns:
            The loaded batch if one must be handed out, else None.

        Raises:
            OtherStateError: something is missing, and the model would now compute something else.
            CacheError: a batch cannot be taken apart as the first one could.
        """
        assert phase.cut is not None
        assert feed.shape is not None
        count = len(live.indices)
        feed.forget_moved(live.rows)
        loads = feed.loads_again(phase.ghosts)
        if not loads and feed.is_whole(phase.cut, phase.ghosts):
            return None
        absent = feed.missing(phase.cut, phase.ghosts, live.rows)
        if feed.places is not None and absent.any():
            absent[:] = True  # each at its place
        if loads and batch is None:
            batch = feed.reader.load_now(live.indices)
        if absent.any():
            if self.book.state() != live.key:
                raise OtherStateError("values of a former state would be computed")
            if self.weights_moved(live.supply):
                raise CacheError(MOVING)
            assert feed.link is not None
            if backend_state(feed.link.device) != feed.link.backends:
                raise CacheError(
                    "the model is called under other settings of torch (sdpa_kernel, torch.backends, "
                    "threads) than those under which batches are made. Put them around the whole loop."
                )
            where = absent.nonzero().flatten().tolist()
            if batch is None:
                part = feed.reader.load_now([live.indices[i] for i in where])
                leaves = feed.shape.check(part, len(where))
            else:
                part, leaves = batch, feed.shape.check(batch, count)
                leaves = leaves if len(where) == count else [leaf[where] for leaf in leaves]
            if not feed.reload and feed.shape.has_other_values(part):
                feed.reload = loads = True  # numbers or texts that differ from batch to batch
                batch = batch if batch is not None else feed.reader.load_now(live.indices)
            later = [cut for _, cut in self.book.later(feed.link.form)]
            cuts = [phase.cut, *(cut for cut in later if all(site in feed.sites for site in cut.frontier))]
            found = self._captured(feed, cuts, leaves, len(where))
            self.put(feed, found.values, leaves, live.rows[absent])
        elif loads:
            feed.shape.check(batch, count)
        return batch if loads else None

    def _captured(self, feed: Feed, cuts: list[Cut], leaves: list[torch.Tensor], count: int) -> Captured:
        """Run the prefix on the given samples; fewer than a full batch are repeated if bits need it."""
        assert feed.link is not None
        size = count if feed.fits(count) else feed.full
        if size != count:
            repeated = padded(range(count), size)
            leaves = [leaf[repeated] for leaf in leaves]
        args, kwargs = feed.link.build(leaves)
        found = self.run(feed.link, cuts, args, kwargs, batch=size, skeletons=False)
        if size != count:
            for site, value in found.values.items():
                if site in feed.sites:
                    layout = feed.sites[site].layout
                    found.values[site] = layout.from_rows(layout.to_rows(value)[:count])
        return found

    def put(
        self,
        feed: Feed,
        values: Mapping[Site, torch.Tensor],
        leaves: list[torch.Tensor],
        rows: torch.Tensor,
    ) -> None:
        """Store what is not there yet of the values and tensors of a batch of `rows` (int64)."""
        for site, value in values.items():
            stored = feed.sites.get(site)
            if stored is not None:
                absent = stored.column.missing(rows)
                if absent.any():
                    taken = stored.layout.to_rows(value)
                    stored.column.put(rows[absent], taken if bool(absent.all()) else taken[absent])
        for number, column in feed.leaves.items():
            column.put(rows, leaves[number].detach().cpu())

    def weights_moved(self, supply: Supply) -> bool:
        """Return whether frozen weights changed since this was last asked; what is stale is forgotten."""
        moves = self.book.look_at_weights()
        if moves == supply.moves:
            return False
        supply.moves = moves  # they may have been written with what they held, as DDP does at its start
        return any([self.drop_stale(feed) for feed in supply.feeds])

    def drop_stale(self, feed: Feed) -> bool:
        """Forget stored values whose weights changed since they were computed; return whether some were."""
        behind = {site: stored.weights for site, stored in feed.sites.items()} | feed.constant_weights
        if not behind:
            return False
        names = {name for weights in behind.values() for name, *_ in weights}
        tensors = named_tensors(self.model)
        looked = behind, joint_state([tensors[name] for name in sorted(names & tensors.keys())])
        if looked == feed.looked:
            return False
        now = {item[0]: item for item in quick_state(tensors, names & tensors.keys())}
        stale = [
            site for site, weights in behind.items() if any(now.get(item[0]) != item for item in weights)
        ]
        feed.looked = None if stale else looked
        for site in stale:
            logger.info("prefix cache: the frozen weights before %s changed; computed again", site)
            feed.sites.pop(site, None)
        if stale:
            feed.constants.clear()
            feed.constant_weights.clear()
            feed.unverify()
        return bool(stale)
