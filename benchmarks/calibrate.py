"""Calibrate the similarity thresholds of `layerwise.advise` on real and synthetic shifts.

For each data set the network's batch-norm statistics are set to that data set, so that it is the source,
and a linear probe is fitted on its frozen features. Then corruptions of increasing strength, and the other
data sets, take the place of the target. Recorded for each: the shift figures, and the *harm*: the share of
the probe's balanced accuracy above chance that is lost. (For another domain there is no accuracy; all is
lost.) A threshold is the figure at which the isotonic regression of harm on it crosses a given loss.

``python -m benchmarks calibrate --run`` measures what is missing from
``benchmarks/results/calibration.json`` and writes ``src/layerwise/choosing/thresholds.json``; without
``--run`` the results are only fitted and printed, with a table of where each kind of shift is said to sit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tasks import CORRUPTIONS, PIXELS, corrupt, lite0, normalised
from layerwise.choosing.features import Features, collect_features
from layerwise.choosing.shift import early_share, measure, where_of
from layerwise.choosing.signature import summarise
from layerwise.files import write_json
from layerwise.layers.mapping import layer_map
from layerwise.tuning.calibration import calibrate_batchnorm

RESULTS = Path(__file__).parent / "results" / "calibration.json"
THRESHOLDS = Path(__file__).parents[1] / "src" / "layerwise" / "choosing" / "thresholds.json"
SIZE, SOURCE, TARGET = 96, 240, 160
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)
HIGH, LOW = 0.1, 0.5
"""Loss of accuracy above chance up to which data count as similar, and from which on as dissimilar."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks calibrate", description=__doc__)
    parser.add_argument("--run", action="store_true", help="measure what is missing, and write thresholds")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if options.run:
        for name in PIXELS:
            measure_source(name, rows)
        write_json(THRESHOLDS, fit(rows))
    print(json.dumps(fit(rows), indent=2))
    print(places(rows))
    return 0


def measure_source(name: str, rows: list[dict[str, Any]]) -> None:
    """Add the rows of one source data set that are missing, saving after each."""
    torch.manual_seed(0)
    pixels, labels = PIXELS[name](SIZE)
    order = drawn(len(labels))
    source, target = order[:SOURCE], order[SOURCE : SOURCE + TARGET]
    model = lite0()
    calibrate_batchnorm(model, [normalised(pixels[source])])  # one batch needs one pass
    layers = layer_map(model, torch.zeros(2, 3, SIZE, SIZE), "stages")

    def collect(x: Tensor, y: Tensor | None = None) -> Features:
        data = normalised(x) if y is None else (normalised(x), y)
        return collect_features(model, data, layers, max_samples=None)

    clean = collect(pixels[source], labels[source])
    probe = fit_probe(clean)
    chance = 1 / len(labels.unique())
    reference = summarise(clean, layers)
    best = None
    targets: list[tuple[str, float]] = [
        (kind, s) for kind in CORRUPTIONS for s in STRENGTHS if s or kind == "noise"
    ]
    targets += [(f"domain:{other}", 1.0) for other in PIXELS if other != name]
    for kind, strength in targets:
        key = {"source": name, "kind": kind if strength else "none", "strength": strength}
        done = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
        if done is None:
            if kind.startswith("domain:"):
                x, y = PIXELS[kind.partition(":")[2]](SIZE)
                found, accuracy = collect(x[drawn(len(y))[:TARGET]]), None
            else:
                found = collect(corrupt(pixels[target], kind, strength), labels[target])
                accuracy = balanced_accuracy(probe(found), found.labels)
            found = dataclasses.replace(found, labels=None)  # nothing here is about them
            by_norms = measure(found, None, layers, method="norms", draws=40)
            by_source = measure(found, reference, layers, method="source", draws=40)
            done = {
                **key,
                "accuracy": accuracy,
                "chance": chance,
                "norms": [round(g.main.value, 5) for g in by_norms.groups],
                "source_frechet": [round(g.main.value, 5) for g in by_source.groups],
            }
            rows.append(done)
            write_json(RESULTS, rows)
        if not strength:
            best = done["accuracy"]
        accuracy = done["accuracy"]
        done["harm"] = (
            1.0
            if accuracy is None
            else round(float(np.clip(1 - (accuracy - chance) / (best - chance), 0, 1)), 4)
        )
        print(f"{name:8} {kind:16} {strength:.1f} harm {done['harm']:.2f}", flush=True)
    write_json(RESULTS, rows)


def drawn(count: int) -> Tensor:
    """Return the numbers of `count` samples in an order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def fit_probe(features: Features) -> Any:
    """Return a function that predicts classes from the features that the head receives."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    last = list(features.groups)[-1]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=500, class_weight="balanced"))
    probe.fit(features.groups[last], features.labels)
    return lambda found: probe.predict(found.groups[last])


def balanced_accuracy(predicted: Any, labels: Any) -> float:
    """Return the mean over classes of the share that is named rightly."""
    return float(np.mean([(predicted[labels == c] == c).mean() for c in np.unique(labels)]))


def fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return thresholds for both kinds of figure, and how well they tell the rows apart."""
    from sklearn.isotonic import IsotonicRegression

    found: dict[str, Any] = {
        "command": "python -m benchmarks calibrate --run",
        "figure": "mean over the first two thirds of the groups",
        "high_up_to_harm": HIGH,
        "low_from_harm": LOW,
        "rows": len(rows),
    }
    for method, column in (("norms", "norms"), ("source", "source_frechet")):
        x = np.array([input_side(row[column]) for row in rows])
        harm = np.array([row["harm"] for row in rows])
        grid = np.geomspace(max(x.min(), 1e-3), x.max(), 2000)
        curve = IsotonicRegression(out_of_bounds="clip").fit(x, harm).predict(grid)
        high, low = (float(grid[np.argmax(curve >= limit)]) for limit in (HIGH, LOW))
        level = np.digitize(harm, [HIGH, LOW])
        told = np.digitize(x, [high, low])
        found[method] = {
            "high": round(high, 4),
            "low": round(low, 4),
            "agree": round(float((level == told).mean()), 3),
            "agree_within_one": round(float((np.abs(level - told) <= 1).mean()), 3),
        }
    return found


def places(rows: list[dict[str, Any]]) -> str:
    """Return a line for each corruption: how many of its rows are said to sit early, throughout and late."""
    counts: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in rows:
        for column in ("norms", "source_frechet"):
            counts[row["kind"].partition(":")[0]][column, where_of(early_share(row[column]))] += 1
    lines = [f"{'where it sits':14} {'norms: early, throughout, late':>32} {'source: the same':>20}"]
    for kind, found in counts.items():
        norms, source = (
            ", ".join(str(found[column, place]) for place in ("early", "throughout", "late"))
            for column in ("norms", "source_frechet")
        )
        lines.append(f"{kind:14} {norms:>32} {source:>20}")
    return "\n".join(lines)


def input_side(figures: list[float]) -> float:
    """Return the mean over the first two thirds of the groups, as `Shift.input_side` does."""
    return float(np.mean(figures[: max(1, round(len(figures) * 2 / 3))]))
