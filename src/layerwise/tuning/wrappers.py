"""Models that PEFT has put adapters into, and the names that they have then."""

from __future__ import annotations

import dataclasses

from torch import nn

from layerwise.errors import ModelError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan

PEFT_PREFIX = "base_model.model."
PEFT_PARTS = ("base_layer", "original_module", "modules_to_save", "lora_", "ia3_", "vera_", "adapter")


def is_peft(model: nn.Module) -> bool:
    """Return whether `model` is a PEFT model: then what PEFT froze is not a plan's to unfreeze."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def fit_names(plan: Plan, layers: LayerMap) -> LayerMap:
    """Return `layers` with its groups called as in `plan` where they differ only by what PEFT adds."""
    bare = tuple(_without_peft(name) for name in layers.names)
    if layers.names == plan.groups or bare != plan.groups:
        return layers
    groups = tuple(dataclasses.replace(group, name=name) for group, name in zip(layers.groups, bare))
    return dataclasses.replace(layers, groups=groups)


def rebased(layers: LayerMap, model: nn.Module) -> LayerMap:
    """Return `layers`, made before PEFT wrapped the model, in the names that the wrapped model has.

    Adapters join the group of the module that they adapt.

    Raises:
        ModelError: a parameter of `model` stands at no module of the map.
    """
    home = {name: index for index, group in enumerate(layers.groups) for name in group.parameters}
    home |= {alias: home[name] for alias, name in layers.aliases.items()}
    paths = {name.rpartition(".")[0]: index for name, index in home.items()}
    parameters: list[list[tuple[str, int]]] = [[] for _ in layers.groups]
    for name, parameter in model.named_parameters():
        bare = _without_peft(name)
        index = home.get(bare, paths.get(bare, paths.get(bare.rpartition(".")[0])))
        if index is None:
            raise ModelError(
                f"parameter {name!r} belongs to no group of the layer map, which was made before the model "
                "was wrapped; make it from the wrapped model: layerwise.layer_map(model)"
            )
        parameters[index].append((name, parameter.numel()))
    known = dict(model.named_modules())
    groups = tuple(
        dataclasses.replace(
            group,
            parameters=tuple(name for name, _ in own),
            sizes=tuple(size for _, size in own),
            numel=sum(size for _, size in own),
            modules=tuple(PEFT_PREFIX + path for path in group.modules if PEFT_PREFIX + path in known),
        )
        for group, own in zip(layers.groups, parameters)
    )
    return dataclasses.replace(layers, groups=groups, aliases={}, norms=None)


def _without_peft(name: str) -> str:
    """Return a dotted name as it was before PEFT: of an adapter, the module that it adapts.

    >>> _without_peft("base_model.model.layer1.0.lora_A.default.weight")
    'layer1.0'
    """
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    cut = next((i for i, part in enumerate(parts) if part.startswith(PEFT_PARTS)), len(parts))
    return ".".join(parts[:cut])
