"""`CutBook`: the cuts of one model, now and in the `Phases` to come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from layerwise.cache.changes.modelstate import ModelState, Modes
from layerwise.cache.cutting.cut import Cut, NothingToSkipError, Site
from layerwise.cache.cutting.dirty import MOST_MIXED
from layerwise.cache.cutting.search import find_cut
from layerwise.errors import CacheError
from layerwise.layers.recording import Recording, record
from layerwise.layers.structures import Arguments

if TYPE_CHECKING:
    from layerwise.tuning.tuner import Tuner


class Form(NamedTuple):
    """One way to call the model, whichever loader's batches it is for.

    Attributes:
        arguments: their structure, and those that are no tensors.
        changing: numbers of the tensors that the loop makes, and that are not the data's.
    """

    arguments: Hashable
    changing: frozenset[int] = frozenset()


class Phases:
    """What will learn in the phases of a plan and the runs after it, as far as that is known.

    Args:
        tuner: knows the phases; None if there is none.
        upcoming: what runs to come will train, names of parameters -> epochs.
    """

    def __init__(self, tuner: Tuner | None, upcoming: Mapping[frozenset[str], int]) -> None:
        self._tuner, self._upcoming = tuner, upcoming

    @property
    def draws_groups(self) -> bool:
        """Whether the present phase draws anew every few steps which groups learn."""
        return self._tuner is not None and bool(self._tuner.phase.sample_groups)

    def later(self, now: frozenset[str]) -> dict[frozenset[str], int]:
        """Return what learns in later phases and runs -> for how many epochs.

        Only where more learns than `now`: what is frozen then is frozen now, so its values are final.
        """
        found = dict(self._upcoming)
        for names, epochs in self._from_now()[1:]:
            found[names] = found.get(names, 0) + epochs
        return {names: epochs for names, epochs in found.items() if names > now}

    def epochs_now(self) -> int | None:
        """Return how many epochs the present set of trainable parameters lasts, if a tuner knows."""
        phases = self._from_now()
        return sum(epochs for names, epochs in phases if names == phases[0][0]) if phases else None

    def _from_now(self) -> list[tuple[frozenset[str], int]]:
        """Return what learns in the present phase and in each later one of the plan, with its epochs.

        One that is counted in steps lasts at least a part of an epoch.
        """
        if self._tuner is None:
            return []
        names, now = self._tuner.trainable_names, self._tuner.phase_index
        phases = self._tuner.plan.phases
        return [(names(index), phases[index].epochs or 1) for index in range(now, len(phases))]


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
        phases: to come.

    Attributes:
        state: of the model.
        phases: to come.
    """

    def __init__(self, model: nn.Module, phases: Phases) -> None:
        self._model = model
        self.state, self.phases = ModelState(model), phases
        self._cuts: defaultdict[tuple[frozenset[str], Form, int], list[_Known]] = defaultdict(list)
        self._mixed: defaultdict[Form, set[Site]] = defaultdict(set)

    def find(self, given: Arguments, form: Form, *, at_inputs: bool = True) -> Cut:
        """Return the cut for the present state, recording one forward pass if it has to be looked for.

        The same recording tells the cuts of later phases.

        Args:
            given: to the model's forward.
            form: of the call.
            at_inputs: see `find_cut`; False replaces the cut that was found before.

        Raises:
            NothingToSkipError: there is none.
            RecordingError: the forward pass cannot be recorded.
            CacheError: it writes to a parameter.
        """
        trainable = self.state.trainable()
        known = self._known(trainable, form) if at_inputs else None
        if isinstance(known, Cut):
            return known
        if self.phases.draws_groups:
            raise NothingToSkipError(
                "the phase draws anew every few steps which groups learn, so no prefix stays frozen for long."
            )
        if isinstance(known, str):
            raise NothingToSkipError(known)
        recording = record(self._model, *given, grad=torch.is_grad_enabled())
        self.state.settings.remembers(recording.remembering, recording.keeping)
        if recording.rewritten:
            raise CacheError(
                f"the forward pass itself changes the parameter {min(recording.rewritten)!r}, and passes "
                f"of the cache's own would change it as well."
            )
        values = recording.values
        if any(values[key].input in form.changing for op in recording.ops for key in op.mutates):
            raise CacheError("the model writes to an argument that is not one of the batch's tensors.")
        self._foresee(recording, form)
        mixed = self._mixed[form]
        cut = find_cut(recording, trainable, changing=form.changing, mixed=mixed, at_inputs=at_inputs)
        self._note(trainable, form, _Known(self.state.modes(), cut))
        return cut

    def note_mixed(self, form: Form, site: Site) -> bool:
        """Note that the value at a site mixes samples, so that other cuts are found from now on.

        Returns:
            False if that is no use: it was known, or there are too many.
        """
        mixed = self._mixed[form]
        if site in mixed or len(mixed) == MOST_MIXED:
            return False
        mixed.add(site)
        for key in [key for key in self._cuts if key[1] == form]:
            del self._cuts[key]
        return True

    def _known(self, trainable: frozenset[str], form: Form) -> Cut | str | None:
        """Return a cut that holds in the present state, or why there is none, if that was found before."""
        found = self._cuts.get((trainable, form, self.state.settings.number()), ())
        return next((one.cut for one in found if one.holds()), None)

    def _note(self, trainable: frozenset[str], form: Form, known: _Known) -> None:
        self._cuts[trainable, form, self.state.settings.number()].insert(0, known)

    def _foresee(self, recording: Recording, form: Form) -> None:
        """Find the cuts of the later phases, which spares them a recording of their own.

        A phase that unfreezes a group puts it into train mode. That makes nothing random or dependent on
        the batch in what the cut skips, unless it is a module there, or one around it, that went from eval
        to train mode since.
        """
        modes = self.state.modes()
        for names in self.phases.later(self.state.trainable()):
            try:
                cut = find_cut(recording, names, changing=form.changing, mixed=self._mixed[form])
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
        known = (
            (epochs, self._known(names, form))
            for names, epochs in self.phases.later(self.state.trainable()).items()
        )
        return [(epochs, cut) for epochs, cut in known if isinstance(cut, Cut)]
