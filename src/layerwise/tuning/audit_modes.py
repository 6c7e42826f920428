"""Checks of modes: batch-norm statistics and dropout in frozen parts of a network."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _NormBase

from layerwise.tuning.audit_setup import Finding, Setup, drop_rate
from layerwise.tuning.modes import pinned
from layerwise.tuning.norm_layers import ADAPTING, small_batch_warning

_HOLD = "layerwise.freeze_batchnorm(model), or drive the plan with layerwise.Tuner, which holds them"


def frozen_norms_in_train_mode(setup: Setup) -> Iterator[Finding]:
    """Frozen batch-norm that drifts, or that normalises by the batch, once the model is in train mode."""
    drifting, undone, by_batch, forced = [], [], [], []
    root_trains = setup.model.training
    for norm in setup.frozen_norms:
        module = norm.module
        if pinned(module) and module.training:
            forced.append(norm.name)
        if not setup.training[module]:
            continue
        if isinstance(module, _NormBase) and not module.track_running_stats:
            by_batch.append(norm.name)
        elif root_trains and not module.training:
            undone.append(norm.name)
        else:
            drifting.append(norm.name)
    if drifting:
        yield Finding(
            "error",
            "frozen-norm-trains",
            tuple(drifting),
            "These batch-norms are frozen but run in train mode: requires_grad=False does not stop their "
            "running statistics from drifting, and they normalise by the batch, not by what eval will use.",
            _HOLD,
        )
    if undone:
        yield Finding(
            "warning",
            "frozen-norm-eval-undone",
            tuple(undone),
            "These frozen batch-norms are in eval mode now, but the next model.train() puts them back into "
            "train mode; most trainers call it every epoch, Hugging Face's Trainer before every step.",
            _HOLD,
        )
    if by_batch:
        yield Finding(
            "error",
            "frozen-norm-uses-batch",
            tuple(by_batch),
            "These frozen batch-norms have track_running_stats=False (set by Lightning's "
            "freeze(train_bn=False)): in train mode they normalise by the batch, in eval mode by the old "
            "statistics, so what comes after them trains on features that it never sees in eval mode.",
            f"set track_running_stats back to True, and {_HOLD}",
        )
    if forced:
        yield Finding(
            "error",
            "pin-bypassed",
            tuple(forced),
            "Pinned in eval mode, but somebody assigned module.training = True by hand.",
            "remove the assignment; use train() and eval()",
        )


def norms_with_old_statistics(setup: Setup) -> Iterator[Finding]:
    """Batch-norm that learns and has statistics, which it neither reads in train mode nor moves."""
    names = [
        norm.name
        for norm in setup.learning_norms
        if setup.training[norm.module] and not getattr(norm.module, "track_running_stats", True)
    ]
    if names:
        yield Finding(
            "error",
            "norm-keeps-old-statistics",
            tuple(names),
            "These batch-norms learn with track_running_stats=False (left behind by Lightning's "
            "freeze(train_bn=False)): in train mode they normalise by the batch, in eval mode by the old "
            "statistics, which no longer fit.",
            "set track_running_stats back to True; if statistics should hold, freeze the norms",
        )


def norms_that_move_in_frozen_parts(setup: Setup) -> Iterator[Finding]:
    """Batch-norm that learns between frozen layers."""
    moving = [
        norm.name
        for norm in setup.learning_norms
        if norm.module not in ADAPTING
        and setup.training[norm.module]
        and _surroundings_frozen(setup, norm.name)
    ]
    if moving:
        yield Finding(
            "warning",
            "norm-trains-in-frozen-part",
            tuple(moving),
            "These batch-norms learn, and their statistics move, between layers that are frozen (the default "
            "of Lightning's and fastai's fine-tuning): the frozen part is not what it was pretrained to be, "
            "cannot be cached, and gradients run back through all of it.",
            "freeze them as well (layerwise.freeze_batchnorm(backbone)); if adapting is meant, say so in a "
            "plan: Norms(policy='adapt')",
        )


def _surroundings_frozen(setup: Setup, name: str) -> bool:
    """Return whether the parameters nearest to a norm, other norms aside, are all frozen."""
    in_norms = {id(p) for norm in setup.norms for p in norm.module.parameters()}
    if setup.layers is not None:
        own = [f"{name}.{key}" for key, _ in setup.root.get_submodule(name).named_parameters()]
        for group in setup.layers:
            if any(parameter in group.parameters for parameter in own):
                beside = [setup.root.get_parameter(key) for key in group.parameters]
                flags = {p.requires_grad for p in beside if id(p) not in in_norms}
                return flags == {False}
    path = name
    while path:
        path = path.rpartition(".")[0]
        around = setup.root.get_submodule(path)
        flags = {p.requires_grad for p in around.parameters() if id(p) not in in_norms}
        if flags:
            return flags == {False}
    return False


def dropout_in_frozen_parts(setup: Setup) -> Iterator[Finding]:
    """Dropout and stochastic depth that stay active in the frozen part."""
    noisy = [
        path
        for path, module in setup.root.named_modules()
        if module in setup.still and setup.training[module] and drop_rate(module) > 0
    ]
    if noisy:
        yield Finding(
            "warning",
            "dropout-in-frozen-part",
            tuple(noisy),
            "Dropout or stochastic depth is active in a frozen part: it adds noise to features that cannot "
            "adapt to it, and they can be neither compared between train and eval mode nor cached.",
            "layerwise.freeze(model, ...) or layerwise.Tuner hold frozen parts in eval mode; if the noise is "
            "meant as augmentation, set frozen_dropout=True in the phase",
        )


def norms_without_statistics(setup: Setup) -> Iterator[Finding]:
    """Batch-norm without running statistics in a frozen part."""
    names = [norm.name for norm in setup.norms if norm.kind == "batch" and norm.module in setup.still]
    if names:
        yield Finding(
            "warning",
            "norm-without-statistics",
            tuple(names),
            "These frozen batch-norms have no running statistics (track_running_stats=False from the start): "
            "they read the batch in eval mode too, so a sample's features depend on its neighbours.",
            "build the model with track_running_stats=True and calibrate (layerwise.calibrate_batchnorm)",
        )


def small_batches(setup: Setup) -> Iterator[Finding]:
    """Batch-norm that trains on batches of 1-8 samples."""
    if setup.batch_size is None:
        return
    message = small_batch_warning(setup.root, setup.batch_size)
    if message is not None:
        yield Finding(
            "warning",
            "small-batch-norm",
            tuple(norm.name for norm in setup.learning_norms),
            message,
            "Norms(policy='freeze') or Norms(policy='calibrate') in the plan, or larger batches",
        )
