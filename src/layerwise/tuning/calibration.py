"""Measure the running statistics of batch-norms anew on target data, with frozen weights.

What "the statistics of a data set" are is less plain than it looks. In train mode each layer normalises
by its own batch, so what the next layer sees depends on how the data was cut into batches. Here the exact
statistics are those that eval mode will meet: layer by layer, each measured on the whole set while all
layers before it already normalise by *their* statistics of the whole set. They depend on neither batch
size nor order.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, ModelError, did_you_mean, named_kind, shorten
from layerwise.layers.isolation import unwrap
from layerwise.layers.norms import NormLayer, find_norms
from layerwise.tuning.modes import held_modes
from layerwise.tuning.moments import Moments, clone_statistics, mean_shift, restore_statistics
from layerwise.tuning.passes import Enough, Forward, Passes, before_forward, feed
from layerwise.tuning.processes import distributed

Method = Literal["exact", "one_pass", "moving"]
METHODS: tuple[str, ...] = get_args(Method)


CALIBRATED: WeakSet[nn.Module] = WeakSet()
"""Norms whose statistics were measured in this process."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_batchnorm` measured.

    Attributes:
        method: ``"exact"``, ``"one_pass"`` or ``"moving"``.
        norms: module paths of the layers whose statistics were replaced, in order of execution.
        skipped: module paths of norms that keep theirs: the forward pass did not run them, or what they
            track is not a mean and a variance.
        samples: number of samples measured, over all processes.
        passes: how many times the data was gone through; a pass of ``"exact"`` ends at its layer.
        shift: by layer, how far the mean moved, in units of the old standard deviation and averaged
            over channels: where the target differs from the source.
        time_s: seconds that it took.
    """

    method: Method
    norms: tuple[str, ...]
    skipped: tuple[str, ...]
    samples: int
    passes: int
    shift: dict[str, float]
    time_s: float


def calibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    method: Method = "exact",
    momentum: float = 0.1,
    names: Iterable[str] | None = None,
    forward: Forward | None = None,
) -> Calibration:
    """Replace the running statistics of batch-norm layers by those of the data in `loader`.

    Helps when the inputs differ from those of pretraining in level, contrast or texture (a new sensor,
    new stain, corrupted images): often worth more than training, and it needs no labels. It *hurts* when
    `loader` is not what the network will see later, or shows few of its classes.

    - ``"exact"``: layer by layer, each on the whole set with the layers before it already calibrated.
      The result is the mean and the unbiased variance over all samples and positions, weighted by
      size, accumulated in float64: ``mean = sum(x) / n``, ``var = sum((x - mean)**2) / (n - 1)``.
      It depends on neither batch size nor order. Costs one pass *for each layer*, each ending at its
      layer: about (number of layers) / 2 forward passes over the data. **When the loader gives a
      single batch, one pass is enough** and is all that is run: for up to some hundred samples give
      ``DataLoader(data, batch_size=len(data))``. A norm that the model calls several times is measured over
      all its calls, with its old statistics and those of norms first called after it still in place: exact
      where no later call depends on an earlier one. A single batch then takes a pass for each layer too.
    - ``"one_pass"``: all layers at once, each normalising by its own batch as in training. Exact for
      the first layer; deeper ones depend a little on how the data was cut into batches.
    - ``"moving"``: the exponential average of train mode with `momentum`, from the present statistics
      on: ``running = (1 - momentum) * running + momentum * batch``. Depends on batch size and order;
      keeps a share of the source, which is safer with few samples.

    Everything runs without gradients and with all else in eval mode (no dropout). Modes, pins and the
    state of the random generators (torch, numpy, random, the loader's own) are as before afterwards; each
    pass starts from the same random state, so a shuffling loader gives the same samples each time. When
    anything raises, the old statistics are put back.

    In several processes the moments are merged over all of them (``"exact"``, ``"one_pass"``). InstanceNorm
    gets the averages, over samples, of each sample's own mean and unbiased variance.

    Args:
        model: changed in place: ``running_mean``, ``running_var``, and ``num_batches_tracked``, which
            becomes the number of calls with a batch (``"moving"`` adds them; InstanceNorm never counts).
            Wrappers (compile, DistributedDataParallel) are looked through.
        loader: batches, gone through several times by ``"exact"``: a tensor, a tuple whose first item
            is the input, or a mapping of keyword arguments.
        samples: how many of the first samples to use, per process; None is all. Where the data are sorted
            by class, let `loader` shuffle. 32 samples already recover most of the gain on corrupted ImageNet
            (Schneider et al. 2020).
        method: see above.
        momentum: for ``"moving"`` only, in (0, 1].
        names: module paths of the norms to calibrate; None is all with running statistics.
        forward: ``forward(model, batch)`` for batches of another form.

    Returns:
        What was measured, and how far each layer's mean moved.

    Raises:
        ModelError: the model has no norm with a running mean and variance, or a scripted one; or `names` has
            an unknown one, or none, or is a str.
        DataError: `loader` is no iterable of batches (a tensor is one batch, a mapping too); a batch begins
            with no tensor of samples, or the model's forward fails on it; no data, or NaN and infinity in it;
            one value per channel only; or a one-shot iterator where several passes are needed.
        ValueError: `samples`, `method` or `momentum` outside its range.

    Source: Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
    adaptation"; Li et al. 2017, AdaBN; Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3
    (precise statistics; theirs are ``"one_pass"``).

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> data = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    >>> _ = calibrate_batchnorm(model, [data[:1], data[1:]])
    >>> model[0].running_mean, model[0].running_var
    (tensor([3., 1.]), tensor([7., 3.]))
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.{did_you_mean(method, METHODS)}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1 or None for all, got {samples}.")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {momentum}.")
    if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
        shape = f" of shape {tuple(loader.shape)}" if isinstance(loader, Tensor) else ""
        raise DataError(
            f"the loader is {named_kind(loader)}{shape}; expected an iterable of batches. "
            "Give a DataLoader or a list of batches: [tensor] for one batch."
        )
    if method == "exact" and isinstance(loader, Iterator):
        raise DataError(
            "the loader is an iterator that can be gone through once, but method='exact' needs a pass for "
            "each layer. Give a DataLoader or a list of batches, or method='one_pass'."
        )
    began = time.perf_counter()
    root = unwrap(model)
    norms, odd = _chosen(root, names)
    run = Passes(root, loader, samples, forward or feed)
    with held_modes(root), torch.no_grad(), torch.compiler.set_stance("force_eager"), run.randomness():
        for module in root.modules():
            module.training = False  # not through train(): pins and overrides must not notice
        old = [(norm.module, clone_statistics(norm.module)) for norm in norms]
        try:
            if method == "exact":
                reached = _exact(run, norms)
            elif method == "one_pass":
                reached = _one_pass(run, norms)
            else:
                reached = _moving(run, norms, momentum)
            _check_finite(reached)
        except BaseException:
            for module, statistics in old:
                restore_statistics(module, statistics)
            raise
    if not reached:
        raise ModelError(
            f"the forward pass ran none of the {len(norms)} norms ({shorten(norm.name for norm in norms)}): "
            "nothing was calibrated. Check the input that the batches give, or pass forward=."
        )
    CALIBRATED.update(norm.module for norm in reached)
    before = dict(old)
    return Calibration(
        method=method,
        norms=tuple(norm.name for norm in reached),
        skipped=(*odd, *(norm.name for norm in norms if norm not in reached)),
        samples=run.samples_seen(),
        passes=run.passes,
        shift={norm.name: mean_shift(norm.module, before[norm.module]) for norm in reached},
        time_s=time.perf_counter() - began,
    )


def _chosen(root: nn.Module, names: Iterable[str] | None) -> tuple[list[NormLayer], list[str]]:
    if isinstance(names, str):  # which would be taken letter by letter
        raise ModelError(f"names is {names!r}, a str; expected a list of module paths: names=[{names!r}].")
    found = {norm.name: norm for norm in find_norms(root) if norm.kind == "running"}
    wanted = list(found) if names is None else list(names)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ModelError(
            f"{shorten(map(repr, unknown))} is no norm with running statistics of this "
            f"{type(root).__name__} ({len(found)} such: {shorten(found)}).{did_you_mean(unknown[0], found)}"
        )
    if found and not wanted:
        raise ModelError("no norm is named to calibrate; leave `names` out for all with running statistics.")
    if not wanted:
        raise ModelError(
            f"this {type(root).__name__} has no norm with running statistics: nothing to calibrate. "
            "Use another normalisation policy than 'calibrate'."
        )
    if scripted := [name for name in wanted if isinstance(found[name].module, torch.jit.ScriptModule)]:
        raise ModelError(
            f"{shorten(scripted)} of this {type(root).__name__} is compiled by torch.jit, so what it reads "
            "cannot be measured. Calibrate the Python model and script it after that, or name other norms: "
            "names=[...]."
        )
    odd = [name for name in wanted if not _mean_and_variance(found[name].module)]
    if len(odd) == len(wanted):
        raise ModelError(
            f"{shorten(odd)} of this {type(root).__name__} track something else than a mean and a variance: "
            "nothing to calibrate. Use another normalisation policy than 'calibrate'."
        )
    return [found[name] for name in wanted if name not in odd], odd


def _check_finite(norms: list[NormLayer]) -> None:
    for norm in norms:
        statistics = (norm.module._buffers[name] for name in ("running_mean", "running_var"))
        if not all(bool(values.isfinite().all()) for values in statistics if values is not None):
            raise DataError(
                f"the data give the norm {norm.name!r} a mean or variance that is not finite: a sample holds "
                "NaN or infinity, or the network overflows on it. Nothing was changed; leave that sample out."
            )


def _mean_and_variance(module: nn.Module) -> bool:
    return all(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))


# ------------------------------------------------------------------------------------------------ the methods


def _exact(run: Passes, norms: list[NormLayer]) -> list[NormLayer]:
    calls, single = _calls_of_first_batch(run, norms)
    by_module = {norm.module: norm for norm in norms}
    order = [by_module[module] for module in calls]
    if single and set(calls.values()) == {1} and not distributed():
        run.begin_pass()
        with ExitStack() as hooks:
            for norm in order:
                hooks.enter_context(before_forward(norm.module, Moments(norm).replace))
            run.forward_all()
        return order
    for norm in order:
        moments = Moments(norm)
        left = calls[norm.module]

        def measure(x: Tensor, moments: Moments = moments, per_batch: int = left) -> None:
            moments.add(x)
            if moments.calls % per_batch == 0:
                raise Enough

        run.begin_pass()
        with before_forward(norm.module, measure):
            run.forward_all()
        moments.gather()
        moments.write()
    return order


def _one_pass(run: Passes, norms: list[NormLayer]) -> list[NormLayer]:
    all_moments = [Moments(norm) for norm in norms]
    run.begin_pass()
    with ExitStack() as hooks:
        for moments in all_moments:
            moments.norm.module.training = True
            hooks.enter_context(before_forward(moments.norm.module, moments.add))
        run.forward_all()
    reached = []
    for moments in all_moments:
        moments.gather()
        if moments.calls:
            moments.write()
            reached.append(moments.norm)
    return reached


def _moving(run: Passes, norms: list[NormLayer], momentum: float) -> list[NormLayer]:
    seen: dict[nn.Module, NormLayer] = {}

    def note(norm: NormLayer, _: Tensor) -> None:
        seen[norm.module] = norm

    momenta = [(norm.module, norm.module.__dict__.get("momentum")) for norm in norms]
    run.begin_pass()
    try:
        with ExitStack() as hooks:
            for norm in norms:
                norm.module.training = True
                norm.module.__dict__["momentum"] = momentum
                hooks.enter_context(before_forward(norm.module, partial(note, norm)))
            run.forward_all()
    finally:
        for module, old in momenta:
            module.__dict__["momentum"] = old
    return list(seen.values())


def _calls_of_first_batch(run: Passes, norms: list[NormLayer]) -> tuple[dict[nn.Module, int], bool]:
    """Return how often the first batch calls each norm, in order of execution, and if it is the only one."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1

    run.begin_pass(counted=False)
    with ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(before_forward(norm.module, partial(count, norm.module)))
        single = run.forward_first()
    return calls, single
