"""`capture`: run a model up to its cut, and note what is to be stored and what skipped calls return."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.ghost import Ghost, ghost
from layerwise.cache.replay.intercepting import Forward, Intercepted
from layerwise.cache.replay.layout import Layout, copied, memory_order
from layerwise.layers.forms import without_data
from layerwise.layers.structures import Arguments, map_tensors, tensors_in


class _Stop(BaseException):
    """Ends a forward pass of which nothing more is needed; no model catches it by ``except Exception``."""


@dataclass
class Skeleton:
    """What a skipped call returned, without the data.

    Attributes:
        output: the structure, with a meta tensor in place of each tensor.
        batch: number of samples when it was taken.
        layouts: for each tensor, how it depends on the batch size; None where it does not.
    """

    output: Any
    batch: int
    layouts: list[Layout | None] = field(default_factory=list)
    _ghosts: dict[Any, Ghost] = field(default_factory=dict)

    def ghost(self, slot: int, batch: int, device: torch.device) -> Ghost:
        """Return what stands for a tensor of the output: the same in each step, as nothing is in it."""
        made = self._ghosts.get((slot, batch, device))
        if made is None or made.stands_for.was_written:
            layout, meta = self.layouts[slot], tensors_in(self.output)[slot]
            shape = tuple(meta.shape) if layout is None else layout.shape(tuple(meta.shape), batch)
            made = ghost(shape, meta.dtype, device, order=memory_order(meta))
            self._ghosts[slot, batch, device] = made
        return made


@dataclass
class Captured:
    """What one recording pass saw.

    Attributes:
        values: at each site.
        skeletons: of each skipped call.
        not_come: calls that lead to the values and did not come: the model took another way.
        seconds: that the pass took.
    """

    values: dict[Site, torch.Tensor]
    skeletons: dict[CallId, Skeleton]
    not_come: set[CallId] = field(default_factory=set)
    seconds: float = 0.0


def capture(
    model: nn.Module, cuts: Iterable[Cut], given: Arguments, *, batch: int, skeletons: bool = True
) -> Captured:
    """Run the model until the values at all sites of all `cuts` are there: one pass serves several phases.

    `skeletons` also notes what each skipped call returns (needed once for each shape of input). What is
    returned are copies of the values, detached; sites that this pass did not reach are missing.
    """
    watch = _Watch(list(cuts), batch, skeletons)
    with watch, contextlib.suppress(_Stop):
        model(*given[0], **given[1])
    return watch.found


class _Watch(Intercepted):
    """Sees the values at the sites of `cuts`, and stops the pass when all of them are there."""

    def __init__(self, cuts: list[Cut], batch: int, skeletons: bool) -> None:
        super().__init__({module: path for cut in cuts for module, path in cut.paths.items()})
        self.found = Captured({}, {}, {call for cut in cuts for call in cut.leading})
        self._batch = batch
        self._wanted: defaultdict[CallId, set[Site]] = defaultdict(set)
        for site in (site for cut in cuts for site in (*cut.frontier, *cut.constants)):
            self._wanted[site.call].add(site)
        self._shaped = {call for cut in cuts for call in cut.skipped} if skeletons else set()
        self._waiting: set[CallId | Site] = {*chain.from_iterable(self._wanted.values()), *self._shaped}

    def answer(self, call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call, and look at its arguments and its output."""
        self.found.not_come.discard(call)
        self._take(call, "in", tensors_in((args, kwargs)))
        output = original(*args, **kwargs)
        if call in self._shaped:
            self.found.skeletons[call] = Skeleton(map_tensors(output, without_data), self._batch)
            self._waiting.discard(call)
        self._take(call, "out", tensors_in(output))
        return output

    def _take(self, call: CallId, side: str, tensors: list[torch.Tensor]) -> None:
        for site in self._wanted.get(call, ()):
            if site.side == side and site.slot < len(tensors):
                self.found.values[site] = copied(tensors[site.slot])
                self._waiting.discard(site)
        if not self._waiting:
            raise _Stop
