"""Whether a plan, a layer map and a live model belong together, told before anything is changed."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, MutableMapping, Set
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from layerwise.errors import ModelError, PlanError, named_kind, shorten
from layerwise.layers.layermap import LayerMap, check_map
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.rates import multipliers, run_problems
from layerwise.tuning.modes import pinned
from layerwise.tuning.wrappers import fit_names, is_peft, rebased

_CONSTANT: MutableMapping[nn.Parameter, bool] = WeakIdKeyDictionary()
"""Parameter -> whether it was found frozen by itself when a Tuner first saw it."""


def layers_for(model: nn.Module, plan: Plan, layers: LayerMap | None, example_input: Any) -> LayerMap:
    """Return the layer map in the names of `model` and the groups of `plan`."""
    if layers is None:
        from layerwise.layers.mapping import layer_map

        return fit_names(plan, layer_map(model, example_input, granularity=plan.granularity))
    check_map(layers)
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


def constants_of(model: nn.Module, layers: LayerMap) -> frozenset[str]:
    """Return what no plan trains of a model that no Tuner has seen; see `never_trained`."""
    return never_trained(model, layers, parameters_of(model, layers))


def never_trained(
    model: nn.Module, layers: LayerMap, parameters: Mapping[str, nn.Parameter]
) -> frozenset[str]:
    """Return what no plan trains: integers, what PEFT froze, and single parameters that were found frozen.

    The last are constants of the model (a table of sines), or the user's wish. Where a whole group was found
    frozen, that was a first step of the user's, and the plan decides; so it does where layerwise itself holds
    the module. The first Tuner on a parameter settles this: later ones cannot tell who froze it.
    """
    peft = is_peft(model)
    still = {id(p) for m in model.modules() if pinned(m) for p in m.parameters(recurse=False)}
    held = {
        name
        for name, parameter in parameters.items()
        if not (parameter.is_floating_point() or parameter.is_complex())
        or (peft and not parameter.requires_grad)
    }
    for group in layers:
        learns = any(parameters[name].requires_grad for name in group.parameters)
        for name in group.parameters:
            parameter = parameters[name]
            found = learns and not parameter.requires_grad and id(parameter) not in still
            if _CONSTANT.setdefault(parameter, found) and not parameter.requires_grad:
                held.add(name)
    return frozenset(held)


def check_learning(plan: Plan, layers: LayerMap, held: Set[str]) -> None:
    """Raise `ModelError` where all that a phase trains are parameters that cannot be trained."""
    for phase in plan.phases:
        chosen = [name for name, value in multipliers(phase, layers).items() if value > 0]
        if chosen and held and held >= set(chosen):
            raise ModelError(
                f"phase {phase.name!r} trains nothing in this model: its {len(chosen)} parameters "
                f"({some(chosen)}) are integers, or were frozen before, by the model itself or by PEFT. Set "
                "their requires_grad to True; let PEFT train the head with modules_to_save=[...]; or use a "
                "strategy whose first groups have adapters"
            )


def check_trains(phase: Phase, learning: Set[str]) -> None:
    """Raise `PlanError` where the norm policy of a phase holds all that its rates would let learn."""
    if not learning:
        every = {"": phase.norms} | {f" in {name!r}": own for name, own in phase.norms.groups.items()}
        told = ", ".join(
            f"{own.policy!r}{where} (rate {own.affine_rate(True):g}, tune {own.tune})"
            for where, own in every.items()
        )
        raise PlanError(
            f"phase {phase.name!r} trains nothing in this model: its rates reach norms alone, and the norm "
            f"policy {told} lets none learn. Give another group a rate, or choose another policy"
        )


def check_plan(plan: Any) -> None:
    """Raise `PlanError` where something else was given for a plan."""
    if not isinstance(plan, Plan):
        raise PlanError(
            f"plan is {reprlib.repr(plan)}, {named_kind(plan)}; expected a layerwise.Plan: of a file, "
            "layerwise.Plan.load(path); of a strategy's name, layerwise.parse_strategy(text, layers)"
        )


def check_numbers(*, weight_decay: float | None, **needed: float) -> None:
    """Raise `PlanError` unless all are numbers that a run can have; None is none but for `weight_decay`."""
    problems = [f"{name} is None; expected a number" for name, value in needed.items() if value is None]
    problems += run_problems(**needed, weight_decay=weight_decay)
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


def some(names: list[str]) -> str:
    """Return the first few of `names` for a message, and how many more there are."""
    return shorten(map(repr, names)) or "nothing"
