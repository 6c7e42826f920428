"""The labels of a data set, and the weights that make up for classes of few samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from layerwise.errors import DataError
from layerwise.training.tasks import kind_of


def labels_of(data: Any) -> Tensor:
    """Return the labels of a map-style data set, int64[samples].

    From ``targets`` or ``labels``, the second tensor of a `TensorDataset`, or the column ``"labels"`` or
    ``"label"`` of a table; a `Subset` looks through. Where there is none of these every sample is
    loaded once to see its label. A ``target_transform`` is applied to ``targets`` and ``labels``, which
    torchvision's data sets keep as they were before it.

    Raises:
        DataError: labels are not one integer for each sample, or the data set is iterable.
    """
    if isinstance(data, IterableDataset):
        raise DataError(
            f"the labels of an iterable data set ({type(data).__name__}) are not known before it is read. "
            "Give class_weights as one number for each class, or use a map-style data set."
        )
    if isinstance(data, Subset):
        return labels_of(data.dataset)[torch.as_tensor(data.indices)]
    found: Any = None
    if isinstance(data, TensorDataset) and len(data.tensors) > 1:
        found = data.tensors[1]
    for name in ("targets", "labels"):
        if found is None and (there := getattr(data, name, None)) is not None and not callable(there):
            found = _transformed(there, getattr(data, "target_transform", None))
    columns = getattr(data, "column_names", None)
    if found is None and isinstance(columns, list):
        found = next((data[name] for name in ("labels", "label") if name in columns), None)
    if found is None:
        found = [_label(data[index]) for index in range(len(data))]
    try:
        labels = torch.as_tensor(found if isinstance(found, Tensor) else list(found))
    except (TypeError, ValueError, RuntimeError):
        labels = None
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(data):
        kind = "no single numbers" if labels is None else kind_of(labels)
        raise DataError(
            f"labels are {kind} for {len(data)} samples; expected one integer each. Class weights and "
            "weighted sampling need that; leave them out: --sampler, --class-weights (sampler=, "
            "class_weights=)."
        )
    return labels.long()


def _transformed(labels: Any, transform: Callable[[Any], Any] | None) -> Any:
    if transform is None:
        return labels
    return [transform(label) for label in (labels.tolist() if isinstance(labels, Tensor) else labels)]


def _label(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return sample.get("labels", sample.get("label"))
    return sample[1] if isinstance(sample, Sequence) and len(sample) > 1 else None


def balanced_class_weights(labels: Tensor, classes: Sequence[str]) -> tuple[float, ...]:
    """Return ``N / (K * n_k)`` for each class k: rare classes weigh more, the mean over samples is 1.

    >>> balanced_class_weights(torch.tensor([0, 0, 0, 1]), ["common", "rare"])
    (0.6666666666666666, 2.0)

    Raises:
        DataError: a class has no sample, or a label is no class number.
    """
    counts = _counts(labels, len(classes)).tolist()
    if missing := [name for name, count in zip(classes, counts) if not count]:
        raise DataError(
            f"class {', '.join(map(repr, missing))} has no training sample, so it has no balanced weight. "
            "Give class_weights as a sequence, or add samples."
        )
    return tuple(len(labels) / (len(classes) * count) for count in counts)


def sampling_weights(labels: Tensor) -> Tensor:
    """Return one weight a sample, float64, so that all classes are drawn equally often.

    Raises:
        DataError: a label is below 0.
    """
    return 1.0 / _counts(labels).double()[labels]


def _counts(labels: Tensor, classes: int | None = None) -> Tensor:
    """Return the number of samples of each class."""
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (classes is not None and highest >= classes):
        expected = "0 and above" if classes is None else f"0 to {classes - 1}"
        raise DataError(f"labels go from {lowest} to {highest}; expected {expected}.")
    return torch.bincount(labels, minlength=classes or 0)
