"""Whether a plan, a layer map and a live model belong together, told before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

from torch import nn

from layerwise.errors import ModelError, PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.tuning.wrappers import fit_names, is_peft, rebased


def layers_for(model: nn.Module, plan: Plan, layers: LayerMap | None, example_input: Any) -> LayerMap:
    """Return the layer map in the names of `model` and the groups of `plan`."""
    if layers is None:
        from layerwise.layers.mapping import layer_map

        return fit_names(plan, layer_map(model, example_input, granularity=plan.granularity))
    if is_peft(model) and layers.groups[0].parameters[0] not in dict(model.named_parameters()):
        return rebased(layers, model)
    return fit_names(plan, layers)


def parameters_of(model: nn.Module, layers: LayerMap) -> dict[str, nn.Parameter]:
    """Return the live parameters by their names in the map.

    Raises:
        ModelError: the model's parameters are not those of the map.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    mapped = [name for group in layers for name in group.parameters]
    missing = [name for name in mapped if name not in every]
    known = {id(every[name]) for name in mapped if name in every}
    extra = [name for name, parameter in every.items() if id(parameter) not in known]
    if missing or extra:
        raise ModelError(
            f"the layer map is not of this {type(model).__name__}: only the map has {some(missing)}; only "
            f"the model has {some(extra)}. Make the map after the last change of the model (a new head, "
            "adapters)"
        )
    return {name: every[name] for name in mapped}


def never_trained(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Return what no plan can train: integers, and what PEFT froze."""
    peft = is_peft(model)
    return frozenset(
        name
        for name, parameter in parameters.items()
        if not (parameter.is_floating_point() or parameter.is_complex())
        or (peft and not parameter.requires_grad)
    )


def check_learning(plan: Plan, layers: LayerMap, held: Set[str]) -> None:
    """Raise `ModelError` where all that a phase trains are parameters that cannot be trained."""
    for phase in plan.phases:
        chosen = [
            name
            for group in layers
            for name in group.parameters
            if phase.overrides.get(name, phase.rate(group.name)) > 0
        ]
        if chosen and held and held >= set(chosen):
            raise ModelError(
                f"phase {phase.name!r} trains nothing in this model: its {len(chosen)} parameters "
                f"({some(chosen)}) are integers, or PEFT froze them. Let PEFT train the head with "
                "modules_to_save=[...], or use a strategy whose first groups have adapters"
            )


def check_numbers(lr: float, steps_per_epoch: int) -> None:
    """Raise `PlanError` unless both are numbers that a run can have."""
    problems = []
    if not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0:
        problems.append(f"lr is {lr!r}; expected a number above 0")
    if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
        problems.append(
            f"steps_per_epoch is {steps_per_epoch!r}; expected a whole number of at least 1, such as "
            "len(loader)"
        )
    if problems:
        raise PlanError("; ".join(problems))


def check_ddp(model: nn.Module, plan: Plan) -> None:
    """Raise where DistributedDataParallel would wait for gradients of frozen parameters."""
    wrapper: Any = model
    while wrapper is not None and not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        wrapper = wrapper._modules.get("_orig_mod")
    freezes = any(not all(map(phase.trains, plan.groups)) for phase in plan.phases)
    if wrapper is not None and freezes and not wrapper.find_unused_parameters:
        raise ModelError(
            "the model is wrapped by a DistributedDataParallel that waits for a gradient of every parameter, "
            "but the plan freezes some. Wrap it with find_unused_parameters=True (before anything is frozen, "
            "or inside `with tuner.all_phases():`)"
        )


def some(names: list[str], count: int = 3) -> str:
    """Return the first few of `names` for a message, and how many more there are."""
    if not names:
        return "nothing"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
