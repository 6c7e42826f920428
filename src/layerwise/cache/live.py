"""`Live`: a batch that was handed out, until the loop is done with it."""

from __future__ import annotations

from typing import Any

import torch

from layerwise.cache.cutting.book import OtherStateError
from layerwise.cache.samples.batchshape import BatchShape, OtherShapeError
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.supply import NOT_LOADED, Supply, one_line
from layerwise.errors import CacheError


class Live:
    """A batch that was handed out, until the loop asks for the next one."""

    def __init__(
        self,
        supply: Supply,
        feed: Feed,
        rows: torch.Tensor,
        indices: list[int],
        key: Any,
        phase: Phase | None,
    ) -> None:
        self.supply, self.feed, self.rows, self.indices = supply, feed, rows, indices
        self.key, self.phase = key, phase
        self.tag = object()  # of its ghosts; not the batch itself, which would keep itself alive
        self.batch: Any = None
        self.leaves: list[torch.Tensor] = []
        self.versions: list[int] = []  # of the leaves when they were handed out
        self.shape: BatchShape | None = None  # of a real one that is looked at when it reaches the model
        self.replayed = False  # with ghosts
        self.seen = False  # it reached the model

    @property
    def is_awaited(self) -> bool:
        """Whether something is to be done when it comes to the model, as it has not yet."""
        to_complete = self.phase is not None and self.phase.verified
        return not (self.seen or self.supply.reason) and (self.shape is not None or to_complete)

    def not_completed(self, error: CacheError | OSError) -> None:
        """Act on what was raised when its missing values were to be computed."""
        if isinstance(error, OtherShapeError):
            self.sort_anew(error)
        elif not isinstance(error, OtherStateError):
            self.supply.refuse(str(error), self.phase)

    def sort_anew(self, other: OtherShapeError) -> None:
        """Have the loader's samples sorted by shape, as this batch has another; refuse it if that fails."""
        try:
            reason = "" if self.supply.sort() else str(other)
        except Exception as error:  # the dataset's own code; the loop may pass over what it cannot load
            reason = NOT_LOADED + one_line(error)
        if reason:
            self.supply.refuse(reason)
