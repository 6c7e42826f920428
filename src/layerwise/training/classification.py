"""`Classification`: one class for each sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.sources.encoding import IGNORED
from layerwise.training.tasks import (
    Batch,
    Scores,
    class_labels,
    kind_of,
    raise_found,
    run_model,
    same_names,
    settle_mode,
    split_batch,
    too_few,
)

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Classification:
    """One class for each sample; images and sequences alike.

    Cross-entropy, optionally weighted by class and with smoothed labels. Validation loss uses the same
    weights and smoothing as the training loss, so that the two can be compared. Samples of a class of weight
    0 are left out, smoothed or not: a batch of them alone has loss 0, as a batch of texts without scored
    tokens has.

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
        labels = class_labels(batch)
        if self.class_weights is None:
            return len(labels)
        return float(torch.tensor(self.class_weights, dtype=torch.float64)[labels.cpu()].sum())

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, float[N, classes]."""
        return run_model(model, batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch (weighted mean where classes have weights)."""
        weight = None
        labels = class_labels(batch)
        if self.class_weights is not None:
            weight = output.new_tensor(self.class_weights)
            if 0 in self.class_weights:  # torch would keep their smoothed share; its mean of none is 0 / 0
                without = [k for k, share in enumerate(self.class_weights) if share == 0]
                left_out = torch.isin(labels, labels.new_tensor(without))
                if left_out.all():
                    return output.sum() * 0.0
                labels = labels.masked_fill(left_out, IGNORED)
        try:
            return F.cross_entropy(output, labels, weight=weight, label_smoothing=self.label_smoothing)
        except (IndexError, RuntimeError, ValueError):  # torch names neither the classes nor the batch
            self.check(output, batch)
            raise

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs, labels and classes.

        Raises:
            DataError: there is one class, or two of one name; the output is not [N, number of classes]; or a
                label is no class index.
        """
        labels = split_batch(batch)[2]
        found = too_few(self.classes) + same_names(self.classes)
        if output.ndim != 2 or output.shape[1] != len(self.classes):
            found.append(
                f"the model's output has shape {tuple(output.shape)}; expected [N, {len(self.classes)}] for "
                f"the {len(self.classes)} classes {_some(self.classes)}. Give the model a head of that size"
            )
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            found.append(f"labels are {kind_of(labels)}; expected one integer for each sample")
        elif labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            found.append(
                f"labels go from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                f"{len(self.classes) - 1}"
            )
        raise_found(found)

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
        metrics.update(output, class_labels(batch))

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


def _some(names: Sequence[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return f"({shown}, ...)" if len(names) > limit else f"({shown})"
