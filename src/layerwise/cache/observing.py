"""`Observer`: what happens to a model at the first batch of a phase, and where samples are computed.

The first batch of each phase goes through the plain model. On the way, the cut is found, the prefix's
values are computed and proved to be independent of the other samples, a replay is run, and its output is
compared with the plain one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerwise.cache.batchshape import BatchShape
from layerwise.cache.checking import ContentGuard, Flow, check_backward, difference, is_checkpointed, is_near
from layerwise.cache.cut import Cut, Site
from layerwise.cache.cutbook import CutBook, OtherStateError
from layerwise.cache.decision import kept
from layerwise.cache.evenness import ElementwiseLog
from layerwise.cache.feed import Feed, Phase, padded
from layerwise.cache.fingerprint import joint_state, named_tensors, quick_state
from layerwise.cache.ghost import ghost
from layerwise.cache.layout import copied, memory_order
from layerwise.cache.link import Link, backend_state, versions_of
from layerwise.cache.proving import prove
from layerwise.cache.reading import drawn_outside_torch, kept_random_state, reseed, same_bits
from layerwise.cache.replay import Captured, capture, check_replayed, replaying
from layerwise.cache.stock import Stock
from layerwise.cache.supply import Supply
from layerwise.errors import CacheError
from layerwise.layers.isolation import untouched
from layerwise.layers.structures import map_tensors, tensors_in

logger = logging.getLogger("layerwise.cache")

MOVING = "the frozen weights change while an epoch runs"


class OtherValuesError(CacheError):
    """The frozen part gives other values now than those that an earlier phase stored."""


class Live:
    """A batch that was handed out, until the loop asks for the next one."""

    def __init__(self, supply: Supply, feed: Feed, rows: torch.Tensor, indices: list[int], key: Any) -> None:
        self.supply, self.feed, self.rows, self.indices, self.key = supply, feed, rows, indices, key
        self.tag = object()  # of its ghosts; not the batch itself, which would keep itself alive
        self.batch: Any = None
        self.leaves: list[torch.Tensor] = []
        self.versions: list[int] = []  # of the leaves when they were handed out
        self.shape: BatchShape | None = None  # of a real one that is looked at when it reaches the model
        self.replayed = False  # with ghosts
        self.seen = False  # it reached the model
        self.is_passed_over = False  # a later one reached the model before it
        self.phase: Phase | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether something is to be done when it comes to the model, as it has not yet."""
        to_complete = self.phase is not None and self.phase.verified and not self.phase.reason
        return not (self.seen or self.supply.reason) and (self.shape is not None or to_complete)


class Observer:
    """Computes the values of samples, and proves that a cut is exact before it is used.

    Args:
        model: the model.
        book: knows its cuts.
        stock: keeps values.
        keep_inputs: batches hold the real inputs.
        exact: see `layerwise.cache.proving.prove`.
        epochs: that the loop will run; None if unknown.

    Attributes:
        busy: the model runs for the cache itself just now, and not for the loop.
    """

    def __init__(
        self,
        model: nn.Module,
        book: CutBook,
        stock: Stock,
        *,
        keep_inputs: bool,
        exact: bool,
        epochs: int | None,
    ) -> None:
        self.model, self.book, self.stock = model, book, stock
        self.keep_inputs, self.exact, self.epochs = keep_inputs, exact, epochs
        self.busy = False

    def observe(
        self, live: Live, link: Link, phase: Phase, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], None]:
        """Find the cut, compute the batch's values, and run a replay.

        Returns:
            What to call with the plain forward's output: it compares, decides, and stores.

        Raises:
            CacheError: this phase cannot be cached. So may the returned function, and OSError.
        """
        feed, count = live.feed, len(live.indices)
        if versions_of(live.leaves) != live.versions:
            raise CacheError(
                "the loop writes into the batch before the model gets it, and may write something else next "
                "time. Do that in the dataset's transform."
            )
        assert live.shape is not None
        self.drop_stale(feed)
        if feed.shape is None:
            live.shape.require(feed.kind or live.shape.rows)
            feed.shape, feed.full = live.shape, count
        live.shape.require(feed.shape.rows)
        if feed.link is not None and feed.sites and not feed.link.is_like(link):
            raise CacheError("the model is called in another way than for the first batch.")
        feed.forget_moved(live.rows)
        find = functools.partial(self.book.find, form=link.form, changing=link.changing)
        cut = find(*link.apart(args, kwargs))
        later = [other for _, other in self.book.later(link.form)]
        feed.forget_other([cut, *later])
        self.stock.release_unused(feed, [cut, *later])
        problem: CacheError | None = None
        for cuts in ([cut, *later], [cut]) if later else ([cut],):  # a later phase's value may be at fault
            try:
                return self._prepared(live, link, phase, cuts, args, kwargs)
            except OtherValuesError:
                raise
            except CacheError as error:
                problem = error
        if problem is not None and not cut.entered:
            raise problem
        cut = find(*link.apart(args, kwargs), at_inputs=False)  # code between modules may need values
        return self._prepared(live, link, phase, [cut], args, kwargs)

    def _prepared(
        self,
        live: Live,
        link: Link,
        phase: Phase,
        cuts: list[Cut],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Callable[[Any], None]:
        """Compute the batch's values at the first of `cuts`, and at the others on the way; replay it."""
        feed, count, cut = live.feed, len(live.indices), cuts[0]
        phase.cut = cut
        as_stored = self._is_as_stored(feed, link, cut)
        if not feed.sites or not (as_stored or all(site in feed.sites for site in cut.frontier)):
            self._compute_under(feed, link)
            as_stored = True
        phase.ghosts = feed.ghosts_of(cut, self.keep_inputs)
        prefix_s = 0.0
        if as_stored and self._is_stored(feed, cut, live.rows):
            values = feed.values(cut, live.rows, link.device)
        else:
            started = time.perf_counter()
            log = ElementwiseLog()
            found = self.run_prefix(link, cuts, args, kwargs, batch=count, skeletons=True, log=log)
            prefix_s = time.perf_counter() - started
            values = found.values
            if feed.sites and not self._agrees_with_stored(feed, values, live.rows) and not as_stored:
                self._compute_under(feed, link)
            prove(feed, link, cuts, found, log, live.indices, live.leaves, self.run_prefix, exact=self.exact)
            feed.forget_moved(live.rows)
            self._note_constants(feed, cuts)
            self.stock.adopt(feed, cuts, values, live.rows)
            missing = [site for site in (*cut.frontier, *cut.constants) if site not in values]
            if missing:
                raise CacheError(f"{missing[0]} was not reached when the model ran again.")
        started = time.perf_counter()
        expected, flow = self._replayed(live, link, phase, values, args, kwargs)
        suffix_s = time.perf_counter() - started
        leaves = list(live.leaves)

        def compare(output: Any) -> None:
            problem = difference(expected, output) or flow.difference(output)
            if problem:
                raise CacheError(f"a replayed batch is not the plain one: {problem}.")
            self._store(feed, phase, values, leaves, live.rows, prefix_s, suffix_s)

        return compare

    def _is_as_stored(self, feed: Feed, link: Link, cut: Cut) -> bool:
        """Return whether modes, autocast, gradients and kernels are those for which values are stored."""
        modes = all(module.training == (module in feed.awake) for module in self.book.in_or_around(cut))
        return modes and feed.link is not None and feed.link.is_called_as(link)

    def _compute_under(self, feed: Feed, link: Link) -> None:
        """Have the values of a feed computed as the loop calls the model now; forget the others."""
        self.stock.release_unused(feed, ())
        feed.link = link
        feed.awake = frozenset(module for module in self.model.modules() if module.training)

    def _agrees_with_stored(
        self, feed: Feed, values: Mapping[Site, torch.Tensor], rows: torch.Tensor
    ) -> bool:
        """Return whether values of a batch are those that an earlier phase stored; False if it stored none.

        Raises:
            OtherValuesError: they are not.
        """
        compared = False
        for site, value in values.items():
            stored = feed.sites.get(site)
            if stored is None or feed.views > 1:  # each draw is another one
                continue
            there = stored.column.filled[rows]
            fresh, kept = stored.layout.to_rows(value)[there].cpu(), stored.column.get(rows[there])
            equal = same_bits if self.exact else is_near
            if fresh.dtype != kept.dtype or not equal(fresh, kept):
                raise OtherValuesError(
                    f"the value at {site} is not what was stored, though no frozen weight changed: it "
                    f"depends on train or eval mode, on autocast, on whether gradients are on, or on a "
                    f"setting of torch. Use a PrefixCache for each."
                )
            compared |= bool(there.any())
        return compared

    def _note_constants(self, feed: Feed, cuts: list[Cut]) -> None:
        """Note the state of the weights behind values that do not depend on the input."""
        tensors = named_tensors(self.model)
        for cut in cuts:
            for site in cut.constants:
                feed.constant_weights[site] = quick_state(tensors, cut.sources[site].tensors)

    def _is_stored(self, feed: Feed, cut: Cut, rows: torch.Tensor) -> bool:
        """Whether a batch can be replayed from what was stored in an earlier phase."""
        return (
            all(site in feed.constants for site in cut.constants)
            and all(call in feed.skeletons for call in cut.skipped)
            and all(
                site in feed.sites and not feed.sites[site].column.missing(rows).any()
                for site in cut.frontier
            )
        )

    def _replayed(
        self,
        live: Live,
        link: Link,
        phase: Phase,
        values: Mapping[Site, torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[list[torch.Tensor], Flow]:
        """Return what the model gives for this batch when it is replayed; undo all side effects."""
        assert phase.cut is not None
        numbers = iter(link.leaves)
        args, kwargs = map_tensors(
            link.apart(args, kwargs),
            lambda t: (
                ghost(tuple(t.shape), t.dtype, t.device, order=memory_order(t))
                if next(numbers) in phase.ghosts
                else t
            ),
        )
        fresh = {site: copied(values[site]) for site in (*phase.cut.frontier, *phase.cut.constants)}
        checkpointed: list[bool] = []
        with (
            kept_random_state(),
            untouched(self.model),
            ContentGuard(self.model),
        ):
            try:
                with replaying(
                    phase.cut, fresh, live.feed.skeletons, batch=len(live.indices), device=link.device,
                    answered=lambda: checkpointed.append(is_checkpointed()),
                ) as not_come:  # fmt: skip
                    output = self.model(*args, **kwargs)
                if any(checkpointed):
                    check_backward(output, self.model.parameters())
            except CacheError:
                raise
            except Exception as error:  # code between modules reads a ghost in a way of its own (numpy)
                why = " ".join(str(error).split())[:200]
                raise CacheError(f"a replay raised {type(error).__name__}: {why}") from error
        check_replayed(output, not_come)
        return [tensor.detach() for tensor in tensors_in(output)], Flow.of(output)

    def _store(
        self,
        feed: Feed,
        phase: Phase,
        values: Mapping[Site, torch.Tensor],
        leaves: list[torch.Tensor],
        rows: torch.Tensor,
        prefix_s: float,
        suffix_s: float,
    ) -> None:
        assert phase.cut is not None
        assert feed.link is not None
        later = self.book.later(feed.link.form)
        if self._is_stored(feed, phase.cut, rows):
            phase.decision = kept(phase.cut, feed.sites[phase.cut.frontier[0]].column.where, feed.rows)
        else:
            epochs = self.book.epochs_now() or self.epochs
            if later and epochs is not None:  # the same pass serves later phases as well
                epochs += sum(length for length, _ in later)
            phase.decision = self.stock.decide(
                feed, phase.cut, phase.ghosts, values,
                batch=len(rows), prefix_s=prefix_s, suffix_s=suffix_s, epochs=epochs,
            )  # fmt: skip
        where = phase.decision.storage
        if where == "off":
            raise CacheError(phase.decision.reason)
        self.stock.provide(feed, phase.cut, phase.ghosts, values, where)
        self.stock.provide_later(feed, later, values, where)
        self._put(feed, values, leaves, rows)
        phase.verified = True

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
        if not feed.reload and feed.is_whole(phase.cut, phase.ghosts):
            return None
        absent = feed.missing(phase.cut, phase.ghosts, live.rows)
        if feed.places is not None and absent.any():
            absent[:] = True  # each at its place
        if feed.reload and batch is None:
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
                feed.reload = True  # numbers or texts that differ from batch to batch
                batch = batch if batch is not None else feed.reader.load_now(live.indices)
            later = [cut for _, cut in self.book.later(feed.link.form)]
            cuts = [phase.cut, *(cut for cut in later if all(site in feed.sites for site in cut.frontier))]
            found = self._captured(feed, cuts, leaves, len(where))
            self._put(feed, found.values, leaves, live.rows[absent])
        elif feed.reload:
            feed.shape.check(batch, count)
        return batch if feed.reload else None

    def _captured(self, feed: Feed, cuts: list[Cut], leaves: list[torch.Tensor], count: int) -> Captured:
        """Run the prefix on the given samples; fewer than a full batch are repeated if bits need it."""
        assert feed.link is not None
        size = count if feed.fits(count) else feed.full
        if size != count:
            repeated = padded(range(count), size)
            leaves = [leaf[repeated] for leaf in leaves]
        args, kwargs = feed.link.build(leaves)
        found = self.run_prefix(feed.link, cuts, args, kwargs, batch=size, skeletons=False)
        if size != count:
            for site, value in found.values.items():
                if site in feed.sites:
                    layout = feed.sites[site].layout
                    found.values[site] = layout.from_rows(layout.to_rows(value)[:count])
        return found

    def run_prefix(
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
        """
        args, kwargs = link.apart(args, kwargs)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "busy", self.busy)
            self.busy = True
            stack.enter_context(untouched(self.model))
            stack.enter_context(torch.set_grad_enabled(link.grad))
            stack.enter_context(ContentGuard(self.model))  # it may go another way, and run to its end
            for kind, enabled, dtype in link.autocast:
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=False))
            if seed is not None:
                reseed(seed)
            if log is None:
                return capture(self.model, cuts, args, kwargs, batch=batch, skeletons=skeletons)
            stack.enter_context(log)
            before = drawn_outside_torch()
            found = capture(self.model, cuts, args, kwargs, batch=batch, skeletons=skeletons)
            if drawn_outside_torch() != before:
                raise CacheError(
                    "the frozen part draws random numbers of Python's or numpy's, and what they decide "
                    "cannot be seen."
                )
            return found

    def _put(
        self,
        feed: Feed,
        values: Mapping[Site, torch.Tensor],
        leaves: list[torch.Tensor],
        rows: torch.Tensor,
    ) -> None:
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
