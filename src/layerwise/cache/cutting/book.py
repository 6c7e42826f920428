"""`CutBook`: the cuts of one model, now and in the phases to come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from layerwise.cache.changes.settings import Settings, Stillness, parameters_in
from layerwise.cache.cutting.cut import Cut, NothingToSkipError, Site
from layerwise.cache.cutting.search import find_cut
from layerwise.errors import CacheError
from layerwise.layers.recording import Recording, record

Modes = Mapping[nn.Module, bool]
"""Module -> whether it is in train mode; without those that do the same in either mode."""

Form = Hashable
"""How the model is called: the structure of its arguments, and those that are no tensors (`Link.form`)."""

_MIXED = 4  # values of one form that may mix samples: to find each takes a recording and some passes

_MODELESS = frozenset(
    {
        *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.Softplus),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle, nn.ZeroPad2d),
    }
)
"""Layers whose forward does the same in train and in eval mode."""


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


class OtherStateError(CacheError):
    """The model is in another state than a batch was made for."""


@dataclass(frozen=True)
class _Known:
    """What a recording told of some set of parameters that learn.

    Attributes:
        modes: of the modules on which it depends, when it was recorded.
        cut: where the pass is cut, or why there is nothing to skip.
    """

    modes: Modes
    cut: Cut | str

    def holds(self) -> bool:
        """Return whether it is so in the present modes.

        A cut that was found in train mode also holds in eval mode: with fewer modules training, fewer
        operations are random. The reverse is not true.
        """
        if isinstance(self.cut, str):
            return all(module.training >= mode for module, mode in self.modes.items())
        return all(module.training <= mode for module, mode in self.modes.items())


class CutBook:
    """Finds cuts, and remembers them.

    Args:
        model: whose cuts.
        tuner: knows the phases to come; None if there is none.
        upcoming: what runs to come will train, names of parameters -> epochs.

    Attributes:
        settings: of the model's modules.
        last_state: what `state` returned last.
        moves: how often frozen weights seemed to have changed, as far as `look_at_weights` saw.
    """

    def __init__(
        self, model: nn.Module, tuner: PhaseSource | None, upcoming: Mapping[frozenset[str], int]
    ) -> None:
        self._model = model
        self._tuner = tuner
        self._upcoming = upcoming
        self.last_state = 0
        self._states: dict[Any, int] = {}
        self._seen: Any = None  # what `last_state` stands for
        self._cuts: defaultdict[tuple[frozenset[str], Form, int], list[_Known]] = defaultdict(list)
        self._mixed: defaultdict[Form, set[Site]] = defaultdict(set)
        self.settings = Settings(model.modules())
        self._all = list(model.modules())
        self._still, self._still_state = Stillness(self._all), -1  # the state in which it was made
        self.moves = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again which modules and parameters the model has; once an epoch, as it takes a while."""
        self.look_at_weights()
        self._all = list(self._model.modules())
        self._modules = [
            module
            for module in self._all
            if type(module) not in _MODELESS or module._forward_hooks or module._forward_pre_hooks
        ]
        self._parameters = parameters_in(self._all)
        self.settings.refresh(self._all)
        if self.state() != self._still_state:
            self._still, self._still_state = Stillness(self._all), self.last_state

    def state(self) -> int:
        """Return what a replay depends on as a number: who learns, modes, settings, gradients on or off."""
        seen = (
            [parameter.requires_grad for parameter in self._parameters],
            [module.training for module in self._modules],
            self.settings.number(),
            torch.is_grad_enabled(),
        )
        if seen != self._seen:
            learns, modes, settings, grad = self._seen = seen
            known = tuple(learns), tuple(modes), settings, grad
            self.last_state = self._states.setdefault(known, len(self._states))
        return self.last_state

    def differ_in_modes(self, one: int, other: int) -> bool:
        """Return whether two states differ in the modules' modes or in gradients, and in nothing else."""
        known = list(self._states)
        (learns, _, settings, _), (others, _, other_settings, _) = known[one], known[other]
        return one != other and (learns, settings) == (others, other_settings)

    def look_at_weights(self) -> int:
        """Return `moves`, after a look at the weights that were frozen when `refresh` was last called."""
        if not self._still.holds():
            self._still, self._still_state = Stillness(self._all), self.state()
            self.moves += 1
        return self.moves

    def find(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        form: Form,
        changing: frozenset[int] = frozenset(),
        at_inputs: bool = True,
    ) -> Cut:
        """Return the cut for the present state, recording one forward pass if it has to be looked for.

        The same recording tells the cuts of the tuner's later phases.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward.
            form: of the call.
            changing: which of the arguments' tensors are not the data's.
            at_inputs: see `find_cut`; False replaces the cut that was found before.

        Raises:
            NothingToSkipError: there is none.
            RecordingError: the forward pass cannot be recorded.
            CacheError: it writes to a parameter.
        """
        trainable = self._trainable()
        known = self._known(trainable, form) if at_inputs else None
        if isinstance(known, Cut):
            return known
        if self._tuner is not None and getattr(self._phase, "sample_groups", None):
            raise NothingToSkipError(
                "the phase draws anew every few steps which groups learn, so no prefix stays frozen for long."
            )
        if isinstance(known, str):
            raise NothingToSkipError(known)
        recording = record(self._model, args, kwargs, grad=torch.is_grad_enabled())
        self.settings.remembers(recording.remembering, recording.keeping)
        if recording.rewritten:
            raise CacheError(
                f"the forward pass itself changes the parameter {min(recording.rewritten)!r}, and passes "
                f"of the cache's own would change it as well."
            )
        values = recording.values
        if any(values[key].input in changing for op in recording.ops for key in op.mutates):
            raise CacheError("the model writes to an argument that is not one of the batch's tensors.")
        if at_inputs:
            self._foresee(recording, form, changing)
        cut = find_cut(recording, trainable, changing=changing, mixed=self._mixed[form], at_inputs=at_inputs)
        self._note(trainable, form, _Known(self._modes(), cut))
        return cut

    def note_mixed(self, form: Form, site: Site) -> bool:
        """Note that the value at a site mixes samples, so that other cuts are found from now on.

        Returns:
            False if that is no use: it was known, or there are too many.
        """
        mixed = self._mixed[form]
        if site in mixed or len(mixed) == _MIXED:
            return False
        mixed.add(site)
        for key in [key for key in self._cuts if key[1] == form]:
            del self._cuts[key]
        return True

    def _known(self, trainable: frozenset[str], form: Form) -> Cut | str | None:
        """Return a cut that holds in the present state, or why there is none, if that was found before."""
        found = self._cuts.get((trainable, form, self.settings.number()), ())
        return next((one.cut for one in found if one.holds()), None)

    def _note(self, trainable: frozenset[str], form: Form, known: _Known) -> None:
        self._cuts[trainable, form, self.settings.number()].insert(0, known)

    def _foresee(self, recording: Recording, form: Form, changing: frozenset[int]) -> None:
        """Find the cuts of the later phases, which spares them a recording of their own.

        A phase that unfreezes a group puts it into train mode. That makes nothing random or dependent on
        the batch in what the cut skips, unless it is a module there, or one around it, that went from eval
        to train mode since.
        """
        modes = self._modes()
        for names in self._lengths():
            try:
                cut = find_cut(recording, names, changing=changing, mixed=self._mixed[form])
            except NothingToSkipError as error:
                known = _Known(modes, str(error))
            else:
                around = self.in_or_around(cut)
                known = _Known({module: mode for module, mode in modes.items() if module in around}, cut)
            self._note(names, form, known)

    def in_or_around(self, cut: Cut) -> set[nn.Module]:
        """Return the modules of the skipped calls, what is in them, and what they are in.

        A plain container hands its input from one child to the next in either mode, so it does not count.
        """
        found: set[nn.Module] = set()
        for call, module in cut.skipped.items():
            found.update(module.modules())
            parts = call.path.split(".")
            found.update(self._model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
        return {module for module in found if type(module).forward is not nn.Sequential.forward}

    def later(self, form: Form) -> list[tuple[int, Cut]]:
        """Return the cuts of later phases and runs, with the epochs that each lasts.

        Those that hold in the present state: what is computed now is to be used then.
        """
        known = ((epochs, self._known(names, form)) for names, epochs in self._lengths().items())
        return [(epochs, cut) for epochs, cut in known if isinstance(cut, Cut)]

    def _lengths(self) -> dict[frozenset[str], int]:
        """Return what trains in later phases and runs -> for how many epochs.

        Only where more trains than now: what is frozen then is frozen now, so its values are final.
        """
        found: dict[frozenset[str], int] = dict(self._upcoming)
        if self._tuner is not None:
            for index in range(self._tuner.phase_index + 1, len(self._tuner.plan.phases)):
                names = self._tuner.trainable_names(index)
                found[names] = found.get(names, 0) + _epochs(self._tuner.plan.phases[index])
        now = self._trainable()
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

    @property
    def _phase(self) -> Any:
        return None if self._tuner is None else self._tuner.plan.phases[self._tuner.phase_index]

    def _modes(self) -> Modes:
        return {module: module.training for module in self._modules}

    def _trainable(self) -> frozenset[str]:
        return frozenset(name for name, p in self._model.named_parameters() if p.requires_grad)


def _epochs(phase: Any) -> int:
    """Return a phase's epochs; one that is counted in steps lasts at least a part of one."""
    return int(getattr(phase, "epochs", None) or 1)
