"""`Live`: a batch that was handed out, until the loop is done with it; `AtHand`: those of an epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise.cache.changes.modelstate import OtherStateError
from layerwise.cache.remedies import CALL_IT
from layerwise.cache.samples.batchshape import BatchShape, OtherShapeError
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.supply import Supply
from layerwise.errors import CacheError

_AHEAD = 64  # batches that a loop may ask for before it passes the first of them to the model
_REAL_AHEAD = 8  # the same of batches that are loaded, as those of the first epoch: they take memory
_NEVER_COMES = f"the loop does not pass the loader's batches to this model as they are{CALL_IT}"
_PATIENCE = 2  # epochs of which nothing came to the model


@dataclass(eq=False)
class Live:
    """A batch that was handed out, until the loop asks for the next one.

    Attributes:
        supply: whose.
        feed: of its samples.
        rows: of the samples; int64.
        indices: of the samples.
        key: the state of the model for which it was made.
        phase: of that state; None if none is known.
        batch: what the loop gets.
        leaves: its tensors.
        versions: of the leaves when they were handed out.
        shape: of a real one that is looked at when it reaches the model.
        replayed: it has ghosts.
        seen: it reached the model.
        tag: of its ghosts; not the batch itself, which would keep itself alive.
    """

    supply: Supply
    feed: Feed
    rows: torch.Tensor
    indices: list[int]
    key: int
    phase: Phase | None
    batch: Any = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    shape: BatchShape | None = None
    replayed: bool = False
    seen: bool = False
    tag: object = field(default_factory=object)

    @property
    def may_be_replayed(self) -> bool:
        """Whether a replay stands for a batch of its size in its phase, once nothing is missing of it."""
        is_verified = self.phase is not None and self.phase.verified
        return is_verified and not self.supply.reason and self.feed.fits(len(self.indices))

    @property
    def is_awaited(self) -> bool:
        """Whether something is to be done when it comes to the model, as it has not yet."""
        to_complete = self.phase is not None and self.phase.verified
        return not (self.seen or self.supply.reason) and (self.shape is not None or to_complete)

    def not_completed(self, error: CacheError | OSError) -> None:
        """Act on what was raised when its missing values were to be computed."""
        if isinstance(error, OtherShapeError):
            self.supply.sort_anew(error)
        elif not isinstance(error, OtherStateError):
            self.supply.refuse(str(error), self.phase)


class AtHand(list[Live]):
    """What a loop has got of an epoch's batches and is still to pass to the model, in order.

    Loops that ask for batches ahead (a prefetcher, Accelerate) have several.

    Args:
        supply: whose batches.
    """

    def __init__(self, supply: Supply) -> None:
        super().__init__()
        self._supply = supply

    def drop_used(self, *, over: bool = False) -> None:
        """Drop the batches with which the loop is done; give up where none ever comes to the model.

        Args:
            over: none of them comes any more.
        """
        supply = self._supply
        if len(self) == 1 and self[0].seen and not over:  # most loops: a step has no time for the rest
            supply.came = True
            self.clear()
            return
        if any(live.seen for live in self):
            supply.came = True
            supply.asks_ahead |= not self[-1].seen
        awaited = [live for live in self if live.is_awaited]
        real = [live for live in awaited if not live.replayed]
        dropped = {*awaited} if over else {*awaited[:-_AHEAD], *real[:-_REAL_AHEAD]}
        self[:] = [live for live in awaited if live not in dropped]
        supply.unseen += over and (not supply.came or bool(supply.not_looked_at))
        if supply.unseen >= _PATIENCE and supply.called_in is None and not supply.reason:
            supply.refuse(supply.not_looked_at or _NEVER_COMES)
