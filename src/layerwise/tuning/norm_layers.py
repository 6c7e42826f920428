"""Normalisation layers of a live model: find them by their build, and tell which are meant frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from layerwise.errors import plural, shorten
from layerwise.tuning.modes import pinned
from layerwise.tuning.processes import distributed

Kind = Literal["running", "batch", "plain"]

_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class NormLayer:
    """One normalisation layer of a live model.

    Attributes:
        name: its module path (the first one, for a module that stands at several).
        module: the live module.
        kind: ``"running"``: has running statistics that train mode updates (batch-norm, SyncBatchNorm,
            lazy and affine-free ones, subclasses, InstanceNorm with ``track_running_stats``).
            ``"batch"``: batch-norm *without* running statistics; it reads the batch in eval mode too, so
            its output can never be independent of the other samples.
            ``"plain"``: statistics of one sample only (LayerNorm, GroupNorm, RMSNorm, InstanceNorm).
    """

    name: str
    module: nn.Module
    kind: Kind


def _kind(module: nn.Module) -> Kind | None:
    buffers = module._buffers
    if any(buffers.get(name) is not None for name in _RUNNING):
        # torchvision's FrozenBatchNorm2d and its many copies hold the statistics as constants: no momentum.
        return "running" if isinstance(module, _NormBase) or hasattr(module, "momentum") else None
    if isinstance(module, _BatchNorm):
        return "batch"
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _InstanceNorm):
        return "plain"
    return "plain" if _built_like_a_norm(module) else None


def _built_like_a_norm(module: nn.Module) -> bool:
    """Return whether `module` has the build of a norm: one gain (and shift) per channel, and an epsilon."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not own or any(True for child in module.children() for _ in child.parameters()):
        return False
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in own):
        return False
    one_per_channel = {parameter.numel() for parameter in own} == {max(own[0].shape, default=0)}
    named = "norm" in type(module).__name__.lower()
    return one_per_channel and (
        named
        or any(
            "eps" in name and isinstance(value, float) and 0 < value < 0.1
            for name, value in vars(module).items()
        )
    )


def find_norms(model: nn.Module) -> tuple[NormLayer, ...]:
    """Return the normalisation layers of `model`, each once, in the order of registration.

    Layers are known by their build, not by a list of names: buffers ``running_mean`` / ``running_var``
    and a momentum make running statistics; one gain per channel and an epsilon make a plain norm, so
    the RMSNorm classes that each transformers model defines for itself are found. A plain norm without
    parameters is found only as one of torch's own classes; there is nothing to train in it anyway.

    >>> [norm.kind for norm in find_norms(nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)))]
    ['running', 'plain']
    """
    return tuple(
        NormLayer(name, module, kind)
        for name, module in model.named_modules()
        if (kind := _kind(module)) is not None
    )


def frozen_norms(model: nn.Module) -> tuple[NormLayer, ...]:
    """Return the norms with running statistics that are *meant* to be frozen, whatever mode they are in.

    That is: pinned, or affine parameters that do not require gradients. For a norm without affine
    parameters the parameters around it speak: those of the innermost module around it that has any,
    and, where these differ, the last one registered before the norm.
    """
    return tuple(
        norm
        for norm in find_norms(model)
        if norm.kind == "running" and (pinned(norm.module) or _meant_frozen(model, norm))
    )


def _meant_frozen(model: nn.Module, norm: NormLayer) -> bool:
    own = list(norm.module.parameters())
    if own:
        return not any(parameter.requires_grad for parameter in own)
    path = norm.name
    while path:
        path = path.rpartition(".")[0]
        around = model.get_submodule(path)
        flags = {parameter.requires_grad for parameter in around.parameters()}
        if len(flags) == 1:
            return flags == {False}
        if flags:
            return not _last_before(around, norm.module)
    return False


def _last_before(around: nn.Module, norm: nn.Module) -> bool:
    """Return ``requires_grad`` of the last parameter registered in `around` before the module `norm`."""
    last = True
    for module in around.modules():
        if module is norm:
            break
        for parameter in module._parameters.values():
            last = last if parameter is None else parameter.requires_grad
    return last


SMALL_BATCH = 8
"""Largest batch at which training batch-norm draws a warning."""


def small_batch_warning(model: nn.Module, batch_size: int) -> str | None:
    """Return what to say about batch-norm training on batches of `batch_size`; None when all is well.

    From batches of 1-8 samples the statistics are noise: the network is trained on features that it
    does not see in eval mode. Accumulating gradients does not help, since each forward pass measures
    its own batch. Synchronised batch-norm sees the batches of all processes together.

    Args:
        model: as it will be trained (after the phase was entered).
        batch_size: samples per forward pass and process.
    """
    world = torch.distributed.get_world_size() if distributed() else 1
    at_rest = {norm.module for norm in frozen_norms(model)}
    names = [
        norm.name
        for norm in find_norms(model)
        if norm.kind == "running"
        and isinstance(norm.module, _BatchNorm)
        and norm.module not in at_rest
        and batch_size * (world if isinstance(norm.module, nn.SyncBatchNorm) else 1) <= SMALL_BATCH
    ]
    if not names:
        return None
    train = plural(len(names), "batch-norm layer trains", "batch-norm layers train")
    return (
        f"{train} on batches of {batch_size} ({shorten(names)}): so few samples "
        "give statistics that eval mode never sees. Use the policy 'freeze' (Norms(policy='freeze')) or "
        f"'calibrate', or batches above {SMALL_BATCH}; accumulating gradients does not help."
    )
