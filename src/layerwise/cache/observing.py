"""`Observer`: what happens to a model at the first batch of a phase.

The first batch of each phase goes through the plain model. On the way, the cut is found, the prefix's
values are computed and proved to be independent of the other samples, a replay is run, and its output is
compared with the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.fingerprint import named_tensors
from layerwise.cache.cutting.cut import Cut, Values
from layerwise.cache.frozen import FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.proof.checkpoints import check_backward, is_checkpointed
from layerwise.cache.proof.evenness import OpLog
from layerwise.cache.proof.mixing import MixedError
from layerwise.cache.proof.outputs import Result
from layerwise.cache.proof.proving import prove
from layerwise.cache.replay.fixed import Fixed
from layerwise.cache.replay.ghost import ghost
from layerwise.cache.replay.layout import copied, memory_order
from layerwise.cache.replay.link import Link, versions_of
from layerwise.cache.replay.replaying import Replay, check_replayed
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.supply import one_line
from layerwise.cache.stock import Stock
from layerwise.cache.store.decision import kept
from layerwise.cache.traceless import traceless
from layerwise.errors import CacheError
from layerwise.layers.devices import clock_s
from layerwise.layers.structures import Arguments, map_tensors


class OtherValuesError(CacheError):
    """The frozen part gives other values now than those that an earlier phase stored."""


@dataclass(frozen=True)
class _Seen:
    """The call of the model that is looked at.

    Attributes:
        live: the batch.
        link: how it reached the model.
        given: ``(args, kwargs)``.
        later: cuts of later phases and runs, with the epochs that each lasts.
        known: what is known of other phases that is the same for every batch.
    """

    live: Live
    link: Link
    given: Arguments
    later: list[tuple[int, Cut]]
    known: list[Fixed]

    @property
    def phase(self) -> Phase:
        """The one that is under way."""
        assert self.live.phase is not None
        return self.live.phase

    def arguments(self) -> Arguments:
        """Return ``(args, kwargs)`` for a pass of the cache's, which may write to them."""
        return self.link.apart(self.given)


class Observer:
    """Proves that a cut is exact before it is used.

    Args:
        frozen: runs the model.
        stock: keeps values.
        keep_inputs: batches hold the real inputs.
        exact: what is stored is what a pass would give; see also `layerwise.cache.proof.proving.prove`.
        epochs: that the loop will run; None if unknown.
    """

    def __init__(
        self, frozen: FrozenPart, stock: Stock, *, keep_inputs: bool, exact: bool, epochs: int | None
    ) -> None:
        self._frozen, self._model, self._book, self._stock = frozen, frozen.model, frozen.book, stock
        self._keep_inputs, self._exact, self._epochs = keep_inputs, exact, epochs

    def observe(self, live: Live, link: Link, given: Arguments) -> Callable[[Any], None]:
        """Find the cut, compute the batch's values, and run a replay.

        Returns:
            What to call with the plain forward's output: it compares, decides, and stores.

        Raises:
            CacheError: this phase cannot be cached. So may the returned function, and OSError.
        """
        feed = live.feed
        if versions_of(live.leaves) != live.versions:
            raise CacheError(
                "the loop writes into the batch before the model gets it, and may write something else next "
                "time. Do that in the dataset's transform."
            )
        assert live.shape is not None
        self._frozen.drop_stale([feed])
        if not feed.full:
            live.shape.require(feed.kind or live.shape.rows)
            feed.shape, feed.full = live.shape, len(live.indices)
        live.shape.require(feed.shape.rows)
        if feed.sites and not feed.link.is_like(link):
            raise CacheError("the model is called in another way than for the first batch.")
        feed.forget_moved(live.rows)
        feed.forget_draws(live.rows)
        cut = self._book.find(link.apart(given), link.form)
        seen = _Seen(live, link, given, self._book.later(link.form), feed.fixed)
        later = [other for _, other in seen.later]
        feed.keep_only([cut, *later])

        def tried() -> Iterator[list[Cut]]:
            yield [cut, *later]
            if later:  # a later phase's value may be at fault
                yield [cut]
            if cut.entered:  # code between modules may need values
                yield [self._book.find(seen.arguments(), link.form, at_inputs=False)]

        problem: CacheError | None = None
        for cuts in tried():
            try:
                return self._prepared(seen, cuts)
            except OtherValuesError:
                raise
            except MixedError as error:
                problem = error
                if self._book.note_mixed(link.form, error.site):
                    try:
                        return self.observe(live, link, given)
                    except MixedError:  # nearer to where the mixing begins
                        raise
                    except CacheError:  # what mixes may be all there is
                        raise error from None
            except CacheError as error:
                problem = error
        assert problem is not None
        raise problem

    def _prepared(self, seen: _Seen, cuts: list[Cut]) -> Callable[[Any], None]:
        """Compute the batch's values at the first of `cuts`, and at the others on the way; replay it."""
        live, link, phase, cut = seen.live, seen.link, seen.phase, cuts[0]
        feed, phase.cut = live.feed, cut
        around = set[nn.Module]().union(*map(self._book.in_or_around, cuts))
        as_stored = any(link.is_called_as(one, around) for one in feed.holds_under)
        if not feed.sites or not (as_stored or all(site in feed.sites for site in cut.frontier)):
            self._compute_under(feed, link)
            as_stored = True
        phase.ghosts = feed.ghosts_of(cut, self._keep_inputs)
        fixed = Fixed(link)
        for known in seen.known:
            if link.is_called_as(known.link, around):
                fixed.take(known, cuts)
        phase.fixed = fixed
        prefix_s = 0.0
        if self._exact and as_stored and self._is_stored(feed, phase, live.rows):
            values = feed.values(phase, live.rows, link.device)
        else:
            log, run, count = OpLog(), self._frozen.run, len(live.indices)
            found = run(link, cuts, seen.given, batch=count, skeletons=True, log=log)
            prefix_s, values = found.seconds, found.values
            agrees = self._agrees_with_stored(feed, values, live.rows)
            if agrees and not as_stored:
                feed.holds_under.append(link)
            elif not as_stored:
                self._compute_under(feed, link)
            prove(feed, link, cuts, found, log, live.indices, live.leaves, run, exact=self._exact)
            feed.forget_moved(live.rows)
            fixed.note(cuts, found, named_tensors(self._model))
            self._stock.adopt(feed, cuts, values, live.rows)
        expected, suffix_s = self._replayed(seen, values)

        def compare(output: Any) -> None:
            problem = expected.difference(output)
            if problem:
                raise CacheError(f"a replayed batch is not the plain one: {problem}.")
            self._store(seen, values, prefix_s, suffix_s)

        return compare

    def _compute_under(self, feed: Feed, link: Link) -> None:
        """Have the values of a feed computed as the loop calls the model now; forget the others."""
        feed.keep_only([])
        feed.holds_under = [link]

    def _agrees_with_stored(self, feed: Feed, values: Values, rows: torch.Tensor) -> bool:
        """Return whether values of a batch are those that an earlier phase stored; False if it stored none.

        Raises:
            OtherValuesError: they are not.
        """
        compared = False
        for site, value in values.items():
            stored = feed.sites.get(site)
            if stored is None or feed.views > 1:  # each draw is another one
                continue
            if not stored.column.agrees(rows, stored.layout.to_rows(value), exact=self._exact):
                raise OtherValuesError(
                    f"the value at {site} is not what was stored, though no frozen weight changed: it "
                    f"depends on train or eval mode, on autocast, on whether gradients are on, or on a "
                    f"setting of torch. Use a PrefixCache for each."
                )
            compared |= bool(stored.column.filled[rows].any())
        return compared

    def _is_stored(self, feed: Feed, phase: Phase, rows: torch.Tensor) -> bool:
        """Whether a batch can be replayed from what was stored in an earlier phase."""
        return phase.fixed.has_skeletons(phase.cut) and feed.has_values(phase, rows)

    def _replayed(self, seen: _Seen, values: Values) -> tuple[Result, float]:
        """Replay this batch; return what the model gives, and its seconds. All side effects are undone."""
        link, phase = seen.link, seen.phase
        numbers = iter(link.leaves)
        args, kwargs = map_tensors(
            seen.arguments(),
            lambda t: (
                ghost(tuple(t.shape), t.dtype, t.device, order=memory_order(t))
                if next(numbers) in phase.ghosts
                else t
            ),
        )
        fresh = {site: copied(values[site]) for site in (*phase.cut.frontier, *phase.cut.constants)}
        checkpointed: list[bool] = []
        with traceless(self._model):
            try:
                with Replay(
                    phase.cut, fresh, phase.fixed.skeletons, batch=len(seen.live.indices), device=link.device,
                    answered=lambda: checkpointed.append(is_checkpointed()),
                ) as replay:  # fmt: skip
                    started_s = clock_s(link.device)
                    output = self._model(*args, **kwargs)
                    suffix_s = clock_s(link.device) - started_s
                if any(checkpointed):
                    check_backward(output, self._model.parameters())
            except CacheError:
                raise
            except Exception as error:  # code between modules reads a ghost in a way of its own (numpy)
                raise CacheError(f"a replay raised {one_line(error)}") from error
        check_replayed(output, replay.not_come)
        return Result.of(output), suffix_s

    def _store(self, seen: _Seen, values: Values, prefix_s: float, suffix_s: float) -> None:
        feed, rows, phase, later = seen.live.feed, seen.live.rows, seen.phase, seen.later
        if self._is_stored(feed, phase, rows):
            phase.decision = kept(phase.cut, feed.sites[phase.cut.frontier[0]].column.where, feed.rows)
        else:
            epochs = self._book.phases.epochs_now() or self._epochs
            if later and epochs is not None:  # the same pass serves later phases as well
                epochs += sum(length for length, _ in later)
            phase.decision = self._stock.decide(
                feed, phase.cut, phase.ghosts, values,
                batch=len(rows), prefix_s=prefix_s, suffix_s=suffix_s, epochs=epochs,
            )  # fmt: skip
        why = "" if self._keep_inputs else feed.why_loaded_again(phase.ghosts)
        if why:
            reason = f"{phase.decision.reason}; samples are loaded again in each epoch: {why}"
            phase.decision = replace(phase.decision, reason=reason)
        where = phase.decision.storage
        if where == "off":
            raise CacheError(phase.decision.reason)
        self._stock.provide(feed, phase.cut, phase.ghosts, values, where)
        self._stock.provide_later(feed, later, values, where)
        self._frozen.put(feed, values, seen.live.leaves, rows)
        phase.verified = True
