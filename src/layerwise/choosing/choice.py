"""`Choice`: a strategy by name, with the options and the base rate that go with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from layerwise.layers.layermap import LayerMap
from layerwise.plans.parsing import parse_strategy
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Norms, Schedule

HEAD_RATE, BODY_RATE = 1e-2, 1e-3
"""Base rates for AdamW: a linear probe bears, and in few epochs needs, a larger one than a network.
The second is for networks with batch-norm."""


@dataclass(frozen=True)
class Choice:
    """A strategy by name, and the options its plan is built with.

    Attributes:
        strategy: as `layerwise.plans.parsing.parse_strategy` reads it.
        why: one sentence.
        options: of the strategy: `norms`, `l2_sp`, ...
        lr: base rate that goes with it, for AdamW.
    """

    strategy: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = BODY_RATE

    @property
    def described(self) -> str:
        """The strategy and what its options add, in words."""
        norms, words = self.options.get("norms"), []
        if norms is not None:
            words.append(
                {"calibrate": "recalibrated batch-norm", "freeze": "frozen batch-norm"}[norms.policy]
            )
        if "l2_sp" in self.options:
            words.append(f"L2-SP {self.options['l2_sp']:g}")
        return f"{self.strategy} with {' and '.join(words)}" if words else self.strategy

    def plan(self, layers: LayerMap, *, epochs: int) -> Plan:
        """Return the plan for `layers`."""
        schedule = Schedule(shape="cosine", warmup_frac=0.05)
        return parse_strategy(
            self.strategy, layers, **{"epochs": epochs, "schedule": schedule, **self.options}
        )


def probe(why: str, *, norms: Norms | None = None) -> Choice:
    """Return the choice of a linear probe."""
    return Choice("linear_probe", why, {} if norms is None else {"norms": norms}, HEAD_RATE)


def full(why: str) -> Choice:
    """Return the choice of full fine-tuning."""
    return Choice("full", why)


def last_groups(k: int, groups: int, why: str) -> Choice:
    """Return the choice of the last `k` groups, at least one and at most all but one of `groups`."""
    k = max(1, min(k, groups - 1))
    return Choice(f"top_k(k={k})", why) if k > 1 else probe(why)
