"""Tasks beside one class a sample: several labels, or numbers.

Each is a frozen dataclass with the members of `layerwise.training.tasks.Task`. Those whose labels belong
to tokens are in `layerwise.training.token_tasks`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import DataError
from layerwise.layers.devices import widest_float
from layerwise.training.tasks import (
    Batch,
    Scores,
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
class MultiLabel:
    """Any number of labels for each sample, each on or off by itself.

    The loss is the mean over samples and labels of the binary cross-entropy of each output.

    Attributes:
        classes: names, in the order of the model's outputs.
        threshold: probability from which a label counts as on, in (0, 1).
        monitor: metric that picks the best epoch. Macro F1 by default: with many labels nearly all of
            which are off, exact match and accuracy say little.
        mode: ``"max"``; always ``"min"`` where `monitor` is ``"loss"``.
        name: key in `layerwise.training.known_tasks.TASKS`.
    """

    classes: tuple[str, ...]
    threshold: float = 0.5
    monitor: str = "macro_f1"
    mode: Literal["max", "min"] = "max"
    name: str = "multi_label"

    def __post_init__(self) -> None:
        """Take the mode that the monitor has."""
        settle_mode(self)

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples of equal length stacked; texts are padded by the collator of their data."""
        return torch.utils.data.default_collate(samples)

    def size(self, batch: Batch) -> int:
        """Return the number of samples."""
        return len(split_batch(batch)[2])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, float[N, classes]."""
        return run_model(model, batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(output, split_batch(batch)[2].to(output.dtype))

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs, labels and classes.

        Raises:
            DataError: there is one label, or two of one name; output or labels are not [N, number of
                classes]; or labels are not 0 and 1.
        """
        labels = split_batch(batch)[2]
        found = too_few(self.classes, "label") + same_names(self.classes)
        found += _wrong_width(output, len(self.classes), "classes")
        if not isinstance(labels, Tensor) or labels.shape != (len(output), len(self.classes)):
            found.append(f"labels are {kind_of(labels)}; expected [{len(output)}, {len(self.classes)}]")
        elif not bool(((labels == 0) | (labels == 1)).all()):
            found.append(f"labels go from {float(labels.min())} to {float(labels.max())}; expected 0 and 1")
        raise_found(found)

    def metrics(self) -> MetricCollection:
        """Return macro and micro F1, exact match, and scores of each label; 0 where one is not defined."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            MultilabelExactMatch,
            MultilabelF1Score,
            MultilabelPrecision,
            MultilabelRecall,
            MultilabelStatScores,
        )

        k = len(self.classes)  # they are given what is on: torchmetrics' own threshold is exclusive
        return MetricCollection(
            {
                "macro_f1": MultilabelF1Score(k, average="macro"),
                "micro_f1": MultilabelF1Score(k, average="micro"),
                "exact_match": MultilabelExactMatch(k),
                "precision": MultilabelPrecision(k, average=None),
                "recall": MultilabelRecall(k, average=None),
                "f1": MultilabelF1Score(k, average=None),
                "counts": MultilabelStatScores(k, average=None),
            },
            compute_groups=False,  # exact match counts differently, and groups are only found on 2nd use
        )

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch."""
        metrics.update(self._on(output).long(), split_batch(batch)[2].long())

    def _on(self, output: Tensor) -> Tensor:
        """Return which labels are on, bool[N, classes]; metrics and predictions are of one mind."""
        return output.float().sigmoid() >= self.threshold

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return the counted metrics as numbers, and one row a label."""
        found = {key: value.detach().cpu() for key, value in metrics.compute().items()}
        rows = [
            {
                "class": name,
                **{key: round(float(found[key][i]), 6) for key in ("precision", "recall", "f1")},
                "samples": int(found["counts"][i, 4]),  # tp, fp, tn, fn, support
            }
            for i, name in enumerate(self.classes)
        ]
        values = {key: float(found[key]) for key in ("macro_f1", "micro_f1", "exact_match")}
        return Scores(values, {"per_class": rows})

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return for each sample the labels that are on, and the probability of every label."""
        decoded = []
        for row, marks in zip(output.float().sigmoid().tolist(), self._on(output).tolist()):
            on = [name for name, mark in zip(self.classes, marks) if mark]
            decoded.append({"labels": on, "probabilities": dict(zip(self.classes, row))})
        return decoded

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Regression:
    """One or several numbers for each sample.

    The loss is the mean squared error of *standardised* numbers, ``(y - mean) / scale``, so that prices
    in thousands and scores in [0, 1] learn at the same rates; metrics and predictions are in the
    caller's own unit. Take mean and scale from the training labels: `Regression.fitted`.

    Attributes:
        classes: names of the numbers, in the order of the model's outputs.
        mean: of each number; empty is 0.
        scale: of each number, above 0; empty is 1.
        monitor: metric that picks the best epoch: ``"rmse"``, ``"mae"``, ``"r2"`` or ``"pearson"`` (each
            the mean over the numbers of their own), or ``"loss"``.
        mode: that of the monitor: ``"max"`` for R2 and the correlation, else ``"min"``.
        name: key in `layerwise.training.known_tasks.TASKS`.
    """

    classes: tuple[str, ...] = ("value",)
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    monitor: str = "rmse"
    mode: Literal["max", "min"] = "min"
    name: str = "regression"

    def __post_init__(self) -> None:
        """Look at mean and scale, and take the mode that the monitor has.

        Raises:
            DataError: there is not one finite mean, and one finite scale above 0, for each number.
        """
        for field, values in (("mean", self.mean), ("scale", self.scale)):
            if values and len(values) != len(self.classes):
                raise DataError(f"{field} has {len(values)} values for {len(self.classes)} numbers.")
            if any(not math.isfinite(value) or (field == "scale" and value <= 0) for value in values):
                expected = "finite numbers above 0" if field == "scale" else "finite numbers"
                raise DataError(f"{field} is {values}; expected {expected}.")
        settle_mode(self)

    @classmethod
    def fitted(cls, labels: Tensor, classes: tuple[str, ...] = ("value",)) -> Regression:
        """Return the task with mean and standard deviation (over N) of `labels`, float[N] or [N, numbers].

        >>> Regression.fitted(torch.tensor([1.0, 3.0])).mean
        (2.0,)

        Raises:
            DataError: a number is the same in all samples, or not finite.
        """
        columns = labels.double().reshape(len(labels), -1)
        scale = columns.std(dim=0, correction=0)
        same = (columns == columns[:1]).all(dim=0)  # their deviation may be of rounding, not 0
        for name, one, is_same in zip(classes, scale.tolist(), same.tolist()):
            if is_same or not math.isfinite(one):
                what = "is the same in all samples" if is_same else "is not finite in some samples"
                raise DataError(f"{name!r} {what}; there is nothing to learn. Look at its column.")
        return cls(classes, tuple(columns.mean(dim=0).tolist()), tuple(scale.tolist()))

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples of equal length stacked; texts are padded by the collator of their data."""
        return torch.utils.data.default_collate(samples)

    def size(self, batch: Batch) -> int:
        """Return the number of samples."""
        return len(split_batch(batch)[2])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the standardised numbers, float[N, numbers]."""
        output = run_model(model, batch)
        return output.unsqueeze(-1) if output.ndim == 1 else output

    def _targets(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the standardised labels, float32[N, numbers].

        Standardised in float64, where the labels' device has it: years in bfloat16, or seconds since 1970
        in float32, would all be about the same number before the mean is taken off.
        """
        labels: Tensor = split_batch(batch)[2].reshape(output.shape)
        exact = labels.to(widest_float(labels.device))
        standard = (exact - self._constant(exact, self.mean, 0.0)) / self._constant(exact, self.scale, 1.0)
        return standard.to(output.device, torch.float32)

    def _constant(self, like: Tensor, values: tuple[float, ...], default: float) -> Tensor:
        return like.new_tensor(values or (default,) * len(self.classes))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean squared error of the standardised numbers."""
        return F.mse_loss(output.float(), self._targets(output, batch))

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs and labels.

        Raises:
            DataError: two numbers have one name, the output is not [N, numbers], or labels do not have one
                number for each.
        """
        labels = split_batch(batch)[2]
        found = same_names(self.classes) + _wrong_width(output, len(self.classes), "numbers")
        if not isinstance(labels, Tensor) or labels.numel() != len(output) * len(self.classes):
            found.append(f"labels are {kind_of(labels)}; expected [{len(output)}, {len(self.classes)}]")
        elif not bool(torch.isfinite(labels).all()):
            found.append("labels are not all finite")
        raise_found(found)

    def metrics(self) -> MetricCollection:
        """Return root mean squared and mean absolute error, R2 and Pearson's correlation."""
        from torchmetrics import MetricCollection
        from torchmetrics.regression import (
            MeanAbsoluteError,
            MeanSquaredError,
            PearsonCorrCoef,
            R2Score,
        )

        k = len(self.classes)
        return MetricCollection(
            {
                "rmse": MeanSquaredError(squared=False, num_outputs=k),
                "mae": MeanAbsoluteError(num_outputs=k),
                "r2": R2Score(multioutput="raw_values"),
                "pearson": PearsonCorrCoef(num_outputs=k),
            },
            compute_groups=False,
        )

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch, in standardised numbers."""
        targets = self._targets(output, batch)
        # the correlation of one column wants vectors
        metrics.update(*(t.squeeze(-1) if t.shape[-1] == 1 else t for t in (output, targets)))

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return the metrics in the caller's unit, and one row a number.

        R2 and the correlation are not defined for one sample, or where all labels or all predictions
        are equal; they are 0 there.
        """
        columns: dict[str, list[float]] = {}
        scale = self.scale or (1.0,) * len(self.classes)
        for name, metric in metrics.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they say that variances are near 0: see above
                try:
                    found = metric.compute().detach().cpu().double().reshape(-1).tolist()
                except ValueError:  # R2 of fewer than two samples
                    found = []
            found = found or [0.0] * len(self.classes)
            if name in ("rmse", "mae"):
                columns[name] = [value * unit for value, unit in zip(found, scale)]
            else:
                columns[name] = [value if math.isfinite(value) else 0.0 for value in found]
        rows = [
            {"number": number, **{name: round(values[i], 6) for name, values in columns.items()}}
            for i, number in enumerate(self.classes)
        ]
        means = {name: sum(values) / len(values) for name, values in columns.items()}
        return Scores(means, {"per_number": rows})

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return for each sample its numbers by name, in the caller's unit."""
        scale = self._constant(output.double(), self.scale, 1.0)
        values = output.double() * scale + self._constant(output.double(), self.mean, 0.0)
        return [dict(zip(self.classes, row)) for row in values.tolist()]

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data."""
        return dataclasses.asdict(self)


def _wrong_width(output: Tensor, width: int, what: str) -> list[str]:
    if output.ndim == 2 and output.shape[1] == width:
        return []
    return [
        f"the model's output has shape {tuple(output.shape)}; expected [N, {width}] for {width} {what}. Give "
        "the model a head of that size"
    ]
