"""Which norms of a live model are meant frozen, and which train on batches that are too small."""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwise.errors import plural, shorten
from layerwise.layers.norms import NormLayer, find_norms
from layerwise.tuning.modes import pinned
from layerwise.tuning.processes import distributed

ADAPTING: WeakSet[nn.Module] = WeakSet()
"""Norms that a plan's policy lets adapt, in frozen groups too."""


def frozen_norms(model: nn.Module) -> tuple[NormLayer, ...]:
    """Return the norms with running statistics that are *meant* to be frozen, whatever mode they are in.

    That is: pinned, or affine parameters that do not require gradients. For a norm without affine
    parameters the parameters around it speak: those of the innermost module around it that has any,
    and, where these differ, the last one registered before the norm. A norm that a plan's policy lets adapt
    is not among them.
    """
    return tuple(
        norm
        for norm in find_norms(model)
        if norm.kind == "running"
        and (pinned(norm.module) or (norm.module not in ADAPTING and _meant_frozen(model, norm)))
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
