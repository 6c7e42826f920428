"""Tasks: what a batch means: its loss, its metrics, and how an output reads for people.

A task is a small object that `fit` asks; the loop itself never looks into a batch. A new task is a
frozen dataclass with the members of `Task` and one line in `TASKS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import DataError, did_you_mean, named_kind

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Batch = Any
"""What a data loader yields: ``(inputs, labels)``, or a mapping with the key ``"labels"``."""


@dataclass(frozen=True)
class Scores:
    """Metrics of one pass over a data set.

    Attributes:
        values: metric name -> number.
        tables: what is more than one number: ``"per_class"`` (a list of rows) and ``"confusion"``
            (rows are true classes, columns predicted ones).
    """

    values: dict[str, float]
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """What `fit` needs to know about the meaning of a batch.

    Attributes:
        name: key in `TASKS`; stored in the run.
        classes: names of the classes in the order of the model's outputs; empty where there are none.
        monitor: the metric (or ``"loss"``) that picks the best epoch and stops early.
        mode: whether a higher (``"max"``) or a lower monitor is better.
    """

    @property
    def name(self) -> str:
        """Key in `TASKS`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def monitor(self) -> str:
        """The metric that picks the best epoch."""
        ...

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more or less of it is better."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """Return one batch of samples."""
        ...

    def size(self, batch: Batch) -> float:
        """Return over how much a batch's loss is a mean: its samples, scored tokens, or their weights."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's output for a batch; labels are not shown to the model."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        ...

    def check(self, output: Tensor, batch: Batch) -> None:
        """Raise `DataError` where labels and output cannot belong together (asked once, at the start)."""
        ...

    def metrics(self) -> MetricCollection:
        """Return new, empty metrics."""
        ...

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch into `metrics`."""
        ...

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return what `metrics` counted."""
        ...

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return one readable prediction for each sample of an output."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data for ``run.json``; `task_from_dict` is its inverse."""
        ...


def split_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return a batch as positional inputs, keyword inputs, and labels.

    >>> split_batch(("x", "y"))
    (('x',), {}, 'y')
    >>> split_batch({"input_ids": 1, "labels": 2})
    ((), {'input_ids': 1}, 2)

    Raises:
        DataError: it is neither a pair nor a mapping with ``"labels"``.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch with the keys {sorted(map(str, batch))} has no 'labels'.")
        return (), {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise DataError(
        f"a batch is a {type(batch).__name__}{size}; expected a pair (inputs, labels) or a mapping with "
        "'labels'. Change the data set or give the loader a collate_fn that makes one."
    )


def run_model(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's output tensor for a batch: its ``logits`` where it returns a structure."""
    args, kwargs, _ = split_batch(batch)
    output = model(*args, **kwargs)
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model returned {named_kind(output)}; expected a tensor, a structure with .logits, "
            "or a tuple that begins with the logits."
        )
    return logits


@dataclass(frozen=True)
class Classification:
    """One class for each sample; images and sequences alike.

    Cross-entropy, optionally weighted by class and with smoothed labels. Validation loss uses the same
    weights and smoothing as the training loss, so that the two can be compared. A class of weight 0 is
    left out: a batch of such samples alone has loss 0, as a batch of texts without scored tokens has.

    Attributes:
        classes: names, in the order of the model's outputs.
        name: ``"image_classification"`` or ``"text_classification"``; both do the same.
        class_weights: weight of each class in the loss, or None for equal weights.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).
        monitor: metric that picks the best epoch. Balanced accuracy by default, since plain accuracy
            rewards a model that never names the rare class.
        mode: ``"max"``; always ``"min"`` where `monitor` is ``"loss"``.
    """

    classes: tuple[str, ...]
    name: str = "image_classification"
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    monitor: str = "balanced_accuracy"
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        """Take the mode that the monitor has."""
        settle_mode(self)

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples stacked, a list of mappings as one mapping."""
        return torch.utils.data.default_collate(samples)

    def size(self, batch: Batch) -> float:
        """Return the number of labels; the sum of their weights where classes have some."""
        labels = split_batch(batch)[2]
        if self.class_weights is None:
            return len(labels)
        return float(torch.tensor(self.class_weights, dtype=torch.float64)[labels.cpu()].sum())

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, float[N, classes]."""
        return run_model(model, batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch (weighted mean where classes have weights)."""
        weight = None
        if self.class_weights is not None:
            weight = output.new_tensor(self.class_weights)
        labels = split_batch(batch)[2]
        try:
            loss = F.cross_entropy(output, labels, weight=weight, label_smoothing=self.label_smoothing)
        except (IndexError, RuntimeError, ValueError):  # torch names neither the classes nor the batch
            self.check(output, batch)
            raise
        if weight is not None and 0 in (self.class_weights or ()) and not weight[labels].any():
            return output.sum() * 0.0  # torch's mean over nothing is 0 / 0
        return loss

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs, labels and classes.

        Raises:
            DataError: the output is not [N, number of classes], or a label is no class index.
        """
        labels = split_batch(batch)[2]
        found: list[str] = []
        if len(self.classes) < 2:
            found.append(f"there is one class {_some(self.classes)}; expected at least two, to tell apart")
        if output.ndim != 2 or output.shape[1] != len(self.classes):
            found.append(
                f"the model's output has shape {tuple(output.shape)}; expected [N, {len(self.classes)}] for "
                f"the {len(self.classes)} classes {_some(self.classes)}. Give the model a head of that size"
            )
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
            found.append(f"labels are {kind}; expected one integer for each sample")
        elif labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            found.append(
                f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                f"{len(self.classes) - 1}"
            )
        if found:
            raise DataError("; ".join(found) + ".")

    def metrics(self) -> MetricCollection:
        """Return accuracy, balanced accuracy, macro F1, per-class scores and the confusion matrix."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassConfusionMatrix,
            MulticlassF1Score,
            MulticlassPrecision,
            MulticlassRecall,
        )

        k = len(self.classes)
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(k, average="micro"),
                "macro_f1": MulticlassF1Score(k, average="macro"),
                "precision": MulticlassPrecision(k, average=None),
                "recall": MulticlassRecall(k, average=None),
                "f1": MulticlassF1Score(k, average=None),
                "confusion": MulticlassConfusionMatrix(k),
            }
        )

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch."""
        metrics.update(output, split_batch(batch)[2])

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return the counted metrics as numbers and tables."""
        found = {key: value.detach().cpu() for key, value in metrics.compute().items()}
        confusion = found["confusion"]
        rows = [
            {
                "class": name,
                **{key: round(float(found[key][i]), 6) for key in ("precision", "recall", "f1")},
                "samples": int(confusion[i].sum()),
            }
            for i, name in enumerate(self.classes)
        ]
        values = {
            "accuracy": float(found["accuracy"]),
            "balanced_accuracy": balanced_accuracy(confusion),
            "macro_f1": float(found["macro_f1"]),
        }
        return Scores(values, {"per_class": rows, "confusion": confusion.tolist()})

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return for each sample its label, that label's probability, and those of all classes."""
        decoded = []
        for row in output.float().softmax(dim=-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            decoded.append(
                {
                    "label": self.classes[best],
                    "probability": row[best],
                    "probabilities": dict(zip(self.classes, row)),
                }
            )
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data."""
        return dataclasses.asdict(self)


_MODES: dict[str, Literal["max", "min"]] = {
    **dict.fromkeys(("loss", "rmse", "mae"), "min"),
    **dict.fromkeys(("r2", "pearson"), "max"),
}
"""Monitor -> the only mode that makes sense with it."""


def settle_mode(task: Any) -> None:
    """Give a task (a frozen dataclass under construction) the mode of its monitor, if there is but one.

    >>> Classification(("a", "b"), monitor="loss").mode
    'min'
    """
    object.__setattr__(task, "mode", _MODES.get(task.monitor, task.mode))


def balanced_accuracy(confusion: Tensor) -> float:
    """Return the mean recall of the classes that have samples; NaN where none has.

    A class without samples has no recall, so it does not count (torchmetrics' macro recall counts it as 0
    where it is predicted).

    >>> balanced_accuracy(torch.tensor([[3, 1, 0], [0, 1, 1], [0, 0, 0]]))
    0.625

    Args:
        confusion: int[classes, classes]; rows are true classes, columns predicted ones.
    """
    samples = confusion.sum(dim=1)
    recall = confusion.diagonal()[samples > 0].double() / samples[samples > 0]
    return float(recall.mean())


def _classification_from_dict(data: dict[str, Any]) -> Task:
    weights = data.get("class_weights")
    return Classification(
        **{
            **data,
            "classes": tuple(data["classes"]),
            "class_weights": None if weights is None else tuple(weights),
        }
    )


def _text_from_dict(data: dict[str, Any]) -> Task:
    from layerwise.training.text_tasks import TEXT_TASKS  # it builds on this module

    return TEXT_TASKS[data["name"]](data)


TASKS: dict[str, Callable[[dict[str, Any]], Task]] = {
    "image_classification": _classification_from_dict,
    "text_classification": _classification_from_dict,
    "multi_label": _text_from_dict,
    "regression": _text_from_dict,
    "token_classification": _text_from_dict,
    "causal_lm": _text_from_dict,
    "masked_lm": _text_from_dict,
}
"""Task name -> function that builds the task from what its ``to_dict`` returned."""


def task_from_dict(data: dict[str, Any]) -> Task:
    """Return the task that `Task.to_dict` described.

    Raises:
        DataError: its name is not in `TASKS`.
    """
    try:
        build = TASKS[data["name"]]
    except KeyError:
        raise DataError(
            f"task {data.get('name')!r} is not known ({', '.join(TASKS)})."
            f"{did_you_mean(str(data.get('name')), TASKS)}"
        ) from None
    return build(data)


def infer_task(batch: Batch, *, classes: Sequence[str] | None, outputs: int, **options: Any) -> Task:
    """Return the task that a first batch speaks for.

    Integer labels, one for each sample, mean classification; ``"text_classification"`` where the
    batch is a mapping, ``"image_classification"`` where it is a pair.

    Args:
        batch: the first batch.
        classes: names of the classes; None names them by number.
        outputs: width of the model's output, the number of classes where `classes` is None.
        options: further fields of the task.

    Raises:
        DataError: labels are of another kind.
    """
    _, kwargs, labels = split_batch(batch)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
        kind = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        )
        raise DataError(
            f"labels of the first batch are {kind}; task='auto' knows one integer for each sample. "
            "Give fit a task object that says what they mean: fit(..., task=...)."
        )
    names = tuple(classes) if classes is not None else tuple(str(i) for i in range(outputs))
    name = "text_classification" if kwargs else "image_classification"
    return Classification(names, name, **options)


def _some(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return f"({shown}, ...)" if len(names) > limit else f"({shown})"
