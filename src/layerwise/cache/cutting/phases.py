"""`Phases`: what will learn in the phases and runs to come, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class PhaseSource(Protocol):
    """What the cache asks of a `layerwise.Tuner`: which parameters learn in the phases to come."""

    @property
    def phase_index(self) -> int:
        """Number of the phase that is under way."""
        ...

    @property
    def plan(self) -> Any:
        """Has ``phases``, each with ``epochs``."""
        ...

    def trainable_names(self, phase_index: int | None = None) -> frozenset[str]:
        """Return the names of the parameters that learn in a phase."""
        ...


class Phases:
    """The phases of a plan and the runs after it, as far as they are known.

    Args:
        tuner: knows the phases; None if there is none.
        upcoming: what runs to come will train, names of parameters -> epochs.
    """

    def __init__(self, tuner: PhaseSource | None, upcoming: Mapping[frozenset[str], int]) -> None:
        self._tuner, self._upcoming = tuner, upcoming

    @property
    def draws_groups(self) -> bool:
        """Whether the present phase draws anew every few steps which groups learn."""
        if self._tuner is None:
            return False
        return bool(getattr(self._tuner.plan.phases[self._tuner.phase_index], "sample_groups", None))

    def later(self, now: frozenset[str]) -> dict[frozenset[str], int]:
        """Return what learns in later phases and runs -> for how many epochs.

        Only where more learns than `now`: what is frozen then is frozen now, so its values are final.
        """
        found: dict[frozenset[str], int] = dict(self._upcoming)
        if self._tuner is not None:
            for index in range(self._tuner.phase_index + 1, len(self._tuner.plan.phases)):
                names = self._tuner.trainable_names(index)
                found[names] = found.get(names, 0) + _epochs(self._tuner.plan.phases[index])
        return {names: epochs for names, epochs in found.items() if names > now}

    def epochs_now(self) -> int | None:
        """Return how many epochs the present set of trainable parameters lasts, if a tuner knows."""
        if self._tuner is None:
            return None
        now = self._tuner.trainable_names(self._tuner.phase_index)
        return sum(
            _epochs(self._tuner.plan.phases[index])
            for index in range(self._tuner.phase_index, len(self._tuner.plan.phases))
            if self._tuner.trainable_names(index) == now
        )


def _epochs(phase: Any) -> int:
    """Return a phase's epochs; one that is counted in steps lasts at least a part of one."""
    return int(getattr(phase, "epochs", None) or 1)
