"""`Learners`: who learns in each phase of a plan and at which multiplier, the norm policy included."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Set
from contextlib import contextmanager

import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.layers.norms import find_norms
from layerwise.plans.plan import Plan
from layerwise.plans.rates import multipliers, overridden
from layerwise.plans.timeline import learning
from layerwise.tuning.matching import (
    check_learning,
    check_trains,
    never_trained,
    parameters_of,
    phases_of_norms_alone,
)
from layerwise.tuning.modes import pin_eval
from layerwise.tuning.norms import NormRecord, apply_norms
from layerwise.tuning.param_groups import GroupSpec, group_specs, no_decay_names


class Learners:
    """Makes those parameters of a live model learn that a phase of a plan trains.

    Args:
        model: changed in place: it gets the modes of the first phase.
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
        self._names: dict[int, frozenset[str]] = {}  # by phase
        self._standing: tuple[int, list[str] | None] = 0, None  # the phase and the draw that are set
        check_learning(plan, layers, self._held)
        for number in phases_of_norms_alone(model, plan, layers, self._held):
            check_trains(plan.phases[number], self.names_in(number))

    def names_now(self) -> frozenset[str]:
        """Return the names of the parameters that learn now."""
        return frozenset(name for name, parameter in self.parameters.items() if parameter.requires_grad)

    def names_in(self, number: int) -> frozenset[str]:
        """Return the names of the parameters that learn in a phase, or may be drawn in it (LISA)."""
        if number not in self._names:
            # Where groups are drawn, norms may learn just while their group is not.
            draws: list[list[str] | None] = [None]
            if self._plan.phases[number].sample_groups:
                draws.append([])
            found = [self._multipliers(number, drawn)[0] for drawn in draws]
            self._multipliers(*self._standing)  # asking must not change the model
            self._names[number] = frozenset(
                name for values in found for name, value in values.items() if value > 0
            )
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
        self._standing = number, drawn
        values, self.norms = self._multipliers(number, drawn)
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

    def _multipliers(self, number: int, drawn: list[str] | None) -> tuple[dict[str, float], NormRecord]:
        """Return each parameter's multiplier in a phase, and give the model that phase's modes and pins."""
        phase, model, held = self._plan.phases[number], self._model, dict.fromkeys(self._held, 0.0)
        values = multipliers(phase, self._layers, _resting(self._layers, drawn)) | held
        frozen = {group.name for group in self._layers if not any(values[name] for name in group.parameters)}
        record = apply_norms(model, self._layers, frozen, phase.norms, frozen_dropout=phase.frozen_dropout)
        still = {id(model.get_parameter(name)) for name, value in values.items() if value == 0}
        record = _with_frozen_held(model, still, record)
        singled_out = overridden(phase, self._layers).keys() - set(record.trainable)
        values |= {name: rate for name, rate in record.rates.items() if name not in singled_out}
        values |= dict.fromkeys(record.frozen, 0.0)
        return values | held, record


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
