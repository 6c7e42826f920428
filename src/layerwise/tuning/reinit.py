"""Start layers anew, with the initialisation that their own classes define."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from layerwise.errors import ModelError, plural, warn
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.tuning.modes import pin_eval, unpin


def reinit(model: nn.Module, layers: LayerMap, groups: tuple[str, ...], *, seed: int) -> tuple[str, ...]:
    """Initialise all parameters of `groups` anew, and the buffers that belong to their modules.

    A transformers model does it with its own ``_init_weights``, which draws some weights where it is given
    the module around them; any other with each module's ``reset_parameters``. Vectors that a block holds
    itself (a layer scale) have neither and keep their values, with a warning. The global random state is put
    back afterwards.

    Args:
        model: changed in place; not to be undone (keep a copy).
        layers: the model's layer map.
        groups: names of groups.
        seed: where the new weights come from.

    Returns:
        The names of the parameters that were started anew.

    Raises:
        ModelError: a module with matrices of its own knows no initialisation; nothing is changed then.

    Warns:
        LayerwiseWarning: vectors kept their values.
    """
    wanted = _parameters_in(layers, groups)
    modules, kept = _modules_in(model, layers, groups)
    init_weights: Any = getattr(model, "_init_weights", None) if _is_of_transformers(model) else None
    if kept:
        keep = plural(len(kept), "vector keeps its", "vectors keep their")
        warn(
            f"started anew: {', '.join(groups)}, but {keep} values, as their "
            f"modules have no reset_parameters(): {', '.join(kept)}",
        )
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    held = unpin(module for module, _ in modules)  # a held norm keeps its statistics in reset_parameters
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _out_of_reach(model, layers, wanted):
            torch.manual_seed(seed)
            if init_weights is None:
                for module, _ in modules:
                    initialise = _initialiser(module)
                    assert initialise is not None
                    initialise()
            else:
                for module in _with_parents(model, {module for module, _ in modules}):
                    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                        if hasattr(tensor, "_is_hf_initialized"):
                            del tensor._is_hf_initialized  # or transformers passes the tensor over
                    init_weights(module)
    finally:
        pin_eval(held)
    return tuple(name for _, own in modules for name in own if layers.aliases.get(name, name) in wanted)


def check_reinit(model: nn.Module, layers: LayerMap, plan: Plan) -> None:
    """Raise `ModelError` where a phase of `plan` starts anew what knows no initialisation."""
    for phase in plan.phases:
        _modules_in(model, layers, phase.reinit)


def _parameters_in(layers: LayerMap, groups: tuple[str, ...]) -> set[str]:
    return {name for group in groups for name in layers[group].parameters}


def _modules_in(
    model: nn.Module, layers: LayerMap, groups: tuple[str, ...]
) -> tuple[list[tuple[nn.Module, list[str]]], list[str]]:
    """Return the modules to start anew, each with the names of its own parameters; and what keeps its values.

    Raises:
        ModelError: see `reinit`.
    """
    wanted = _parameters_in(layers, groups)
    modules = []
    unknown: list[str] = []
    kept: list[str] = []
    for path, module in model.named_modules():
        own = {
            f"{path}.{name}" if path else name: parameter
            for name, parameter in module.named_parameters(recurse=False)
        }
        if not wanted.intersection(own):
            continue
        if _is_of_transformers(model) or _initialiser(module) is not None:
            modules.append((module, list(own)))
        elif any(parameter.ndim > 1 for parameter in own.values()):
            unknown.append(f"{path or 'the model itself'} ({type(module).__name__})")
        else:
            kept += own
    if unknown:
        raise ModelError(
            f"these modules cannot be initialised anew, as their classes have no reset_parameters(): "
            f"{', '.join(unknown)}. Give the class one, or leave the group out of `reinit`"
        )
    return modules, kept


@contextlib.contextmanager
def _out_of_reach(model: nn.Module, layers: LayerMap, wanted: set[str]) -> Iterator[None]:
    """Put others, on meta, in place of all parameters but `wanted`, so that nothing is written to those."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if layers.aliases.get(full, full) not in wanted:
                kept.append((module, name, parameter))
    try:
        for module, name, parameter in kept:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def _with_parents(module: nn.Module, started: set[nn.Module]) -> list[nn.Module]:
    """Return `started` modules and those around them, children first, as transformers does it."""
    inside = [below for child in module.children() for below in _with_parents(child, started)]
    return [*dict.fromkeys(inside), module] if inside or module in started else []


def _is_of_transformers(model: nn.Module) -> bool:
    """Return whether ``_init_weights(module)`` is what transformers means by it; timm has one, too."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def _initialiser(module: nn.Module) -> Any:
    # nn.MultiheadAttention alone calls it by another name
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
