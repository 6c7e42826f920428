"""On what terms trainings are compared: by which metric, from which weights, with which options of `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.changes.fingerprint import named_tensors, weights_digest
from layerwise.errors import DataError
from layerwise.training.classification import Classification
from layerwise.training.known_tasks import task_of
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
        DataError: the metric is of the training data.
    """
    task = options.get("task", "auto")
    if task == "auto":
        task = task_of(train.dataset if isinstance(train, DataLoader) else train) or Classification(())
    metric = task.monitor if metric is None else metric
    if metric in OF_TRAINING:
        raise DataError(
            f"metric {metric!r} is of the training data; expected one of the validation data, such as "
            f"{task.monitor!r}. Plans that are compared on what they trained on all look good."
        )
    if metric == task.monitor:
        return metric, task.mode
    return metric, "min" if metric in LOWER_IS_BETTER or metric.endswith("loss") else "max"


def check_fit_options(options: Mapping[str, Any], taken: tuple[str, ...], what: str) -> None:
    """Refuse options of `layerwise.fit` that are set for all trainings of a comparison.

    Args:
        options: given by the caller.
        taken: names of those that are set.
        what: who sets them, for the message.

    Raises:
        DataError: there are some; they are named.
    """
    if found := [name for name in options if name in taken]:
        raise DataError(
            f"fit_options has {', '.join(found)}, which {what} sets for all its trainings. Give it to {what} "
            "itself if there is an argument of that name, else leave it out."
        )


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
