"""Transferability at every depth: how well each group's frozen features separate the classes of a task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from layerwise.choosing import transferability as scores
from layerwise.choosing.features import Features, mapped_features
from layerwise.choosing.tables import text_table
from layerwise.errors import DataError
from layerwise.layers.layermap import LayerMap
from layerwise.shown import Shown


@dataclass(frozen=True)
class DepthScores:
    """Scores of one layer group's features; `layerwise.choosing.transferability` has the definitions.

    Attributes:
        group: the layer group; for the head, what its output layer receives.
        depth: groups between it and the head; the head is 0.
        logme: log evidence, per sample.
        leep: NLEEP: through soft clusters of the features in place of source classes.
        h_score: with shrinkage.
        knn: leave-one-out accuracy of five neighbours.
        probe: cross-validated accuracy of a linear probe; samples that are the only one of their class are
            missed, as by the neighbours. NaN where fewer than two classes have two samples.
        lead: by how many standard errors this probe beats the one at the output, both asked about the same
            held-out samples: ``(b - c) / sqrt(b + c)`` with b samples that only this one has right and c
            that only the other has (McNemar 1947). None where there is no probe.
    """

    group: str
    depth: int
    logme: float
    leep: float
    h_score: float
    knn: float
    probe: float
    lead: float | None = None

    @property
    def accuracy(self) -> float:
        """Held-out accuracy of the probe; of the neighbours where there is none."""
        return self.knn if np.isnan(self.probe) else self.probe

    def cells(self) -> list[str]:
        """Return the scores as a row of a table; a probe that could not be fitted is a dash."""
        figures = (self.probe, self.knn, self.logme, self.leep, self.h_score)
        return [self.group, str(self.depth), *("-" if np.isnan(v) else f"{v:z.3f}" for v in figures)]


@dataclass(frozen=True)
class Transferability(Shown):
    """Scores at every depth, input to output, and what they are of.

    Attributes:
        depths: from the first group to the head.
        samples: number of samples scored.
        classes: number of classes among them.
        chance: accuracy of always naming the most frequent class.
        head_leep: LEEP through the model's own outputs, or None without them. It means something only while
            the head is the pretrained one; a new head's outputs are noise.
    """

    depths: tuple[DepthScores, ...]
    samples: int
    classes: int
    chance: float
    head_leep: float | None

    @property
    def best(self) -> DepthScores:
        """The depth with the highest accuracy, the nearest to the output among equals."""
        return max(self.depths, key=lambda d: (d.accuracy, -d.depth))

    @property
    def last(self) -> DepthScores:
        """The depth nearest to the output."""
        return self.depths[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data for JSON; what is missing or not finite is None."""
        data = dataclasses.asdict(self)
        data["depths"] = [{name: _finite(value) for name, value in row.items()} for row in data["depths"]]
        return {name: _finite(value) for name, value in data.items()}

    def __str__(self) -> str:
        columns = ["group", "depth", "probe", "kNN", "LogME", "NLEEP", "H-score"]
        return text_table(columns, [d.cells() for d in self.depths])


def transferability(
    model: nn.Module,
    data: Any,
    *,
    layers: LayerMap | None = None,
    example_input: Any = None,
    max_samples: int | None = 512,
    batch_size: int = 32,
    collate: Any = None,
    seed: int = 0,
) -> Transferability:
    """Return transferability scores of every layer group's frozen features, from one pass over the data.

    Where the probe's accuracy is highest in the middle, the last groups are too special for this task and
    are the ones to train; where it still rises at the end, a linear probe loses least.

    Args:
        model: the pretrained network; unchanged.
        data: labelled; as for `layerwise.choosing.features.collect_features`.
        layers: its layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from; None takes two samples of the data.
        max_samples: so many samples are drawn; None takes all. The scores' cost grows with their cube.
        batch_size: of data that is no loader.
        collate: makes a batch of samples, of data that is no loader.
        seed: of the draw and of the folds.

    Raises:
        DataError: no labels, a single class, or no class with two samples.
        MissingExtraError: scikit-learn is not installed.
    """
    features, _ = mapped_features(
        model,
        data,
        layers,
        example_input,
        max_samples=max_samples,
        batch_size=batch_size,
        collate=collate,
        norms=False,
        seed=seed,
    )
    return score_depths(features, seed=seed)


def score_depths(features: Features, *, seed: int = 0) -> Transferability:
    """Return transferability scores of features that are collected already.

    Args:
        features: with labels.
        seed: of folds and clusters.

    Raises:
        DataError: no labels, a single class, or no class with two samples.
        MissingExtraError: scikit-learn is not installed.
    """
    if features.labels is None:
        raise DataError("the data has no labels, and transferability is about them. Give (inputs, labels).")
    labels = scores.as_labels(features.labels, features.samples)
    counts = np.bincount(labels)
    if counts.max() < 2:
        raise DataError(
            f"{features.samples} samples of {len(counts)} classes are one of each; to tell whether features "
            "separate classes, at least two samples of a class are needed."
        )
    outputs = features.outputs
    head_leep = None
    if outputs is not None and outputs.shape[1] > 1:
        shifted = np.exp(outputs - outputs.max(1, keepdims=True).astype(np.float64))
        head_leep = scores.leep(shifted / shifted.sum(1, keepdims=True), labels)
    right: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
    asked = counts[labels] > 1  # a class of one sample cannot be held out: missed, as by the neighbours
    if (counts > 1).sum() > 1:
        codes = scores.as_labels(labels[asked], int(asked.sum()))
        for name, values in features.groups.items():
            right[name] = np.zeros(len(labels), dtype=bool)
            right[name][asked] = scores.probe_predictions(values[asked], codes, folds=3, seed=seed) == codes
    last = right.get(list(features.groups)[-1])
    found = []
    for name, values in features.groups.items():
        found.append(
            DepthScores(
                group=name,
                depth=features.depth[name],
                logme=scores.logme(values, labels),
                leep=scores.leep(scores.soft_clusters(values, seed=seed), labels),
                h_score=scores.h_score(values, labels),
                knn=scores.knn_accuracy(values, labels),
                probe=float(right[name].mean()) if name in right else float("nan"),
                lead=None if last is None else _lead(right[name], last),
            )
        )
    return Transferability(
        depths=tuple(found),
        samples=features.samples,
        classes=len(counts),
        chance=float(counts.max() / counts.sum()),
        head_leep=head_leep,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _lead(right: np.ndarray[Any, np.dtype[np.bool_]], other: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Return McNemar's statistic, signed: 0 where the two are right about the same samples."""
    only, only_other = int((right & ~other).sum()), int((other & ~right).sum())
    return float((only - only_other) / max(only + only_other, 1) ** 0.5)
