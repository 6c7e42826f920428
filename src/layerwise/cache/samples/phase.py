"""`Phase`: what the cache knows of one state of the model, for samples of one shape."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise.cache.cutting.cut import Cut
from layerwise.cache.replay.fixed import Fixed
from layerwise.cache.store.decision import Decision


@dataclass
class Phase:
    """One combination of trainable parameters and train/eval modes, for one loader.

    Attributes:
        decision: what was chosen; None before.
        verified: a replayed batch was bit for bit the plain one; False again if it is refused later.
        cut: where the pass is cut. This and the following are there once a first batch was replayed.
        ghosts: leaves of the batch that are not loaded.
        fixed: what the skipped calls give for every batch alike.
    """

    decision: Decision | None = None
    verified: bool = False
    cut: Cut = field(init=False)
    ghosts: frozenset[int] = field(init=False)
    fixed: Fixed = field(init=False)

    @property
    def reason(self) -> str:
        """Why it is not cached; ``""`` if it is, and before that is decided."""
        return self.decision.reason if self.decision is not None and self.decision.storage == "off" else ""

    def refuse(self, reason: str) -> None:
        """Decide that it is not cached, if that was not chosen."""
        self.verified = False
        if not self.reason:
            self.decision = Decision("off", reason)
