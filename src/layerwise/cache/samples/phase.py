"""`Phase`: what the cache knows of one state of the model, for samples of one shape."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.cache.cutting.cut import Cut
from layerwise.cache.replay.fixed import Fixed
from layerwise.cache.store.decision import Decision


@dataclass
class Phase:
    """One combination of trainable parameters and train/eval modes, for one loader.

    Attributes:
        cut: where the pass is cut; None before the first batch was seen, or if it cannot be.
        reason: why it is not cached; ``""`` if it is.
        verified: a replayed batch was bit for bit the plain one; False again if it is refused later.
        ghosts: leaves of the batch that are not loaded.
        fixed: what the skipped calls give for every batch alike; None before the first one was seen.
        decision: what was chosen.
    """

    cut: Cut | None = None
    reason: str = ""
    verified: bool = False
    ghosts: frozenset[int] = frozenset()
    fixed: Fixed | None = None
    decision: Decision | None = None
