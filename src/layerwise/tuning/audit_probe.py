"""Checks that run the model on one batch: what drifts, and where gradients do not arrive."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.layers.structures import tensors_in
from layerwise.tuning.audit_setup import Finding, Setup
from layerwise.tuning.modes import held_modes
from layerwise.tuning.passes import Forward, Passes
from layerwise.tuning.watch import digest


def probe(setup: Setup, loader: Iterable[Any], forward: Forward) -> Iterator[Finding]:
    """Run one batch in train mode, with gradients, and report what it shows.

    Weights, gradients, buffers, modes and random states are as before afterwards; `Setup.training` has the
    modes that the forward pass left, and `Setup.batch_size`, where it was not given, the size of the batch.
    Costs one forward and one backward pass, and a copy of the buffers.
    """
    # not through DistributedDataParallel, which would wait for the other processes
    is_ddp = isinstance(setup.model, nn.parallel.DistributedDataParallel)
    model = setup.root if is_ddp else setup.model
    passes = Passes(model, loader, None, forward)
    with held_modes(setup.model), passes.randomness(), _kept_buffers(setup.root) as before:
        was = setup.model.training
        setup.model.train()
        batch = next(passes.batches())
        if setup.batch_size is None:
            setup.batch_size = passes.seen or None
        with warnings.catch_warnings(record=True) as caught, torch.enable_grad():
            warnings.simplefilter("always")
            output = passes.run(batch)
        # a forward of the user's own may call eval() on its frozen part
        setup.training = setup.modes()
        drifted = tuple(_moved(setup, before))
        reentrant = any("None of the inputs have requires_grad=True" in str(w.message) for w in caught)
        missing = () if reentrant else tuple(_without_gradient(setup, output))
        setup.model.train(was)
    if drifted:
        yield Finding(
            "error",
            "frozen-statistics-drift",
            drifted,
            "Measured on one batch in train mode: these buffers of frozen modules changed.",
            "layerwise.freeze_batchnorm(model), or drive the plan with layerwise.Tuner, which holds them",
        )
    if reentrant:
        yield Finding(
            "error",
            "reentrant-checkpointing",
            (type(setup.root).__name__,),
            "Measured on one batch: torch says that a reentrant checkpoint got no input that requires a "
            "gradient, so the weights inside get none and do not learn. What comes before it is frozen.",
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
        )
    if missing:
        yield Finding(
            "warning",
            "no-gradient",
            missing,
            "Measured on one batch: these parameters require gradients, but none arrives from the output "
            "(a stale compiled graph, a detach, no_grad around part of the model, or a module that is "
            "not used).",
            "freeze what is not used; otherwise look for detach(), no_grad() and code compiled before "
            "unfreezing",
        )


@contextmanager
def _kept_buffers(root: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Put the values of all buffers back on leaving; gives those from before."""
    lazy = nn.UninitializedBuffer
    before = {name: b.detach().clone() for name, b in root.named_buffers() if not isinstance(b, lazy)}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in root.named_buffers():
                if name in before:
                    buffer.copy_(before[name])


def _moved(setup: Setup, before: dict[str, Tensor]) -> Iterator[str]:
    held = setup.still | {norm.module for norm in setup.frozen_norms}
    for path, module in setup.root.named_modules():
        if module in held:
            for key, buffer in module._buffers.items():
                name = f"{path}.{key}".removeprefix(".")
                if buffer is not None and name in before and digest(buffer) != digest(before[name]):
                    yield name


def _without_gradient(setup: Setup, output: Any) -> Iterator[str]:
    outputs = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
    wanted = {name: p for name, p in setup.parameters.items() if p.requires_grad}
    if not outputs or not wanted:
        yield from wanted
        return
    if _has_reentrant_checkpoint(outputs):
        return
    # autograd.grad leaves .grad alone and wakes no hooks that step or communicate
    total = torch.stack([tensor.float().square().mean() + tensor.float().mean() for tensor in outputs]).sum()
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    yield from (name for name, gradient in zip(wanted, gradients, strict=True) if gradient is None)


def _has_reentrant_checkpoint(outputs: list[Tensor]) -> bool:
    """Return whether a reentrant checkpoint was used: weights inside get gradients by backward() alone."""
    seen: set[Any] = set()
    ahead = [tensor.grad_fn for tensor in outputs]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():  # torch's; fairscale's and deepspeed's have that name too
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False
