"""What advice rests on: a few figures about data and model, measured in one or two passes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sized
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from layerwise.choosing.depths import Transferability, score_depths
from layerwise.choosing.features import Features, collect_features, mapped_features
from layerwise.choosing.samples import KeptBatches, open_sample, parts_of, reading, to_device
from layerwise.choosing.shift import measure, open_reference
from layerwise.choosing.shift_result import Shift
from layerwise.choosing.transferability import probe_predictions
from layerwise.errors import DataError, ModelError
from layerwise.layers.layermap import LayerMap
from layerwise.layers.norms import find_norms
from layerwise.layers.structures import map_tensors, tensors_in
from layerwise.tuning.calibration import calibrate_batchnorm

Level = Literal["similar", "somewhat", "dissimilar", "unknown"]
Confidence = Literal["high", "medium", "low"]
Pretraining = Literal["supervised", "self_supervised", "unknown"]
CALIBRATION_SAMPLES = 256
REFERENCE_WIDTH = 384
"""Of MiniLM and ViT-S: the width at which the rate of networks without batch-norm was measured."""


@dataclass(frozen=True)
class Weighting:
    """What class weights (``"balanced"``) do to the held-out predictions of a linear probe.

    Attributes:
        balanced_gain: balanced accuracy with weights minus without.
        accuracy_gain: accuracy with weights minus without; mostly below 0.
        balanced_error: standard error of the first, of the same samples asked twice.
        accuracy_error: of the second.
    """

    balanced_gain: float
    accuracy_gain: float
    balanced_error: float
    accuracy_error: float

    @classmethod
    def of(cls, without: npt.ArrayLike, with_weights: npt.ArrayLike, labels: npt.ArrayLike) -> Weighting:
        """Compare predictions of the same samples.

        Args:
            without: for each sample, 1 where it was right without weights, else 0; shape (n,).
            with_weights: the same with weights.
            labels: shape (n,), at least two of each class.
        """
        y = np.asarray(labels)
        change = np.asarray(with_weights, dtype=float) - np.asarray(without, dtype=float)
        classes = [change[y == label] for label in np.unique(y)]
        errors = [own.std(ddof=1) / len(own) ** 0.5 for own in classes]
        return cls(
            balanced_gain=float(np.mean([own.mean() for own in classes])),
            accuracy_gain=float(change.mean()),
            balanced_error=float(np.linalg.norm(errors)) / len(classes),
            accuracy_error=float(change.std(ddof=1) / len(change) ** 0.5),
        )

    @property
    def wins(self) -> bool:
        """Whether weights clearly bring balanced accuracy: by two standard errors."""
        return self.balanced_gain > 2 * self.balanced_error

    @property
    def pays(self) -> bool:
        """Whether they do at no clear cost of accuracy.

        A network that learns loses more accuracy by them than a probe does, so a trade of the two is left
        to who knows what a rare class is worth.
        """
        return self.wins and self.accuracy_gain >= -self.accuracy_error


@dataclass(frozen=True)
class Evidence:
    """The figures that decide.

    Attributes:
        samples: number of training samples; of a stream that does not say, those that were measured.
        classes: number of classes: those that the data name, else those of the measured sample.
        imbalance: largest class over smallest, in the measured sample.
        imbalance_p: probability of counts as uneven as these, or more, if all classes were equally frequent
            (Pearson's chi-square test).
        batch_size: that training will use.
        pretraining: how the network was pretrained.
        has_batchnorm: whether it has layers with running statistics.
        level: similarity of target and source; ``"unknown"`` where nothing could be compared.
        level_confidence: ``"low"`` where the interval of the figure crosses a threshold.
        shift: the shift, or None.
        transfer: transferability at every depth.
        measured: samples the transferability was measured on.
        recalibrated: `transfer` after batch-norm statistics were set to the target's; None if not tried.
        width: number of features that the head gets.
        at_least: whether there may be more samples, as the data do not say how many there are.
        weighting: what class weights do to a probe; None if not tried (no imbalance, or a class with a
            single sample).
        unknown: why nothing could be compared; empty where something was.
        notes: what else could not be measured.
    """

    samples: int
    classes: int
    imbalance: float
    batch_size: int
    pretraining: Pretraining
    has_batchnorm: bool
    level: Level
    level_confidence: Confidence
    shift: Shift | None
    transfer: Transferability
    measured: int
    recalibrated: Transferability | None = None
    unknown: str = ""
    notes: tuple[str, ...] = ()
    imbalance_p: float = 0.0
    width: int = REFERENCE_WIDTH
    at_least: bool = False
    weighting: Weighting | None = None

    @property
    def imbalanced(self) -> bool:
        """Whether the largest class is three times the smallest, and not by the luck of a small sample."""
        return self.imbalance >= 3 and self.imbalance_p < 0.01

    @property
    def weighted(self) -> bool:
        """Whether to weight the classes: they are imbalanced, and weights paid when tried."""
        return self.imbalanced and self.weighting is not None and self.weighting.pays

    @property
    def probe(self) -> float:
        """Held-out accuracy of a linear probe where the head stands; of neighbours where there is none."""
        return self.transfer.last.accuracy

    @property
    def gap(self) -> float:
        """How much accuracy the last groups lose against the best depth: they are too special."""
        return self.transfer.best.accuracy - self.probe

    @property
    def gap_errors(self) -> float:
        """The gap in standard errors: of the same samples asked twice (`DepthScores.lead`).

        Where there are no probes, of two independent proportions, which is on the careful side.
        """
        best = self.transfer.best
        if best.lead is not None:
            return max(best.lead, 0.0)
        return self.gap / float(np.hypot(self.error_of(self.probe), self.error_of(best.accuracy)))

    def error_of(self, accuracy: float) -> float:
        """Return the standard error of an accuracy on the measured sample, above 0 at 0 and 1 as well.

        ``sqrt(p (1 - p) / n)`` with one success and one failure added (Agresti and Coull 1998, halved).
        """
        n = self.measured + 2
        p = (accuracy * self.measured + 1) / n
        return float((p * (1 - p) / n) ** 0.5)

    @property
    def gain_of_recalibration(self) -> float | None:
        """Accuracy of the probe after batch-norm recalibration minus before; None if not tried."""
        return None if self.recalibrated is None else self.recalibrated.last.accuracy - self.probe


@cache
def thresholds() -> dict[str, Any]:
    """Return the similarity thresholds that ``python -m benchmarks calibrate --run`` measured."""
    text = resources.files("layerwise.choosing").joinpath("thresholds.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def similarity(shift: Shift) -> tuple[Level, Confidence]:
    """Return the level of a shift's input side by the calibrated thresholds, and how sure it is.

    ``"similar"`` below the first threshold, ``"dissimilar"`` from the second on. The confidence is low
    where the interval holds a threshold, medium within 20 % of one, else high. A shift that is not a number
    says nothing: ``"unknown"``.
    """
    if not np.isfinite(shift.input_side.value):
        return "unknown", "low"
    limits = thresholds()["norms" if shift.method == "norms" else "source"]
    side = shift.input_side
    cuts = (limits["high"], limits["low"])
    levels: tuple[Level, Level, Level] = ("similar", "somewhat", "dissimilar")
    level = levels[sum(side.value >= cut for cut in cuts)]
    if any(side.low <= cut <= side.high for cut in cuts):
        return level, "low"
    near = any(abs(side.value - cut) < 0.2 * cut for cut in cuts)
    return level, "medium" if near else "high"


def gather_evidence(
    model: nn.Module,
    train: Any,
    source: Any = None,
    *,
    layers: LayerMap | None = None,
    example_input: Any = None,
    batch_size: int = 32,
    pretraining: Pretraining = "unknown",
    max_samples: int | None = 512,
    collate: Any = None,
    seed: int = 0,
) -> tuple[Evidence, LayerMap]:
    """Return the evidence about one task, and the layer map it was measured with.

    Args: as for `layerwise.advise`.

    Raises:
        DataError: no labels, one class, fewer samples than classes, or a source of another kind.
    """
    classes = getattr(train, "classes", None)
    loader, total = open_sample(train, max_samples, batch_size, collate, seed)
    if loader is train:  # a stream
        train = KeptBatches(train, max_samples, total, seed)
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "batch_size": batch_size,
        "collate": collate,
        "seed": seed,
    }
    found, layers = mapped_features(model, train, layers, example_input, norms=source is None, **options)
    total = found.total or found.samples
    _check_classes(classes, found, total)
    transfer = score_depths(found, seed=seed)
    counts = np.unique(np.asarray(found.labels), return_counts=True)[1]
    last = next(reversed(found.groups.values()))
    unknown = ""
    measured: Shift | None = None
    method, reference = open_reference(model, source, layers, found, **options)
    try:
        measured = measure(found, reference, layers, method=method, seed=seed)
    except ModelError as error:
        if source is not None:
            raise
        unknown = str(error)
    level: Level = "unknown"
    confidence: Confidence = "low"
    if measured is not None:
        level, confidence = similarity(measured)
    has_batchnorm = any(norm.kind == "running" for norm in find_norms(model))
    recalibrated = None
    if has_batchnorm and level in ("somewhat", "dissimilar"):
        recalibrated = _recalibrated(model, train, layers, **options)
    evidence = Evidence(
        samples=total,
        classes=len(classes) if isinstance(classes, Sized) else transfer.classes,
        imbalance=float(counts.max() / counts.min()),
        imbalance_p=chance_of(counts),
        width=last.shape[1],
        at_least=found.total is None,
        batch_size=batch_size,
        pretraining=pretraining,
        has_batchnorm=has_batchnorm,
        level=level,
        level_confidence=confidence,
        shift=measured,
        transfer=transfer,
        measured=found.samples,
        recalibrated=recalibrated,
        unknown=unknown,
        notes=found.notes,
    )
    if evidence.imbalanced and counts.min() >= 2:
        evidence = replace(evidence, weighting=try_weights(last, found.labels, seed=seed))
    return evidence, layers


def try_weights(features: npt.ArrayLike, labels: Any, *, seed: int = 0) -> Weighting:
    """Return what class weights do to the held-out predictions of a linear probe, on the same folds.

    Args:
        features: shape (n, d).
        labels: shape (n,), at least two of each class.
        seed: of the three folds (two where a class has two samples).
    """
    y = np.unique(np.asarray(labels), return_inverse=True)[1]
    right = [
        (probe_predictions(features, y, folds=3, class_weight=weights, seed=seed) == y).astype(float)
        for weights in (None, "balanced")
    ]
    return Weighting.of(right[0], right[1], y)


def chance_of(counts: npt.ArrayLike) -> float:
    """Return the probability of counts at least as uneven as these if all classes were equally frequent.

    Pearson's chi-square test: ``Q((k - 1) / 2, x / 2)`` with ``x = sum((c - m)^2 / m)`` over k classes, m the
    mean count.

    >>> round(chance_of([10, 12, 8]), 3), chance_of([100, 1]) < 1e-9
    (0.67, True)
    """
    found = torch.as_tensor(np.asarray(counts), dtype=torch.float64)
    statistic = ((found - found.mean()) ** 2 / found.mean()).sum()
    half = torch.tensor((len(found) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def _recalibrated(
    model: nn.Module, train: Any, layers: LayerMap, *, seed: int, **options: Any
) -> Transferability:
    """Return the scores after batch-norm statistics were set to the target's, on a copy of the model."""
    loader, _ = open_sample(train, seed=seed, **{**options, "max_samples": CALIBRATION_SAMPLES})
    inputs: list[Any] = []
    with reading(loader, seed):
        for batch in loader:
            args, kwargs, _ = parts_of(batch)
            inputs.append(kwargs or args)
            if sum(len(tensors_in(entry)[0]) for entry in inputs) >= CALIBRATION_SAMPLES:
                break
    copied = copy.deepcopy(model)
    device = next(copied.parameters()).device
    calibrate_batchnorm(copied, to_device(_joined(inputs), device), forward=_forward)
    return score_depths(collect_features(copied, train, layers, norms=False, seed=seed, **options), seed=seed)


def _forward(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _joined(batches: list[Any]) -> list[Any]:
    """Return batches as one, which needs one pass; as they are where their samples differ in shape."""
    shapes = [[part.shape[1:] for part in tensors_in(batch)] for batch in batches]
    if any(found != shapes[0] for found in shapes):
        return batches
    joined = iter([torch.cat(parts) for parts in zip(*map(tensors_in, batches), strict=True)])
    return [map_tensors(batches[0], lambda _: next(joined))]


def _check_classes(names: Any, found: Features, total: int) -> None:
    if found.labels is None:
        raise DataError(
            "advice is about a labelled task, but the data has no labels. Give pairs (input, label); to "
            "measure unlabelled data use layerwise.shift."
        )
    declared = len(names) if isinstance(names, Sized) else len(np.unique(found.labels))
    if total < declared:
        raise DataError(
            f"there are {total} training samples for {declared} classes; every class needs at least one, and "
            "two to tell whether features separate it. Give more samples, or leave classes out."
        )
