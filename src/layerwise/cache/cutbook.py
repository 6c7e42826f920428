"""`CutBook`: the cuts of one model, now and in the phases to come."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import nn

from layerwise.cache.cut import Cut, NothingToSkipError, find_cut
from layerwise.errors import CacheError
from layerwise.layers.recording import record

Modes = tuple[bool, ...]


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


class CutBook:
    """Finds cuts, and remembers them.

    Args:
        model: whose cuts.
        tuner: knows the phases to come; None if there is none.
    """

    def __init__(self, model: nn.Module, tuner: PhaseSource | None) -> None:
        self._model = model
        self._tuner = tuner
        self._found: dict[frozenset[str], list[tuple[Modes, Cut]]] = {}
        self._foreseen: dict[frozenset[str], Cut | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look again which modules and parameters the model has; once an epoch, as it takes a while."""
        self._modules = list(self._model.modules())
        self._parameters = list(self._model.parameters())

    def state(self) -> tuple[tuple[bool, ...], Modes]:
        """Return what a cut depends on besides the model's code: who learns, and each module's mode."""
        return (
            tuple([parameter.requires_grad for parameter in self._parameters]),
            tuple([module.training for module in self._modules]),
        )

    def known(self) -> Cut | None:
        """Return a cut that holds in the present state, if one was found before.

        A cut that was found in train mode also holds in eval mode: with fewer modules training, fewer
        operations are random. The reverse is not true.
        """
        modes = self.state()[1]
        for recorded, cut in self._found.get(self._trainable(), ()):
            if all(now <= then for now, then in zip(modes, recorded, strict=True)):
                return cut
        return None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, at_inputs: bool = True) -> Cut:
        """Return the cut for the present state, recording one forward pass if it has to be looked for.

        The same recording tells the cuts of the tuner's later phases.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward.
            at_inputs: see `find_cut`; False replaces the cut that was found before.

        Raises:
            NothingToSkipError: there is none.
            RecordingError: the forward pass cannot be recorded.
        """
        cut = self.known()
        if cut is not None and at_inputs:
            return cut
        if self._tuner is not None and getattr(self._phase, "sample_groups", None):
            raise NothingToSkipError(
                "the phase draws anew every few steps which groups learn, so no prefix stays frozen for long."
            )
        recording = record(self._model, args, kwargs, grad=torch.is_grad_enabled())
        for names in self._later_names():
            if names not in self._foreseen and at_inputs:
                self._foreseen[names] = None
                with contextlib.suppress(CacheError):
                    self._foreseen[names] = find_cut(recording, names)
        trainable = self._trainable()
        cut = find_cut(recording, trainable, at_inputs=at_inputs)
        self._found.setdefault(trainable, []).insert(0, (self.state()[1], cut))
        return cut

    def later(self) -> list[tuple[int, Cut]]:
        """Return the foreseen cuts of the tuner's later phases, with the epochs that each phase lasts."""
        if self._tuner is None:
            return []
        lengths: dict[frozenset[str], int] = {}
        for index in range(self._tuner.phase_index + 1, len(self._tuner.plan.phases)):
            names = self._tuner.trainable_names(index)
            lengths[names] = lengths.get(names, 0) + _epochs(self._tuner.plan.phases[index])
        cuts = ((epochs, self._foreseen.get(names)) for names, epochs in lengths.items())
        return [(epochs, cut) for epochs, cut in cuts if cut is not None]

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

    @property
    def _phase(self) -> Any:
        return None if self._tuner is None else self._tuner.plan.phases[self._tuner.phase_index]

    def _later_names(self) -> list[frozenset[str]]:
        if self._tuner is None:
            return []
        phases = range(self._tuner.phase_index + 1, len(self._tuner.plan.phases))
        return [self._tuner.trainable_names(index) for index in phases]

    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, p in self._model.named_parameters() if p.requires_grad)


def _epochs(phase: Any) -> int:
    """Return a phase's epochs; one that is counted in steps lasts at least a part of one."""
    return int(getattr(phase, "epochs", None) or 1)
