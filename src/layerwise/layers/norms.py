"""Normalisation layers of a live model, found by their build."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

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
    if any(name in _RUNNING for name, _ in module.named_buffers(recurse=False)):
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


def norm_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, Kind]:
    """Return those of the parameters `names` that are a norm's own -> the kind of that norm."""
    named = {id(model.get_parameter(name)): name for name in names}
    return {
        named[id(parameter)]: norm.kind
        for norm in find_norms(model)
        for parameter in norm.module._parameters.values()
        if parameter is not None and id(parameter) in named
    }
