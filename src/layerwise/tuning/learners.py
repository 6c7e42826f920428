"""`Learners`: who learns in each phase of a plan and at which multiplier, the norm policy included."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.layers.norms import find_norms, norm_parameters
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.rates import frozen_groups, multipliers, trained
from layerwise.plans.timeline import learning
from layerwise.tuning.matching import check_learning, check_trains, never_trained, parameters_of
from layerwise.tuning.modes import pin_eval
from layerwise.tuning.norms import NormRecord, apply_norms
from layerwise.tuning.param_groups import GroupSpec, group_specs, no_decay_names


class Learners:
    """Makes those parameters of a live model learn that a phase of a plan trains.

    Args:
        model: `set` changes it in place.
        plan: fits `layers`.
        layers: the model's layer map.

    Attributes:
        parameters: the live parameters, by their names in the map.
        norms: what the norms do in the phase that was set last.

    Raises:
        ModelError: the model has other parameters than the map; or a phase trains nothing but what cannot be
            trained.
        PlanError: the norm policy of a phase holds all that its rates would let learn.
    """

    norms: NormRecord

    def __init__(self, model: nn.Module, plan: Plan, layers: LayerMap) -> None:
        self.parameters = parameters_of(model, layers)
        self._model, self._plan, self._layers = model, plan, layers
        self._held = never_trained(model, layers, self.parameters)
        self._exempt = no_decay_names(model, layers)
        self._kinds = norm_parameters(model, self.parameters)
        check_learning(plan, layers, self._held)
        self._names = [self._find_names(phase) for phase in plan.phases]
        for phase, names in zip(plan.phases, self._names):
            check_trains(phase, names)

    def names_now(self) -> frozenset[str]:
        """Return the names of the parameters that learn now."""
        return frozenset(name for name, parameter in self.parameters.items() if parameter.requires_grad)

    def names_in(self, number: int) -> frozenset[str]:
        """Return the names of the parameters that learn in a phase, or may be drawn in it (LISA)."""
        return self._names[number]

    def draw(self, number: int, generator: torch.Generator) -> list[str] | None:
        """Return the trunk groups that learn until the next draw (LISA), input -> output.

        A group of which nothing may learn in the phase is not drawn.

        Args:
            number: of the phase.
            generator: moves on.

        Returns:
            Their names; None where the phase draws none, so that all of its groups learn.
        """
        phase = self._plan.phases[number]
        if phase.sample_groups is None:
            return None
        planned, may_learn = learning(self._plan, number, self._layers), self.names_in(number)
        trunk = [
            group.name
            for group in self._layers
            if group.role == "trunk" and group.name in planned and not may_learn.isdisjoint(group.parameters)
        ]
        order = torch.randperm(len(trunk), generator=generator).tolist()
        return sorted((trunk[i] for i in order[: phase.sample_groups]), key=trunk.index)

    def set(self, number: int, drawn: list[str] | None) -> list[GroupSpec]:
        """Make the model's modes and ``requires_grad`` those of a phase; return its param groups.

        What does not learn loses its gradient.

        Args:
            number: of the phase.
            drawn: see `draw`.
        """
        phase, resting = self._plan.phases[number], _resting(self._layers, drawn)
        given = multipliers(phase, self._layers, resting, self._held)
        frozen = frozen_groups(given, self._layers)
        record = apply_norms(
            self._model, self._layers, frozen, phase.norms, frozen_dropout=phase.frozen_dropout
        )
        still = {id(self._model.get_parameter(name)) for name, value in given.items() if value == 0}
        self.norms = _with_frozen_held(self._model, still, record)
        values = self._trained(phase, resting)
        for name, parameter in self.parameters.items():
            learns = values[name] > 0
            if parameter.requires_grad != learns:
                parameter.requires_grad = learns
            if not learns:
                parameter.grad = None
        return group_specs(self._layers, self.parameters, values, self._exempt)

    @contextmanager
    def all_phases(self) -> Iterator[None]:
        """Within: everything that any phase trains requires gradients."""
        numbers = range(len(self._plan.phases))
        ever = frozenset[str]().union(*map(self.names_in, numbers))
        before = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
        for name in ever:
            self.parameters[name].requires_grad = True
        try:
            yield
        finally:
            for name, wanted in before.items():
                self.parameters[name].requires_grad = wanted

    def _trained(self, phase: Phase, resting: Collection[str]) -> dict[str, float]:
        """Return each parameter's multiplier in a phase, by the norms of the live model."""
        return trained(phase, self._layers, resting, self._held, kinds=self._kinds)

    def _find_names(self, phase: Phase) -> frozenset[str]:
        # Where groups are drawn, norms may learn just while their group is not.
        draws: list[list[str] | None] = [None, []] if phase.sample_groups else [None]
        found = [self._trained(phase, _resting(self._layers, drawn)) for drawn in draws]
        return frozenset(name for values in found for name, value in values.items() if value > 0)


def _with_frozen_held(model: nn.Module, frozen: Set[int], record: NormRecord) -> NormRecord:
    """Hold the statistics of norms that are frozen by their parameters' names, in a group that learns.

    Norms that are to move in frozen groups too are left as they are.

    Args:
        model: changed in place: pins.
        frozen: ids of the parameters that do not learn.
        record: of the other norms.

    Returns:
        The record with them.
    """
    named = []
    for norm in find_norms(model):
        own = list(norm.module.parameters(recurse=False))
        follows = record.policies.get(norm.name) in ("follow", "calibrate")
        is_frozen = follows and own and frozen >= set(map(id, own))
        if is_frozen and pin_eval([norm.module]):
            named.append(norm.name)
    return dataclasses.replace(
        record,
        adapting=tuple(name for name in record.adapting if name not in named),
        fixed=(*record.fixed, *(name for name in named if name not in record.fixed)),
        pinned=record.pinned + len(named),
    )


def _resting(layers: LayerMap, drawn: Collection[str] | None) -> set[str]:
    """Return the groups that rest until the next draw; none where a phase draws none."""
    return set() if drawn is None else {g.name for g in layers if g.role == "trunk"}.difference(drawn)
