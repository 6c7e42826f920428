"""On what terms trainings are compared: by which metric, from which weights, with which options of `fit`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.changes.fingerprint import named_tensors, weights_digest
from layerwise.errors import DataError, TrainingError, did_you_mean
from layerwise.layers.layermap import LayerMap
from layerwise.training.classification import Classification
from layerwise.training.fingerprint import fingerprint
from layerwise.training.fit import fit
from layerwise.training.known_tasks import task_of
from layerwise.training.options import check_options
from layerwise.training.tasks import Task
from layerwise.tuning.stall import Mode

LOWER_IS_BETTER = ("loss", "val_loss", "rmse", "mae", "perplexity")
"""Metrics of the project's tasks of which less is better; names of others count if they end in ``"loss"``."""
OF_TRAINING = ("train_loss", "epoch", "step", "steps")
"""What a history tells of training, which no plan is chosen by."""
SET_FOR_ALL = ("model", "train", "val", "plan", "lr", "seed", "layers", "batch_size", "cache_pool")
"""Options of `layerwise.fit` that all trainings of a comparison are given by it."""
SET_BY_SEARCH = (*SET_FOR_ALL, "test", "out", "resume", "on_epoch")


def metric_and_mode(metric: str | None, train: Any, options: Mapping[str, Any]) -> tuple[str, Mode]:
    """Return the metric to compare by, and whether more of it is better.

    Args:
        metric: of the history of `layerwise.fit`; None is the monitor of the task.
        train: training data, which may name its task.
        options: of `layerwise.fit`, among them perhaps the task. Without one it is classification.

    Raises:
        DataError: the metric is of the training data, or the task is known not to measure it.
    """
    task = options.get("task", "auto")
    if task == "auto":
        named = task_of(train.dataset if isinstance(train, DataLoader) else train)
        task = named or Classification(("0", "1"))  # of any classes the metrics have the same names
    metric = task.monitor if metric is None else metric
    if metric in OF_TRAINING:
        raise DataError(
            f"metric {metric!r} is of the training data; expected one of the validation data, such as "
            f"{task.monitor!r}. Plans that are compared on what they trained on all look good."
        )
    if metric == task.monitor:
        return metric, task.mode
    measured = ["loss", "val_loss", *_metrics_of(task)]
    if len(measured) > 2 and metric not in measured:
        raise _not_measured(metric, measured[1:])
    return metric, "min" if metric in LOWER_IS_BETTER or metric.endswith("loss") else "max"


def _metrics_of(task: Task) -> list[str]:
    """Return the names of what a task measures; none where it tells them of counted batches alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics says that nothing was counted
        try:
            return [*task.scores(task.metrics()).values]
        except Exception:  # the caller's own task, of which this is not expected
            return []


def value_of(metric: str, entry: Mapping[str, Any]) -> float:
    """Return a metric in an entry of a history, or in the metrics of a result.

    Raises:
        DataError: it is not measured.
    """
    key = metric
    if key in ("loss", "val_loss"):  # a history has the second name for it, a result the first
        key = "val_loss" if "val_loss" in entry else "loss"
    if key not in entry:
        raise _not_measured(metric, (n for n, v in entry.items() if isinstance(v, float)))
    return float(entry[key])


def outcome_of(metric: str, metrics: Mapping[str, Any]) -> float:
    """Return a metric of a training that has ended, to compare it by.

    Raises:
        DataError: it is not measured.
        TrainingError: it is NaN or infinite.
    """
    value = value_of(metric, metrics)
    if not math.isfinite(value):
        raise TrainingError(
            f"{metric} is {value}, by which no plan can be compared. Look for NaN in the validation data, or "
            "lower lr."
        )
    return value


def _not_measured(metric: str, names: Iterable[str]) -> DataError:
    known = [name for name in names if name not in OF_TRAINING]
    return DataError(
        f"metric {metric!r} is not measured on this data; expected one of {', '.join(known)}."
        f"{did_you_mean(metric, known)}"
    )


def check_fit_options(options: Mapping[str, Any], taken: tuple[str, ...], what: str) -> None:
    """Refuse options of `layerwise.fit` that no training of a comparison can be given.

    Args:
        options: given by the caller.
        taken: names of those that are set for all its trainings.
        what: who sets them, for the message.

    Raises:
        DataError: some are taken; they are named.
        TrainingError: some are out of range.
        TypeError: `layerwise.fit` has no such option.
    """
    if found := [name for name in options if name in taken]:
        raise DataError(
            f"fit_options has {', '.join(found)}, which {what} sets for all its trainings. Give it to {what} "
            "itself if there is an argument of that name, else leave it out."
        )
    given = inspect.signature(fit).bind_partial(**options)
    given.apply_defaults()
    check_options(given.arguments)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of what several seeds came to, and its standard error; 0 of a single one."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def about_data(model: nn.Module, layers: LayerMap, train: Any, val: Any) -> dict[str, Any]:
    """Return what tells trainings of one model on one task from others, as plain data."""
    return {
        "model": layers.model_class,
        "weights": weights_of(model),
        "groups": list(layers.names),
        "train_samples": len(train) if hasattr(train, "__len__") else None,
        "train_data": fingerprint(train),
        "val_data": fingerprint(val),
    }


def weights_of(model: nn.Module) -> str:
    """Return a short hash of all parameters and buffers, so that another model is not taken for this one."""
    tensors = named_tensors(model)
    return weights_digest(tensors, tensors)[:16]


def plain(value: Any) -> Any:
    """Return an option as JSON can hold it and compare it between processes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if callable(to_dict := getattr(value, "to_dict", None)) and not isinstance(value, type):  # a task
        return plain(to_dict())
    return getattr(value, "__qualname__", type(value).__name__)  # of an optimiser's class, its name
