"""What a Tuner checks: on the first step of each phase, and where an epoch or the plan ends."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import nn

from layerwise.errors import ModelError, PlanError, plural, shorten, warn
from layerwise.tuning.calibration import CALIBRATED
from layerwise.tuning.learners import Learners
from layerwise.tuning.matching import some
from layerwise.tuning.modes import pinned
from layerwise.tuning.norms import NormRecord
from layerwise.tuning.processes import count_averaged, distributed
from layerwise.tuning.progress import Progress


def check_first_step(
    progress: Progress, model: nn.Module, learners: Learners, optimizer: torch.optim.Optimizer, told: set[str]
) -> None:
    """Check what is to learn and the norms, with the gradients that are about to be used.

    Args:
        progress: where the run stands.
        model: as it is now.
        learners: who learns, of the model that the Tuner was made for.
        optimizer: the optimiser, which may be wrapped.
        told: what was warned of before; grows.

    Raises:
        ModelError: see `_check_held`, `_check_averaged`, `_check_norms`.
    """
    phase = progress.row.name
    _check_held(phase, model, learners.parameters, optimizer, told)
    if distributed():
        _check_averaged(phase, model)
    _check_norms(phase, model, learners.norms)
    if progress.step_in_phase == 0:
        _check_calibrated(phase, model, learners.norms)


def warn_of_whole_epoch(progress: Progress, told: set[str]) -> None:
    """Warn where the epoch that a loaded run goes on with had all its steps; by steps, none need end."""
    if progress.row.epochs is not None and progress.step_in_epoch >= progress.steps_per_epoch:
        _warn_once(
            told,
            "whole",
            f"epoch {progress.epoch} had all its {plural(progress.step_in_epoch, 'step')} when its "
            "state was saved, and now gets more. Call tuner.end_epoch() before state_dict() where an "
            "epoch is over, or leave out the batches that it had",
        )


def check_epoch(progress: Progress, told: set[str]) -> None:
    """Check the number of steps in an epoch that is over.

    Raises:
        PlanError: there were none.

    Warns:
        LayerwiseWarning: there were more or fewer than the Tuner was told.
    """
    if progress.step_in_epoch == 0:
        raise PlanError(
            f"epoch {progress.epoch} ended without an optimiser step; call tuner.step() in the loop "
            "after loss.backward(), and check that the loader is not empty"
        )
    if progress.step_in_epoch != progress.steps_per_epoch and not progress.done:
        _warn_once(
            told,
            "steps",
            f"epoch {progress.epoch} had {plural(progress.step_in_epoch, 'optimiser step')}, the "
            f"Tuner was made for steps_per_epoch={progress.steps_per_epoch}; schedules are computed for "
            "the latter",
        )


def warn_of_no_metric(progress: Progress, told: set[str]) -> None:
    """Warn where a phase or its schedule waits for a metric, of which an epoch that is over had none."""
    phase, schedule = progress.row, progress.row.schedule
    if progress.step_in_phase == 0 and schedule.span == "phase":
        return  # the epoch was one of the phase before
    if phase.patience_epochs is not None or schedule.shape == "plateau":
        what = "phase ends when" if phase.patience_epochs is not None else "schedule falls when"
        _warn_once(
            told,
            "metric",
            f"the plan's {what} validation stalls, but end_epoch() got no metric; call "
            "tuner.end_epoch(metric) at the end of each epoch (with layerwise.fit: give val, or "
            "--val-frac)",
        )


def warn_of_end(progress: Progress, norms: NormRecord, told: set[str]) -> None:
    """Warn that a step comes after the end of the plan, in the epoch in which that was."""
    moving = norms.adapting
    message = (
        f"the plan ended at step {progress.step}, in the middle of an epoch; this and further tuner.step() "
        "calls change nothing"
    )
    if moving:
        message += (
            f", but batches in train mode move the statistics of {plural(len(moving), 'norm')} that learn "
            f"({shorten(moving)}) all the same"
        )
    _warn_once(told, "end", f"{message}. Leave the loop when tuner.done")


def _warn_once(told: set[str], key: str, message: str) -> None:
    if f"!{key}" not in told:
        told.add(f"!{key}")
        warn(message)


def _check_held(
    phase: str,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    told: set[str],
) -> None:
    """Check that what should learn is what the optimiser holds, and that it has gradients.

    Raises:
        ModelError: trainable parameters that the optimiser does not hold, held ones that are not trainable,
            or no gradient at all; or some of them are not the model's any more.

    Warns:
        LayerwiseWarning: some trainable parameters have no gradient.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    learning = {name: p for name, p in parameters.items() if p.requires_grad}
    stray = [name for name, p in learning.items() if id(p) not in held]
    lost = [name for name, p in parameters.items() if id(p) in held and not p.requires_grad]
    if stray or lost or len(held) != len(learning):
        raise ModelError(
            f"phase {phase!r}: the optimiser does not hold what should learn (trainable but not held: "
            f"{some(stray)}; held but not trainable: {some(lost)}). Something else changed requires_grad "
            "after the Tuner was made"
        )
    there = set(map(id, model.parameters()))
    if replaced := [name for name, p in learning.items() if id(p) not in there]:
        raise ModelError(
            f"phase {phase!r}: {some(replaced)} should learn, and what the optimiser holds by that name is "
            "not of the model any more: it was replaced after the Tuner was made. Change the model first (a "
            "new head), then make the layer map and the Tuner"
        )
    idle = [name for name, p in learning.items() if p.grad is None]
    if len(idle) == len(learning):
        raise ModelError(
            f"phase {phase!r}: none of the {len(learning)} trainable parameters has a gradient; call "
            "loss.backward() before tuner.step(), on a loss that depends on the model. With reentrant "
            "gradient checkpointing and frozen first layers use use_reentrant=False"
        )
    new = [name for name in idle if name not in told]
    if new:
        told.update(new)
        warn(
            f"phase {phase!r}: {plural(len(new), 'parameter')} should learn but got no gradient at its "
            f"first step: {some(new)}. The forward pass does not use them, or is cut from the loss",
        )


def _check_averaged(phase: str, model: nn.Module) -> None:
    """Check that a DistributedDataParallel around the model averages the gradients of all that learns now.

    It only ever averages those of parameters that required them when it was built. The Tuner may have been
    made before it and hold the model alone, so it is looked for among all objects.

    Raises:
        ModelError: it was built while some of them were frozen.
    """
    own = {id(parameter) for parameter in model.parameters()}
    most: dict[nn.Module, int] = {}  # a model that was wrapped anew may have its old wrapper still
    for wrapper in gc.get_objects():
        if issubclass(type(wrapper), nn.parallel.DistributedDataParallel):
            most[wrapper.module] = max(most.get(wrapper.module, 0), count_averaged(wrapper))
    for module, averaged in most.items():
        parameters = list(module.parameters())
        now = sum(parameter.requires_grad for parameter in parameters)
        if now > averaged and not own.isdisjoint(map(id, parameters)):
            raise ModelError(
                f"phase {phase!r}: DistributedDataParallel averages the gradients of "
                f"{plural(averaged, 'parameter')}, those that required them when it was built, but {now} "
                "learn now: each process would train its own copy of the others. Wrap the model inside of "
                "`with tuner.all_phases():`, with find_unused_parameters=True, or anew when a phase begins"
            )


def _check_norms(phase: str, model: nn.Module, norms: NormRecord) -> None:
    """Check that the norms whose statistics the phase holds are still held, and that the others move theirs.

    Raises:
        ModelError: one of them was replaced by another module since the phase began.

    Warns:
        LayerwiseWarning: one that should move is in eval mode, or does not track; or a policy asks for norms
            to adapt, and the model, or the group that it is of, has none that do.
    """
    asked = norms.policy in ("adapt", "freeze_until", "calibrate")
    if asked and not (norms.adapting or norms.fixed or norms.trainable):
        warn(
            f"phase {phase!r}: the norm policy {norms.policy!r} changes nothing: the model has no norm with "
            "running statistics (batch-norm). To train LayerNorms, GroupNorms and RMSNorms of frozen groups, "
            "set tune: Norms(tune=True)",
        )
    if norms.idle:
        warn(
            f"phase {phase!r}: the norm policy of {some(list(norms.idle))} changes nothing: no norm with "
            "running statistics (batch-norm) stands there. Take it out of the `groups` of the norms",
        )
    modules = dict(model.named_modules())
    awake = [path for path in norms.fixed if path not in modules or not pinned(modules[path])]
    if awake:
        raise ModelError(
            f"phase {phase!r}: the statistics of {some(awake)} should be held and are not: the modules were "
            "replaced after the Tuner was made, or unpinned (torch.nn.SyncBatchNorm.convert_sync_batchnorm "
            "and Lightning's sync_batchnorm=True make new ones). Convert the model first, then make the "
            "layer map and the Tuner"
        )
    moving = [path for path in norms.adapting if path in modules and not pinned(modules[path])]
    asleep = [path for path in moving if not modules[path].training]
    if asleep:
        warn(
            f"phase {phase!r}: the statistics of {some(asleep)} should move, but these are in eval mode. "
            "Call model.train() in each epoch: modes put back one by one after validation leave what was "
            "frozen then in eval mode. To hold the statistics, use the norm policy 'freeze'",
        )
    untracked = [path for path in moving if not getattr(modules[path], "track_running_stats", True)]
    if untracked:
        warn(
            f"phase {phase!r}: the statistics of {some(untracked)} should move, but are not tracked "
            "(Lightning's freeze(train_bn=False) leaves that behind): train mode normalises by the batch, "
            "eval mode by the old statistics. Before the Tuner is made, set track_running_stats to True",
        )


def _check_calibrated(phase: str, model: nn.Module, norms: NormRecord) -> None:
    """Check that statistics were measured, if the phase wants that.

    Warns:
        LayerwiseWarning: nobody called `calibrate_batchnorm` on any of its norms.
    """
    held = [model.get_submodule(path) for path in norms.calibrating]
    if held and not any(module in CALIBRATED for module in held):
        warn(
            f"phase {phase!r} has the norm policy 'calibrate', but nobody measured the statistics: "
            "layerwise.fit does it; in other loops call layerwise.calibrate_batchnorm(model, loader, "
            "names=tuner.norms.calibrating) before the phase's first step",
        )
