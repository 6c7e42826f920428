"""Which task it is: of a name in ``run.json``, of a data set that tells it, of a first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import DataError, did_you_mean
from layerwise.training.classification import Classification
from layerwise.training.tasks import Batch, Task, kind_of, split_batch
from layerwise.training.text_tasks import MultiLabel, Regression
from layerwise.training.token_tasks import LanguageModelling, TokenClassification

TASKS: dict[str, Callable[..., Task]] = {
    "image_classification": Classification,
    "text_classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "token_classification": TokenClassification,
    "causal_lm": LanguageModelling,
    "masked_lm": LanguageModelling,
}
"""Task name -> class of the task, which takes the fields that its ``to_dict`` returned."""


def task_from_dict(data: dict[str, Any]) -> Task:
    """Return the task that `Task.to_dict` described.

    Raises:
        DataError: its name is not in `TASKS`, or it has other fields than the task of that name.
    """
    name = str(data.get("name"))
    if name not in TASKS:
        raise DataError(
            f"task {data.get('name')!r} is not known ({', '.join(TASKS)}).{did_you_mean(name, TASKS)}"
        )
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}  # JSON knows no tuples
    try:
        return TASKS[name](**fields)
    except TypeError as error:
        raise DataError(
            f"the task {name!r} does not have the fields that it was saved with ({error}). Another version "
            "of layerwise wrote it, or it was altered: use that version, or put the file back."
        ) from error


def is_known(task: Task) -> bool:
    """Return whether `task_from_dict` makes it again of its data: it is no class of somebody else's."""
    return type(task) in TASKS.values()


def task_of(data: Any) -> Task | None:
    """Return the task that a data set of texts names itself, None for other data sets.

    Args:
        data: a `layerwise.sources.text.TextSet`, or any object with a ``task`` that is a key of `TASKS`, and
            ``classes``. Mean and scale of numbers are taken from its ``labels``. One class a text is left
            to `infer_task`.
    """
    match getattr(data, "task", None):
        case "multi_label":
            return MultiLabel(tuple(data.classes))
        case "token_classification":
            return TokenClassification(tuple(data.classes))
        case "causal_lm" | "masked_lm" as kind:
            return LanguageModelling(kind)
        case "regression":
            labels = torch.tensor([data[index]["labels"] for index in range(len(data))], dtype=torch.float64)
            return Regression.fitted(labels)
    return None


def infer_task(
    batch: Batch, *, classes: Sequence[str] | None, outputs: int, label_smoothing: float = 0.0
) -> Classification:
    """Return the task that a first batch speaks for.

    Integer labels, one for each sample, mean classification; ``"text_classification"`` where the
    batch is a mapping, ``"image_classification"`` where it is a pair.

    Args:
        batch: the first batch.
        classes: names of the classes; None names them by number.
        outputs: width of the model's output, the number of classes where `classes` is None.
        label_smoothing: of the task.

    Raises:
        DataError: labels are of another kind.
    """
    _, kwargs, labels = split_batch(batch)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        raise DataError(
            f"labels of the first batch are {kind_of(labels)}; task='auto' knows one integer for each "
            "sample. Give fit a task that says what they mean, of layerwise.training.text_tasks: "
            "task=MultiLabel(classes) for 0 and 1 in [N, classes], Regression.fitted(labels) for numbers."
        )
    names = tuple(str(name) for name in (classes if classes is not None else range(outputs)))
    name = "text_classification" if kwargs else "image_classification"
    return Classification(names, name, label_smoothing=label_smoothing)
