"""`Calls`: what happens when the model is called while batches are handed out.

A hook sees every call of the model. A call with a batch that was handed out is either replayed from stored
values, or, for the first batch of a phase, observed: computed plainly, and compared with a replay. All other
calls run as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from layerwise.cache.cutting.cut import CallId, NothingToSkipError
from layerwise.cache.frozen import MOVING, FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.observing import Observer
from layerwise.cache.replay.ghost import Ghost, real
from layerwise.cache.replay.hooks import RootHook, hook_count
from layerwise.cache.replay.link import Link, autocast_state, backend_state, find_link, known_arguments
from layerwise.cache.replay.passes import check_replayed, replaying
from layerwise.cache.samples.batchshape import OtherShapeError
from layerwise.cache.samples.feed import Phase
from layerwise.cache.samples.opening import COMPILED
from layerwise.cache.samples.supply import one_line
from layerwise.cache.store.room import format_bytes, give_back_memory
from layerwise.cache.traceless import normal_tensors
from layerwise.errors import CacheError, LayerwiseError, shorten
from layerwise.layers.structures import map_tensors, tensors_in

logger = logging.getLogger("layerwise.cache")

_TOLD = 4  # sites that are named


class Calls:
    """Watches one model's calls.

    Args:
        frozen: runs the model for the cache.
        observer: looks at the first batch of a phase.
    """

    def __init__(self, frozen: FrozenPart, observer: Observer) -> None:
        self._frozen, self._observer = frozen, observer
        self._model, self._book = frozen.model, frozen.book
        self._hook = RootHook()
        self._at_hand: list[Collection[Live]] = []
        self._leaving: list[tuple[Collection[Live], contextlib.ExitStack]] = []
        self._replay: tuple[contextlib.AbstractContextManager[set[CallId]], set[CallId]] | None = None
        self._observed = False  # the call under way is looked at
        self._comparison: tuple[Live, Callable[[Any], None]] | None = None  # due after an observed call

    @contextlib.contextmanager
    def expecting(self, lives: Collection[Live]) -> Iterator[None]:
        """Within: calls of the model are seen, and what is in `lives` may come to it: the loop has got it."""
        self._at_hand.append(lives)
        try:
            with self._hook.attached(self._model, self._before, self._after):
                yield
        finally:
            self._at_hand = [one for one in self._at_hand if one is not lives]

    def leave(self, lives: Collection[Live], end: contextlib.ExitStack) -> None:
        """Have `end` closed, which expects `lives`, when all of them have come to the model.

        A loop that asks for batches ahead has some left when the epoch has no more of them.
        """
        self._leaving.append((lives, end))
        self.end_leavers()

    def end_leavers(self, *, seen_or_not: bool = False) -> None:
        """Close what `leave` was given, of epochs whose batches have all come, or of all."""
        leaving, self._leaving = self._leaving, []
        for lives, end in leaving:
            if seen_or_not or not any(live.is_awaited for live in lives):
                end.close()
            else:
                self._leaving.append((lives, end))

    @property
    def _lives(self) -> list[Live]:
        return [live for lives in self._at_hand for live in lives]

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Recognise a batch that was handed out, and act on it."""
        if torch.compiler.is_dynamo_compiling():  # which follows this code, too, and no call into logging
            for live in self._lives:
                live.supply.reason = COMPILED
            return None
        if self._frozen.busy:
            return None
        if peek_interpreter_stack() is not None:
            for live in self._lives:  # their tensors have no memory that could be looked at
                live.seen = True
                if not live.supply.reason:
                    live.supply.refuse("a transform of torch.func calls the model")
            return self._with_real(args, kwargs)
        lives = self._lives[::-1]
        for live in lives:
            link = live.feed.link
            if live.shape is not None or live.phase is None or link is None:
                continue
            if link.recognises(args, kwargs, live.leaves, live.tag, live.versions):
                live.seen = True
                return self._begin_replay(live, link, args, kwargs)
        new = [one for one in lives if one.shape is not None and not (one.seen or one.supply.reason)]
        if new:
            live = max(new, key=lambda one: known_arguments(one.leaves, args, kwargs)) if new[1:] else new[0]
            self._observe(live, args, kwargs)
            if live.seen:
                return None
        tensors = {id(tensor) for tensor in tensors_in((args, kwargs))}
        for live in lives:  # in another way than the first time, it came
            live.seen |= live.shape is None and not tensors.isdisjoint(map(id, live.leaves))
        return self._with_real(args, kwargs)  # the loop made something of its own of the batch

    def _with_real(self, args: Any, kwargs: Any) -> Any:
        """Return the arguments with the samples in place of ghosts; None to leave them.

        Ghosts that another cache on this model handed out are its own.
        """
        tags = {id(live.tag) for live in self._lives}
        others = hook_count(self._model) > 1

        def is_ours(tensor: torch.Tensor) -> bool:
            tag = tensor.tag if isinstance(tensor, Ghost) else None
            return isinstance(tensor, Ghost) and not (others and tag is not None and id(tag[0]) not in tags)

        if not any(map(is_ours, tensors_in((args, kwargs)))):
            return None
        return map_tensors((args, kwargs), lambda tensor: real(tensor) if is_ours(tensor) else tensor)

    def _begin_replay(self, live: Live, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        feed, phase = live.feed, live.phase
        if phase is None or phase.cut is None or phase.fixed is None:
            return None
        if not (live.replayed or self._is_completed(live, phase)):
            return None  # it was handed out real
        if self._frozen.weights_moved(live.supply):
            live.supply.refuse(MOVING)
        state = live.supply.called_in = self._book.state()
        changed = (
            bool(live.supply.reason)
            or live.key != state
            or not link.same_constants(args, kwargs)
            or autocast_state(link.device) != link.autocast
            or backend_state(link.device) != link.backends
            or not feed.has_all(phase, live.rows)  # forgotten since, as weights changed
        )
        if changed:  # other modes than when the batch was made: this call needs the real samples
            with feed.reader.unaffected():  # they were drawn when the batch was made
                leaves = tensors_in(feed.reader.load_now(live.indices))
            return link.build(leaves, (args, kwargs))
        values = feed.values(phase.cut, phase.fixed, live.rows, link.device)
        live.supply.replays += 1
        skeletons = phase.fixed.skeletons
        replay = replaying(phase.cut, values, skeletons, batch=len(live.rows), device=link.device)
        self._replay = replay, replay.__enter__()
        return None

    def _is_completed(self, live: Live, phase: Phase) -> bool:
        """Compute what is missing of a batch that was handed out in another state; say if that went."""
        usable = phase.verified and not (phase.reason or live.supply.reason)
        if not usable or not live.feed.fits(len(live.indices)) or self._book.state() != live.key:
            return False
        try:
            with normal_tensors(), saved_tensors_hooks(_without_history, _as_it_is):
                self._frozen.complete(live.feed, phase, live, live.batch)
        except OtherShapeError:  # the next batch that is made will tell
            return False
        except (CacheError, OSError) as error:
            live.supply.refuse(str(error), phase)
            return False
        return True

    def _after(self, output: Any) -> None:
        """See every output of the model, and the end of a call that raised (`output` is then None)."""
        if self._frozen.busy or torch.compiler.is_dynamo_compiling():
            return
        replay, self._replay = self._replay, None
        if replay is not None:
            under_way, not_come = replay
            under_way.__exit__(None, None, None)
            if output is not None:
                check_replayed(output, not_come)
        if self._observed:
            self._observed = False
            self._book.settings.after_forward()
        if self._leaving:
            self.end_leavers()
        comparison, self._comparison = self._comparison, None
        if comparison is None or output is None:
            return
        live, compare = comparison
        try:
            with normal_tensors():
                compare(output)
            logger.info("prefix cache: %s", told(live.phase))
        except (CacheError, OSError) as error:
            live.supply.refuse(str(error), live.phase)

    def _observe(self, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a batch in the plain loop; whatever goes wrong only means that nothing is cached."""
        try:
            with self._frozen.running():
                self._look(live, args, kwargs)
        except CacheError as error:
            live.seen = True
            live.supply.refuse(str(error))

    def _look(self, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out how the call is made of the batch, and have the observer do the rest."""
        link = find_link(live.leaves, args, kwargs)
        if link is None:
            return
        live.seen = True
        live.key = live.supply.called_in = self._book.state()  # modes may have changed since it was made
        phase = live.phase = live.feed.phase_of(live.key)
        if phase.verified or phase.reason:
            return
        self._book.settings.before_forward()
        self._observed = True
        try:
            with normal_tensors(), saved_tensors_hooks(_without_history, _as_it_is):
                self._comparison = live, self._observer.observe(live, link, args, kwargs)
        except OtherShapeError as error:
            live.sort_anew(error)
        except NothingToSkipError as error:
            phase.reason = str(error)
            logger.info("prefix cache off: %s", error)
        except (LayerwiseError, OSError) as error:
            live.supply.refuse(str(error), phase)
        except Exception as error:  # the model's and the dataset's own code ran: training must go on
            live.supply.refuse(f"looking at the first batch raised {one_line(error)}", phase)
        give_back_memory()


def _without_history(tensor: torch.Tensor) -> torch.Tensor:
    """Save a tensor for backward, in place of hooks of the loop's own, such as a checkpoint's.

    An operation that saves its own output as it is would keep itself alive for ever.
    """
    with _disable_current_modes():  # no recording sees it
        return tensor.detach()


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def told(phase: Phase | None) -> str:
    """Return what was chosen for a phase, for people."""
    if phase is None or phase.reason or phase.cut is None or phase.decision is None:
        return f"off: {phase.reason}" if phase is not None and phase.reason else "waiting for the first batch"
    cut, decision = phase.cut, phase.decision
    sites = shorten(cut.frontier, _TOLD)
    text = f"{decision.storage}, cut at {sites} ({cut.first_dirty}): {decision.reason}"
    if cut.returned_bytes_per_sample * 2 > cut.bytes_per_sample:
        text += (
            f"; {format_bytes(cut.returned_bytes_per_sample)} a sample are stored only because the model "
            f"returns or keeps frozen values (of a decoder's keys and values: model.config.use_cache = False)"
        )
    return text
