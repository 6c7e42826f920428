"""Named param groups for any optimiser: one per layer group, weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.errors import PlanError
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.plans.rates import multipliers
from layerwise.tuning.matching import check_numbers, check_plan, parameters_of


@dataclass(frozen=True)
class GroupSpec:
    """One param group to be: parameters of one layer group that share rate and weight decay.

    Attributes:
        name: unique: the layer group, with what sets the param group apart from its siblings.
        layer_group: name of the layer group.
        multiplier: of the base rate.
        decays: whether weight decay applies.
        names: of the parameters.
        parameters: the live parameters.
    """

    name: str
    layer_group: str
    multiplier: float
    decays: bool
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


def group_specs(
    layers: LayerMap,
    parameters: Mapping[str, nn.Parameter],
    wanted: Mapping[str, float],
    exempt: Iterable[str] = (),
) -> list[GroupSpec]:
    """Return the param groups of the parameters whose multiplier is above 0, input -> output.

    Args:
        layers: the layer map.
        parameters: every parameter of the map, by its name there.
        wanted: parameter name -> multiplier; 0 or missing is frozen.
        exempt: names of matrices that do not decay either.
    """
    spared = set(exempt)
    found: list[GroupSpec] = []
    for group in layers:
        split: dict[tuple[float, bool], list[str]] = {}
        for name in group.parameters:
            multiplier = wanted.get(name, 0.0)
            if multiplier > 0:
                decays = parameters[name].ndim >= 2 and name not in spared
                split.setdefault((multiplier, decays), []).append(name)
        highest = max((multiplier for multiplier, _ in split), default=0.0)
        for (multiplier, decays), names in sorted(split.items(), reverse=True):
            label = group.name if multiplier == highest else f"{group.name} x{multiplier:g}"
            end = "" if decays else " (no decay)"
            if any(label + end == other.name for other in found):
                label = f"{group.name} x{multiplier!r}"
            found.append(
                GroupSpec(
                    name=label + end,
                    layer_group=group.name,
                    multiplier=multiplier,
                    decays=decays,
                    names=tuple(names),
                    parameters=tuple(parameters[name] for name in names),
                )
            )
    return found


def no_decay_names(model: nn.Module, layers: LayerMap) -> frozenset[str]:
    """Return the parameters that `model` itself exempts from weight decay (timm's ``no_weight_decay()``)."""
    ask = getattr(model, "no_weight_decay", None)
    listed = {str(name) for name in ask()} if callable(ask) else set()
    return frozenset(name for group in layers for name in group.parameters if name in listed)


def param_groups(
    model: nn.Module,
    plan_or_layers: Plan | LayerMap,
    *,
    lr: float,
    weight_decay: float | None = None,
    phase: int = 0,
    layers: LayerMap | None = None,
    example_input: Any = None,
) -> list[dict[str, Any]]:
    """Return named param groups for an optimiser: one rate a layer group, weight decay on matrices only.

    For loops without a Tuner. Parameters with two dimensions or more decay, embedding tables and convolutions
    included; biases, norm gains and other vectors do not, nor does what the model's ``no_weight_decay()``
    lists (class tokens and position tables of timm and torchvision models). ``requires_grad`` is not
    touched, and norm policy and schedule of a plan are left to the Tuner: call `layerwise.freeze`, or use
    `layerwise.Tuner`.

    Args:
        model: not changed.
        plan_or_layers: a plan, for the multipliers of one of its phases; or a layer map, for the same rate
            everywhere.
        lr: base rate η.
        weight_decay: of the matrices; None leaves the optimiser's default, which then applies to them alone.
        phase: number of the plan's phase.
        layers: the layer map of the plan; made from `model` and `example_input` where not given.
        example_input: for `layerwise.layer_map`.

    Returns:
        Dicts with ``params``, ``lr``, ``name``, ``layer_group``, and ``weight_decay`` where it is 0 or given.

    Raises:
        PlanError: the plan was made for another model, or has no such phase; `lr` or `weight_decay` is out of
            range.
        ModelError: the model's parameters are not those of the layer map.

    Source: decay on matrices only: Loshchilov and Hutter 2019 leave it open; this is the rule of GPT-2, BEiT
    and timm.
    """
    check_numbers(lr=lr, weight_decay=weight_decay)
    if isinstance(plan_or_layers, LayerMap):
        layers = plan_or_layers
        wanted = {name: 1.0 for group in layers for name in group.parameters}
    else:
        plan = plan_or_layers
        check_plan(plan)
        if layers is None:
            from layerwise.layers.mapping import layer_map

            layers = layer_map(model, example_input, granularity=plan.granularity)
        plan.check(layers)
        if not 0 <= phase < len(plan.phases):
            raise PlanError(f"the plan has no phase number {phase}; it has {len(plan.phases)}, from 0")
        wanted = multipliers(plan.phases[phase], layers)
    inner = unwrap(model)
    groups = []
    for spec in group_specs(layers, parameters_of(inner, layers), wanted, no_decay_names(inner, layers)):
        made = as_dict(spec, lr=lr * spec.multiplier)
        if not spec.decays:
            made["weight_decay"] = 0.0
        elif weight_decay is not None:
            made["weight_decay"] = weight_decay
        groups.append(made)
    return groups


def as_dict(spec: GroupSpec, *, lr: float) -> dict[str, Any]:
    """Return `spec` as the dict that an optimiser takes."""
    return {"params": list(spec.parameters), "lr": lr, "name": spec.name, "layer_group": spec.layer_group}
