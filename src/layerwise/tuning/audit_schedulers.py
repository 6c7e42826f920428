"""Check of the schedulers of torch: which of them raise when a group is unfrozen into the optimiser.

Versions of torch differ: up to some, a scheduler that knows too few groups leaves the new one out, since then
its next step raises. So the installed torch is asked, with an optimiser of two numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from layerwise.errors import plural
from layerwise.tuning.audit_setup import Finding, Setup

KEEP_BY_GROUP: dict[type, Callable[[Optimizer], Any]] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 1.0),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(o, 7)], [3]
    ),
}
"""Schedulers of torch that keep something for each param group, which a new one lacks -> how to make one."""


@functools.cache
def raises_on_new_group(kind: type) -> bool:
    """Return whether a step raises, in the installed torch, once the optimiser got a group that is not known.

    Args:
        kind: one of `KEEP_BY_GROUP`.
    """
    optimizer = SGD([torch.zeros(1, device="cpu")], lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser takes no step
        schedule = KEEP_BY_GROUP[kind](optimizer)
        schedule.step()
        optimizer.add_param_group({"params": [torch.zeros(1, device="cpu")], "lr": 0.01})
        try:
            for _ in range(4):
                schedule.step()
        except Exception:  # ValueError, KeyError and IndexError were seen
            return True
    return False


def _cannot_grow(scheduler: Any) -> bool:
    milestones = scheduler._milestones if isinstance(scheduler, lr_scheduler.SequentialLR) else []
    if milestones and scheduler.last_epoch >= max(milestones):
        return False  # it starts no other schedule any more
    return any(isinstance(scheduler, kind) and raises_on_new_group(kind) for kind in KEEP_BY_GROUP)


def schedulers_and_new_groups(setup: Setup) -> Iterator[Finding]:
    """Schedulers that crash on the next step, or will once a group is unfrozen into the optimiser."""
    waiting = {
        name
        for name, p in setup.parameters.items()
        if not p.requires_grad and all(p is not q for _, g in setup.param_groups for q in g["params"])
    }
    for given in setup.schedulers:
        scheduler = getattr(given, "scheduler", given)  # accelerate wraps it
        kind = type(scheduler).__name__
        crashing = [part for part in _parts(scheduler) if _cannot_grow(part)]
        groups = len(scheduler.optimizer.param_groups) if hasattr(scheduler, "optimizer") else 0
        known = min(
            (len(part.base_lrs) for part in _parts(scheduler) if hasattr(part, "base_lrs")), default=groups
        )
        in_turn = isinstance(scheduler, lr_scheduler.SequentialLR)
        when = "one of the next steps" if in_turn else "the next step"
        if known != groups and crashing:
            yield Finding(
                "error",
                "scheduler-will-crash",
                (kind,),
                f"The optimiser has {plural(groups, 'param group')}, but {kind} was made for "
                f"{known}: {when} raises.",
                "make the scheduler anew after unfreezing, or let layerwise.Tuner schedule",
            )
        elif crashing and waiting:
            yield Finding(
                "warning",
                "scheduler-cannot-grow",
                (kind,),
                f"{plural(len(waiting), 'parameter is', 'parameters are')} frozen and not in the optimiser. "
                f"Unfreezing with add_param_group will make {when} of {kind} raise, as tried with torch "
                f"{torch.__version__}. Schedulers that do not raise lose the ratio between groups.",
                "let layerwise.Tuner unfreeze and schedule, or make the scheduler anew at each unfreezing",
            )


def _parts(scheduler: Any) -> list[Any]:
    """Return a scheduler and those that it is made of."""
    inner = getattr(scheduler, "_schedulers", None) or []
    return [scheduler, *(part for child in inner for part in _parts(child))]
