"""`Calls`: what happens when the model is called while batches are handed out.

A hook sees every call of the model. A call with a batch that was handed out is either replayed from stored
values, or, for the first batch of a phase, observed: computed plainly, and compared with a replay. All other
calls run as they are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from layerwise.cache.comparing import same_bits
from layerwise.cache.cutting.cut import NothingToSkipError
from layerwise.cache.frozen import MOVING, FrozenPart
from layerwise.cache.live import Live
from layerwise.cache.observing import Observer
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.replay.handed import Handed, real
from layerwise.cache.replay.hooks import RAISED, OnlyHere, RootHook, hook_count
from layerwise.cache.replay.kernels import autocast_state, backend_state
from layerwise.cache.replay.link import Link, OpenArgumentError, find_link, known_arguments
from layerwise.cache.replay.replaying import Replay, check_replayed
from layerwise.cache.samples.batchshape import OtherShapeError
from layerwise.cache.samples.supply import COMPILED, one_line
from layerwise.cache.store.room import give_back_memory
from layerwise.cache.store.shelf import NoPlaceError
from layerwise.cache.telling import told
from layerwise.cache.traceless import apart, normal_tensors
from layerwise.errors import CacheError, LayerwiseError
from layerwise.layers.structures import map_tensors, tensors_in

logger = logging.getLogger("layerwise.cache")


class Calls:
    """Watches one model's calls.

    Args:
        frozen: runs the model for the cache.
        observer: looks at the first batch of a phase.
    """

    def __init__(self, frozen: FrozenPart, observer: Observer) -> None:
        self._frozen, self._observer = frozen, observer
        self._model, self._state = frozen.model, frozen.state
        self._hook = RootHook(self._model)
        self._at_hand: list[Collection[Live]] = []
        self._leaving: list[tuple[Collection[Live], contextlib.ExitStack]] = []
        self._replaying = False  # the call under way is a replay

    @contextlib.contextmanager
    def expecting(self, lives: Collection[Live]) -> Iterator[None]:
        """Within: calls of the model are seen, and what is in `lives` may come to it: the loop has got it."""
        self._at_hand.append(lives)
        try:
            with self._hook.attached(self._before):
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
        return list(chain.from_iterable(self._at_hand))

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Recognise a batch that was handed out, and act on it."""
        if torch.compiler.is_dynamo_compiling():  # which follows this code, too, and no call into logging
            for live in self._lives:
                live.supply.reason = COMPILED
            return None
        if self._replaying or self._frozen.busy or torch.compiler.is_compiling():
            return None  # the model calls itself, the cache calls it, or torch.export with tensors of its own
        for hook in reversed(self._model._forward_pre_hooks.values()):
            if hook is self._hook.hook:
                break
            if not isinstance(hook, OnlyHere):  # it came later, and what it does to the arguments is unknown
                self._hook.come_last()
                return self._with_real(args, kwargs)
        if self._leaving:
            self._hook.at_end(lambda output: self.end_leavers())
        if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            for live in self._lives:  # their tensors have no memory that could be looked at
                if not live.supply.reason:
                    live.supply.refuse(
                        "a transform of torch.func, or forward differentiation, calls the model"
                    )
            return self._with_real(args, kwargs)
        lives = self._lives[::-1]
        for live in lives:
            if live.shape is not None or live.phase is None or not live.feed.holds_under:
                continue
            link = live.feed.link
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
            tag = tensor.tag if isinstance(tensor, Handed) else None
            return isinstance(tensor, Ghost) and not (others and tag is not None and id(tag[0]) not in tags)

        if not any(map(is_ours, tensors_in((args, kwargs)))):
            return None
        return map_tensors((args, kwargs), lambda tensor: real(tensor) if is_ours(tensor) else tensor)

    def _begin_replay(self, live: Live, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        feed, phase, self._frozen.thread = live.feed, live.phase, get_ident()
        assert phase is not None
        if phase.reason and not live.replayed:
            live.supply.called_in = self._state.number()  # perhaps not that for which it was made
            return None
        if not (live.replayed or self._is_completed(live)):
            return None  # it was handed out real
        if self._frozen.weights_moved(live.supply):
            live.supply.refuse(MOVING)
        state = live.supply.called_in = self._state.number()
        changed = (
            bool(live.supply.reason)
            or live.key != state
            or not link.same_constants(args, kwargs)
            or autocast_state(link.device) != link.autocast
            or backend_state(link.device) != link.backends
            or not feed.has_values(phase, live.rows)  # forgotten since, as weights changed
        )
        if changed:  # other modes than when the batch was made: this call needs the real samples
            return _with_samples(live, link, args, kwargs)
        values = feed.values(phase, live.rows, link.device)
        live.supply.replays += 1
        skeletons = phase.fixed.skeletons
        replay = Replay(phase.cut, values, skeletons, batch=len(live.rows), device=link.device).__enter__()
        self._replaying = True
        self._hook.at_end(functools.partial(self._end_replay, replay))
        return None

    def _end_replay(self, replay: Replay, output: Any) -> None:
        self._replaying = False
        replay.__exit__()
        if output is not RAISED:
            check_replayed(output, replay.not_come)

    def _is_completed(self, live: Live) -> bool:
        """Compute what is missing of a batch that was handed out in another state; say if that went."""
        if not live.may_be_replayed or live.supply.views > 1 or self._state.number() != live.key:
            return False
        try:
            with apart():
                self._frozen.complete(live, live.batch)
        except (CacheError, OSError) as error:
            live.not_completed(error)
            return False
        return True

    def _observe(self, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a batch in the plain loop; whatever goes wrong only means that nothing is cached."""
        try:
            with self._frozen.running():
                self._look(live, args, kwargs)
        except OpenArgumentError as error:  # the batch may come again: a text is generated, then scored
            live.supply.not_looked_at = str(error)
        except CacheError as error:
            live.seen = True
            live.supply.refuse(str(error))

    def _look(self, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out how the call is made of the batch, and have the observer do the rest."""
        link = find_link(live.leaves, args, kwargs, self._model.modules())
        if link is None:
            return
        live.seen, self._frozen.thread = True, get_ident()
        if _get_current_dispatch_mode_stack():
            live.supply.is_watched = True
            return  # it would see the cache's own passes, and perhaps count them: a later batch is looked at
        live.key = live.supply.called_in = self._state.number()  # modes may have changed since it was made
        phase = live.phase = live.feed.phase_of(live.key)
        if phase.verified or phase.reason:
            return
        self._state.settings.before_forward()
        self._hook.at_end(lambda output: self._state.settings.after_forward())
        try:
            with apart():
                compare = self._observer.observe(live, link, (args, kwargs))
            self._hook.at_end(functools.partial(_compare, live, compare))
        except OtherShapeError as error:
            live.supply.sort_anew(error)
        except NothingToSkipError as error:
            phase.refuse(str(error))
            logger.info("prefix cache off: %s", error)
        except (LayerwiseError, OSError) as error:
            live.supply.refuse(str(error), phase)
        except Exception as error:  # the model's and the dataset's own code ran: training must go on
            live.supply.refuse(f"looking at the first batch raised {one_line(error)}", phase)
        give_back_memory()


def _with_samples(live: Live, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the arguments of a call with the samples in place of ghosts; None if there are none.

    Raises:
        CacheError: the samples as they were drawn are not at hand.
    """
    if not any(isinstance(leaf, Ghost) for leaf in live.leaves):
        return None
    leaves = live.feed.reader.leaves(live.indices)  # what is drawn was drawn when the batch was made
    if live.supply.views > 1:
        for given, loaded in zip(live.leaves, leaves):
            if not (isinstance(given, Ghost) or same_bits(given.cpu(), loaded)):
                raise CacheError(
                    "the model is called in another state (train or eval mode, what learns, autocast) than "
                    "the batch was made for. With views= its samples cannot be loaded again: another loading "
                    "is another draw. Set the state before the loop asks for the batch."
                )
    return link.build(leaves, (args, kwargs))


def _compare(live: Live, compare: Callable[[Any], None], output: Any) -> None:
    """Compare the output of an observed call with that of its replay."""
    if output is RAISED:
        return
    try:
        if not tensors_in(output):
            raise CacheError(
                "the model returns no tensor, so a replay cannot be compared with the plain call."
            )
        with normal_tensors():
            compare(output)
        logger.info("prefix cache: %s", told(live.phase))
    except (CacheError, OSError) as error:
        live.supply.refuse(str(error), live.phase, warns=isinstance(error, NoPlaceError))
