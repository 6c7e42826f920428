"""The parts of `fit` before and around its loop: what is given is looked at, named and recorded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.utils.data import IterableDataset

from layerwise.cache.samples.draws import own_generators
from layerwise.errors import DataError, ModelError, PlanError, TrainingError, shorten, warn
from layerwise.layers.randomness import kept_random_state
from layerwise.training.data import Batches, samples_in
from layerwise.training.evaluate import first_output
from layerwise.training.fingerprint import fingerprint
from layerwise.training.known_tasks import infer_task, is_known, task_of
from layerwise.training.labels import balanced_class_weights, labels_of
from layerwise.training.run_folder import write_audit
from layerwise.training.tasks import Batch, Task, run_model
from layerwise.tuning.audit import Audit, audit
from layerwise.tuning.tuner import Tuner
from layerwise.tuning.watch import WatchReport

REMEMBERED = (
    "lr",
    "weight_decay",
    "optimizer_options",
    "batch_size",
    "drop_last",
    "seed",
    "precision",
    "accumulate",
    "clip_norm",
    "class_weights",
    "sampler",
    "label_smoothing",
    "early_stopping",
    "keep",
)
"""Options of `fit` that shape the result, so that a resumed run must have the same ones."""


def first_batch(batches: Batches) -> Batch:
    """Return a batch of the first one or two samples; no generator's state is changed.

    Raises:
        DataError: a loader of the caller's own has none.
    """
    loader, data = batches.loader, batches.loader.dataset
    batches.begin(0)
    with kept_random_state():
        if isinstance(data, IterableDataset):
            return next(batches.epoch(0))
        own = own_generators(data, loader.collate_fn)
        whole = loader.batch_sampler is None  # batch_size=None: a sample is a batch
        count = min(2, len(data))  # type: ignore[arg-type]
        first = loader.collate_fn(data[0] if whole else [data[i] for i in range(count)])
        own.restore()
        return first


def batch_count(batches: Batches) -> int:
    """Return the number of batches of an epoch.

    Raises:
        DataError: it is not known (an iterable data set without a length) or it is 0.
    """
    try:
        count = len(batches)
    except TypeError as error:
        raise DataError(
            "the training loader has no length, so schedules cannot be laid out. Give its iterable data set "
            "a __len__, or use a map-style data set."
        ) from error
    if not count:
        raise DataError(
            "train makes no batch: it has fewer samples than batch_size, and drop_last is set. Take a "
            "smaller batch_size (--batch-size), or leave drop_last (--drop-last) out."
        )
    return count


def find_task(
    model: nn.Module,
    batches: Batches,
    first: Batch,
    *,
    task: Task | Literal["auto"],
    classes: Sequence[str] | None,
    class_weights: Literal["balanced"] | Sequence[float] | None,
    label_smoothing: float,
) -> Task:
    """Return the task of a run, after its output, labels and classes were compared on `first`.

    Raises:
        DataError: they do not belong together.
        TrainingError: `class_weights` or `label_smoothing` is given beside a task object.
    """
    if task == "auto" and (named := task_of(batches.data)) is not None:
        task = named
    output = first_output(model, run_model if task == "auto" else task.forward, first)
    if task == "auto":
        names = classes if classes is not None else class_names(batches.data)
        found = infer_task(first, classes=names, outputs=output.shape[-1], label_smoothing=label_smoothing)
        found.check(output, first)
        if class_weights is None:
            return found
        weights = _weights(class_weights, batches, found.classes)
        return dataclasses.replace(found, class_weights=weights)
    given = [n for n, v in (("class_weights", class_weights), ("label_smoothing", label_smoothing)) if v]
    if lacking := [name for name in given if not hasattr(task, name)]:
        raise TrainingError(
            f"the loss of {type(task).__name__} ({task.name}) knows no {' and no '.join(lacking)}. Leave "
            f"{'them' if len(lacking) > 1 else 'it'} out, or give fit a task of your own with such a loss."
        )
    if given:
        raise TrainingError(f"{' and '.join(given)} and a task object are both given; set them on the task.")
    task.check(output, first)
    return task


def _weights(
    class_weights: Literal["balanced"] | Sequence[float], batches: Batches, classes: Sequence[str]
) -> tuple[float, ...]:
    """Return the weight of each class in the loss.

    Raises:
        DataError: there are fewer or more numbers than classes, or a class to be balanced has no sample.
    """
    if class_weights == "balanced":
        return balanced_class_weights(labels_of(batches.data), classes)
    if len(class_weights) != len(classes):
        raise DataError(
            f"class_weights has {len(class_weights)} numbers for {len(classes)} classes "
            f"({', '.join(classes)})."
        )
    return tuple(float(weight) for weight in class_weights)


def class_names(data: Any) -> Sequence[str] | None:
    """Return the names of the classes that a data set, or one that it wraps, tells; None where none does."""
    while data is not None:
        if isinstance(names := getattr(data, "classes", None), list | tuple):
            return [str(name) for name in names]
        data = getattr(data, "dataset", None)
    return None


def calibrate(model: nn.Module, tuner: Tuner, task: Task, reopen: Callable[..., Batches]) -> tuple[str, ...]:
    """Measure the statistics of batch-norms with the policy "calibrate" on the training data, fed by `task`.

    Those of `Norms.samples` on the first ones in the order of epoch 0.

    Args:
        model: changed in place: the statistics of these norms.
        tuner: stands in the phase that begins.
        task: what a batch means.
        reopen: opens the training data, as `open_batches` does.

    Returns:
        The paths of the norms that were measured; none in phases with another policy.

    Raises:
        PlanError: the policy is "calibrate", and all groups with norms have another one of their own.
    """
    how, norms = tuner.phase.norms.calibration, tuner.norms
    if how is None or not norms.calibrate:
        return ()
    from layerwise.tuning.calibration import calibrate_batchnorm

    if norms.policies and not norms.calibrating:
        own = [f"{name}: {other.policy}" for name, other in tuner.phase.norms.groups.items()]
        raise PlanError(
            f"phase {tuner.phase.name!r}: the norm policy 'calibrate' measures nothing, as all groups with "
            f"norms have a policy of their own ({shorten(own)}). Leave one of them out of the `groups` of "
            "the norms, or take another policy."
        )
    # Folders of images are sorted by class: of a share of them, or of their moving average, chance decides.
    in_order = how.samples is None and how.momentum is None
    loader = reopen(train=not in_order).loader
    given: dict[str, Any] = {"samples": how.samples, "names": norms.calibrating, "forward": task.forward}
    if how.momentum is not None:
        given |= {"method": "moving", "momentum": how.momentum}
    return calibrate_batchnorm(model, loader, **given).norms


def inspect(model: nn.Module, tuner: Tuner, batch_size: int | None) -> Audit:
    """Return what the audit finds in the set-up of the first phase.

    Raises:
        ModelError: it finds an error: something would not train, or something frozen would move.
    """
    found = audit(model, tuner.optimizer, layers=tuner.layers, batch_size=batch_size)
    found.raise_for_errors()
    return found


def report_watch(report: WatchReport, out: Path | None) -> list[str]:
    """Write what moved into the run; warn where something frozen did, and return that as a note.

    Warns:
        LayerwiseWarning: a frozen parameter or buffer changed during the run.
    """
    if out is not None:
        write_audit(out, after=report.to_dict())
    try:
        report.raise_if_frozen_moved()
    except ModelError as error:
        warn(str(error))
        return [str(error)]
    return []


def names_that_learn(tuner: Tuner) -> frozenset[str]:
    """Return the names of the parameters that learn in any phase of the plan."""
    phases = range(len(tuner.plan.phases))
    return frozenset[str]().union(*(tuner.trainable_names(number) for number in phases))


def describe(
    model: nn.Module,
    train: Batches,
    val: Batches | None,
    task: Task,
    options: Mapping[str, Any],
    optimizer: str,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what ``run.json`` tells of a run, as JSON would give it back."""
    more = dict(about or {})
    record = {
        **more,
        "model": {"class": type(model).__qualname__, **more.get("model", {})},
        "task": task.to_dict(),
        **({} if is_known(task) else {"task_class": type(task).__qualname__}),
        "data": {
            "train_samples": samples_in(train.data),
            "val_samples": None if val is None else samples_in(val.data),
            **(_fingerprints(train, val) if options["out"] is not None else {}),
            **more.get("data", {}),
        },
        "settings": {"optimizer": optimizer, **{name: options[name] for name in REMEMBERED}},
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def _fingerprints(train: Batches, val: Batches | None) -> dict[str, str | None]:
    """Return hashes of the data: a resumed run must have the same."""
    return {
        "train_fingerprint": fingerprint(train.data),
        "val_fingerprint": None if val is None else fingerprint(val.data),
    }
