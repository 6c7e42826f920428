"""The decision matrix: from similarity and number of samples to a strategy, nothing adjusted."""

from __future__ import annotations

import math
from typing import Literal

from layerwise.choosing.choice import Choice, full, last_groups, probe
from layerwise.choosing.evidence import CALIBRATION_SAMPLES, Evidence, Pretraining
from layerwise.layers.layermap import LayerMap
from layerwise.plans.settings import Norms

Size = Literal["< 1K", "1K-10K", "10K-100K", "> 100K"]
DECAY: dict[Pretraining, float] = {"supervised": 0.9, "self_supervised": 0.75, "unknown": 0.9}
"""Published recipes: 0.85-0.9 after supervised pretraining, 0.65-0.75 after self-supervised."""
L2_SP = 0.01
MOST = 0.65
"""Part of the groups that learns where the last few are too few and all are too many."""


def size_of(samples: int) -> Size:
    """Return the row of the matrix.

    >>> size_of(999), size_of(1000), size_of(100_000)
    ('< 1K', '1K-10K', '10K-100K')
    """
    if samples < 1_000:
        return "< 1K"
    if samples < 10_000:
        return "1K-10K"
    return "10K-100K" if samples <= 100_000 else "> 100K"


def default_epochs(samples: int) -> int:
    """Return a length that gives small data enough steps and does not waste large data: 20, 10, 5 or 3."""
    return {"< 1K": 20, "1K-10K": 10, "10K-100K": 5, "> 100K": 3}[size_of(samples)]


def matrix_cell(evidence: Evidence, layers: LayerMap, *, epochs: int = 10) -> Choice:
    """Return the strategy of the decision matrix (similarity x number of samples), nothing adjusted.

    Unknown similarity is taken as "somewhat similar". Numbers of groups that the model does not have are
    cut to what it has, and one epoch, which cannot be divided in phases, trains all groups at decayed rates
    where the matrix says gradual unfreezing; so every cell is a working plan for every map of two groups.
    """
    groups = len(layers)
    decay = DECAY[evidence.pretraining]
    size, level = size_of(evidence.samples), evidence.level
    gradual = f"{'gradual_unfreezing' if epochs > 1 else 'discriminative'}(decay={decay})"

    between = "similarity unknown" if level == "unknown" else "somewhat similar"

    def last(k: int, why: str) -> Choice:
        return last_groups(k, groups, why)

    if size == "< 1K":
        if level == "similar":
            return probe("few samples, similar to the source: frozen features suffice")
        if level == "dissimilar":
            return probe(
                "few samples, unlike the source: adapt the statistics to the target, then a linear probe",
                norms=calibrated(evidence) if evidence.has_batchnorm else None,
            )
        return last(3, f"few samples, {between}: only the last groups")
    if size == "1K-10K":
        if level == "similar":
            return last(3, "some thousand samples, similar: the last groups")
        if level == "dissimilar":
            return Choice(
                gradual,
                "some thousand samples, unlike the source: all groups one after another, held near "
                "their pretrained weights",
                {"l2_sp": L2_SP},
            )
        return Choice(gradual, f"some thousand samples, {between}: all groups one after another")
    if size == "10K-100K":
        if level == "similar":
            return last(math.ceil(groups / 2), "tens of thousands of samples, similar: the last half")
        if level == "dissimilar":
            return last(groups - 1, "tens of thousands of samples, unlike the source: most groups")
        return last(round(MOST * groups), f"tens of thousands of samples, {between}: the last 65 %")
    if level == "dissimilar":
        return full("more than 100,000 samples, unlike the source")
    return Choice(
        f"discriminative(decay={decay})", "more than 100,000 samples: all groups, later ones faster"
    )


def calibrated(evidence: Evidence) -> Norms:
    """Return batch-norm statistics of the target, from as many samples as their gain was measured with."""
    return Norms(policy="calibrate", samples=min(evidence.samples, CALIBRATION_SAMPLES))
