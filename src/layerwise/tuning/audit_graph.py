"""Checks of what surrounds the weights: ties, checkpointing, DistributedDataParallel, compilation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from layerwise.errors import plural
from layerwise.layers.owners import is_under
from layerwise.tuning.audit_setup import Finding, Setup
from layerwise.tuning.processes import count_averaged

COMPILE_NOTICES_SINCE = (2, 14)
"""First version of torch on which compiled code was seen here to notice a change of requires_grad."""


def split_ties(setup: Setup) -> Iterator[Finding]:
    """Weights that two layers share, of which one is meant to learn and the other is not."""
    frozen, learning = [], []
    for identity, names in setup.aliases.items():
        if len(names) < 2:
            continue
        parameter = setup.parameters[setup.names[identity]]
        beside = {name: _flags_beside(setup, name, identity) for name in names}
        if not parameter.requires_grad and any(True in flags for flags in beside.values()):
            frozen += names
        if parameter.requires_grad and any(flags == {False} for flags in beside.values()):
            learning += names
    if frozen:
        yield Finding(
            "warning",
            "tied-weight-frozen",
            tuple(frozen),
            "One tensor stands in several layers. It is frozen, though another layer that uses it learns "
            "(its bias or its group does): that layer's weight will not.",
            "unfreeze both or neither, or untie them (copy the tensor)",
        )
    if learning:
        yield Finding(
            "warning",
            "tied-weight-learns",
            tuple(learning),
            "One tensor stands in several layers. It learns, though another layer that uses it is "
            "frozen: that layer changes all the same.",
            "freeze both or neither, or untie them (copy the tensor)",
        )
    untied = _ties_that_came_apart(setup.root)
    if untied:
        yield Finding(
            "warning",
            "tie-broken",
            untied,
            "The model's configuration ties its input and output embeddings, but they are two tensors: "
            "they will learn apart, and saving and loading ties them again.",
            "call model.tie_weights(), or set config.tie_word_embeddings = False",
        )


def _flags_beside(setup: Setup, name: str, identity: int) -> set[bool]:
    """Return ``requires_grad`` of the parameters around one name of a shared one, itself aside."""
    path = name.rpartition(".")[0]
    if setup.layers is not None:
        # a map lists a shared parameter once; its other names stand in the group that holds their module
        groups = [group for group in setup.layers if any(is_under(path, m) for m in group.modules)]
        beside = [setup.root.get_parameter(key) for group in groups for key in group.parameters]
    else:
        beside = list(setup.root.get_submodule(path).parameters())
    return {parameter.requires_grad for parameter in beside if id(parameter) != identity}


def _ties_that_came_apart(root: nn.Module) -> tuple[str, ...]:
    model: Any = root  # these are methods of transformers' models, which know their own embeddings
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return ()
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        return ()
    if model.get_output_embeddings() is None:  # transformers 4 raises of the input's where there are none
        return ()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(end, "weight", None) for end in ends]
    if ends[0] is None or any(weight is None for weight in weights) or weights[0] is weights[1]:
        return ()
    return tuple(path for path, module in root.named_modules() if any(module is end for end in ends))


def reentrant_checkpointing(setup: Setup) -> Iterator[Finding]:
    """Reentrant gradient checkpointing whose input needs no gradient: none arrives at the weights."""
    layers = [
        (path, module)
        for path, module in setup.root.named_modules()
        if getattr(module, "gradient_checkpointing", False) and _is_reentrant(module)
    ]
    inner = {module for _, layer in layers for module in layer.modules()}
    before = [
        parameter
        for module in setup.root.modules()
        if module not in inner
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    hooked = bool(getattr(setup.root, "_require_grads_hooks", None)) or bool(
        getattr(setup.root, "_require_grads_hook", None)
    )
    learning = [path for path, module in layers if any(p.requires_grad for p in module.parameters())]
    entrance = before[:1]  # the embedding, or the stem: registered first by models that checkpoint
    if learning and not hooked and entrance and not entrance[0].requires_grad:
        yield Finding(
            "error",
            "reentrant-checkpointing",
            tuple(learning),
            "Reentrant gradient checkpointing gives gradients only where an *input* of the checkpointed "
            "layer requires one. What comes before is frozen, so these layers get none and do not learn.",
            "use_reentrant=False in the checkpointing options, or model.enable_input_require_grads()",
        )


def _is_reentrant(module: nn.Module) -> bool:
    """Return whether transformers made the module checkpoint itself in the reentrant way."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    if not isinstance(function, functools.partial):
        return False
    default = inspect.signature(torch.utils.checkpoint.checkpoint).parameters["use_reentrant"].default
    chosen = function.keywords.get("use_reentrant", default)
    return chosen is None or bool(chosen)


def ddp_before_unfreezing(setup: Setup) -> Iterator[Finding]:
    """DistributedDataParallel that was built for another set of trainable parameters."""
    for path, module in setup.model.named_modules():
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            continue
        reduced = count_averaged(module)
        now = sum(parameter.requires_grad for parameter in module.parameters())
        if now > reduced:
            yield Finding(
                "error",
                "ddp-built-for-other-parameters",
                (path or type(module).__name__,),
                f"DistributedDataParallel averages the gradients of the {reduced} parameters that "
                f"required them when it was built; now {now} do. Those unfrozen since are not averaged: "
                "each process trains its own copy.",
                "wrap the model anew, or build the wrapper inside of `with tuner.all_phases():`",
            )
        elif now < reduced and not module.find_unused_parameters:
            yield Finding(
                "error",
                "ddp-waits-for-frozen-parameters",
                (path or type(module).__name__,),
                f"DistributedDataParallel was built for {reduced} parameters that require gradients, now "
                f"{now} do: it waits for the gradients of those frozen since, which never come.",
                "DistributedDataParallel(..., find_unused_parameters=True), or wrap the model anew after "
                "freezing",
            )


def compiled_with_frozen_parts(setup: Setup) -> Iterator[Finding]:
    """Compiled code over partly frozen weights, on versions of torch that do not notice unfreezing."""
    compiled = [
        path or type(module).__name__
        for path, module in setup.model.named_modules()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    ]
    frozen = sum(not parameter.requires_grad for parameter in setup.parameters.values())
    if not compiled or not frozen:
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    blind = version < COMPILE_NOTICES_SINCE
    yield Finding(
        "warning" if blind else "info",
        "compiled-before-unfreezing",
        tuple(compiled),
        f"The model is compiled and {plural(frozen, 'parameter is', 'parameters are')} frozen. "
        + (
            "Compiled code of this version of torch does not notice a later change of requires_grad: what is "
            "unfrozen after the first step silently gets no gradient (pytorch #139476)."
            if blind
            else "Unfreezing them later compiles anew; with torch up to 2.9 it was silently without effect "
            "(pytorch #139476)."
        ),
        "call torch.compiler.reset() after each change of what trains, or compile after the last unfreezing",
    )
