"""Who learns in a phase and at which multiplier, the norm policy included."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Set

import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase
from layerwise.plans.rates import multipliers
from layerwise.tuning.modes import pin_eval
from layerwise.tuning.norm_layers import find_norms
from layerwise.tuning.norms import NormRecord, apply_norms


def set_modes(
    model: nn.Module, layers: LayerMap, phase: Phase, drawn: Collection[str] | None, held: Collection[str]
) -> tuple[dict[str, float], NormRecord]:
    """Give `model` the modes of `phase`, and return the multiplier of each parameter; 0 is frozen.

    Args:
        model: changed in place: modes and pins, by `apply_norms`; ``requires_grad`` is not touched.
        layers: the model's layer map.
        phase: the phase.
        drawn: trunk groups that learn now, where the phase draws some (LISA); None is all of them.
        held: names of parameters that never learn.
    """
    values = _planned(layers, phase, drawn, held)
    frozen = {group.name for group in layers if not any(values[name] for name in group.parameters)}
    record = apply_norms(model, layers, frozen, phase.norms, frozen_dropout=phase.frozen_dropout)
    if phase.norms.policy in ("follow", "calibrate"):
        # A norm frozen by its parameters' names, in a group that learns, is frozen with its statistics.
        still = {id(model.get_parameter(name)) for name, value in values.items() if value == 0}
        named = []
        for norm in find_norms(model):
            own = list(norm.module.parameters(recurse=False))
            if norm.kind == "running" and own and still.issuperset(map(id, own)) and pin_eval([norm.module]):
                named.append(norm.name)
        record = dataclasses.replace(
            record,
            adapting=tuple(name for name in record.adapting if name not in named),
            fixed=(*record.fixed, *(name for name in named if name not in record.fixed)),
            pinned=record.pinned + len(named),
        )
    values |= dict.fromkeys(record.frozen, 0.0) | dict.fromkeys(record.trainable, record.rate)
    return {name: 0.0 if name in held else value for name, value in values.items()}, record


def draw_groups(layers: LayerMap, phase: Phase, learning: Set[str], generator: torch.Generator) -> list[str]:
    """Return the trunk groups that learn until the next draw (LISA), input -> output.

    Args:
        layers: the model's layer map.
        phase: tells how many are drawn, and from which.
        learning: names of the parameters that may learn in the phase; a group without any is not drawn.
        generator: moves on.
    """
    trunk = [
        group.name
        for group in layers
        if group.role == "trunk" and phase.trains(group.name) and not learning.isdisjoint(group.parameters)
    ]
    order = torch.randperm(len(trunk), generator=generator).tolist()
    return sorted((trunk[i] for i in order[: phase.sample_groups]), key=trunk.index)


def _planned(
    layers: LayerMap, phase: Phase, drawn: Collection[str] | None, held: Collection[str]
) -> dict[str, float]:
    """Return the multipliers of the plan alone."""
    resting: set[str] = set()
    if phase.sample_groups is not None and drawn is not None:
        resting = {group.name for group in layers if group.role == "trunk"} - set(drawn)
    still = {name for group in layers if group.name in resting for name in group.parameters} | set(held)
    return {name: 0.0 if name in still else value for name, value in multipliers(phase, layers).items()}
