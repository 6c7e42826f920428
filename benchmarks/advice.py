"""Regret of `layerwise.advise` on real tasks: how far the advised plan is from the best of a grid.

Tasks: solar cells (ELPV), MNIST, 8x8 digits, and the first two corrupted, each at 100, 300 and 1,000
training samples and three seeds, with EfficientNet-Lite0 at 64 px and batches of 16; texts with MiniLM are
not in it yet.
For each cell every plan of `GRID`, every baseline and the advised plan are trained for the same number
of epochs; regret is the best test accuracy among the grid minus that of the plan in question. ``auto`` is
advice followed by a short search on a fifth of the training samples held out.

``python -m benchmarks advice`` prints the table from ``benchmarks/results/advice.json``;
``--run`` first trains what is missing, in pieces that can be interrupted (``--minutes``, ``--tasks``,
``--sizes``, ``--seeds``, ``--plans``; several processes with different tasks and ``--results`` may run at
once). Nothing is printed that was not run: the table says how many cells it is over.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.tasks import Task, corrupt, image_task, lite0, normalised
from layerwise.choosing.advice import Advice, advise
from layerwise.choosing.auto import pick
from layerwise.choosing.search import search
from layerwise.choosing.space import spread_depths
from layerwise.files import write_json
from layerwise.layers.layermap import LayerMap
from layerwise.layers.mapping import layer_map
from layerwise.plans.parsing import parse_strategy
from layerwise.plans.plan import Plan, Schedule
from layerwise.training.fit import fit
from layerwise.training.randomness import seed_everything

RESULTS = Path(__file__).parent / "results" / "advice.json"
SIZE, BATCH = 64, 16
TASKS = ("elpv", "mnist", "digits", "elpv:blur:0.3", "mnist:noise:0.3")
EPOCHS = {100: 20, 300: 12, 1000: 8}
"""Training samples -> epochs of every plan: more steps where there are few."""
SIZES, SEEDS = tuple(EPOCHS), (0, 1, 2)
PROBE_RATE, RATE = 1e-2, 1e-3
GRID: dict[str, float] = {
    "linear_probe": PROBE_RATE,
    "top_k(k=2)": RATE,
    "top_k(k=3)": RATE,
    "top_k(k=5)": RATE,
    "full": RATE,
    "discriminative(decay=0.9)": RATE,
    "gradual_unfreezing(decay=0.9)": RATE,
    "surgical(which=first)": RATE,
    "lp_ft": RATE,
}
"""Strategy -> base rate."""
BASELINES = {"linear_probe": PROBE_RATE, "top_k(k=2)": RATE, "full": RATE, "fine_tune": 2e-3}
"""What people do without advice; ``fine_tune`` is fastai's recipe at its own default rate."""
CHOOSERS = ("advise", "auto")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks advice", description=__doc__)
    parser.add_argument("--run", action="store_true", help="train what is missing first")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--plans", help="only these: strategies, 'advise', 'auto'; separated by ';'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    cells: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    if options.run:
        run(options, cells)
    print(table(cells))
    return 0


def run(options: argparse.Namespace, cells: list[dict[str, Any]]) -> None:
    """Train the missing cells, saving after each."""
    began = time.monotonic()
    wanted = options.plans.split(";") if options.plans else [*CHOOSERS, *dict.fromkeys([*GRID, *BASELINES])]
    for name in options.tasks.split(","):
        task = load_task(name)
        for samples in map(int, options.sizes.split(",")):
            for seed in map(int, options.seeds.split(",")):
                for plan in wanted:
                    key = {"task": name, "samples": samples, "seed": seed, "plan": plan}
                    if any(all(cell[k] == v for k, v in key.items()) for cell in cells):
                        continue
                    if options.minutes is not None and time.monotonic() - began > options.minutes * 60:
                        return
                    cell = {**key, **measure(task, samples, seed, plan)}
                    cells.append(cell)
                    write_json(options.results, cells)
                    print(json.dumps(cell), flush=True)


def load_task(name: str) -> Task:
    """Return a task by name: a data set, perhaps with a corruption: ``"elpv:blur:0.3"``."""
    base, _, corruption = name.partition(":")
    task = image_task(base, SIZE)
    if not corruption:
        return task
    kind, strength = corruption.split(":")

    def changed(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return normalised(corrupt(part[0] * 0.5 + 0.5, kind, float(strength))), part[1]

    return Task(name, task.classes, changed(task.pool), changed(task.test))


def measure(task: Task, samples: int, seed: int, plan: str) -> dict[str, Any]:
    """Train one plan, or what a chooser says, and return its test metrics and CPU seconds."""
    x, y = task.train(samples, seed)
    train, test = TensorDataset(x, y), TensorDataset(*task.test)
    seed_everything(seed)
    model = lite0(task.classes)
    layers = layer_map(model, x[:2], "stages")
    epochs = EPOCHS[samples]
    began = time.process_time()
    found: dict[str, Any] = {}
    if plan in CHOOSERS:
        advice = advise(
            model, train, layers=layers, epochs=epochs, batch_size=BATCH, pretraining="supervised", seed=seed
        )
        chosen, lr = advice.plan, advice.lr
        found = {"chosen": advice.strategy, "similarity": advice.similarity, "confidence": advice.confidence}
        if plan == "auto":
            chosen, lr, found = searched(model, x, y, layers, epochs, seed, advice, found)
    else:
        lr = (GRID | BASELINES)[plan]
        chosen = build(plan, layers, epochs)
    choosing = time.process_time() - began
    result = fit(
        model, train, None, test=test, plan=chosen, layers=layers, lr=lr, batch_size=BATCH, seed=seed,
        keep="last", progress=False,
    )  # fmt: skip
    assert result.test is not None
    return {
        **found,
        "lr": lr,
        "accuracy": round(result.test["accuracy"], 4),
        "balanced_accuracy": round(result.test["balanced_accuracy"], 4),
        "choosing_cpu_s": round(choosing, 1),
        "cpu_s": round(time.process_time() - began, 1),
    }


def build(strategy: str, layers: LayerMap, epochs: int) -> Plan:
    """Return a plan of the grid; fastai's recipe keeps its own schedule."""
    if strategy == "fine_tune":
        return parse_strategy(strategy, layers, epochs=epochs)
    return parse_strategy(
        strategy, layers, epochs=epochs, schedule=Schedule(shape="cosine", warmup_frac=0.05)
    )


def searched(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    layers: LayerMap,
    epochs: int,
    seed: int,
    advice: Advice,
    found: dict[str, Any],
) -> tuple[Plan, float, dict[str, Any]]:
    """Return what ``--strategy auto`` would choose after a short search on a held-out fifth."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(y) // 5], order[len(y) // 5 :]
    result = search(
        copy.deepcopy(model), TensorDataset(x[rest], y[rest]), TensorDataset(x[held], y[held]),
        trials=8, depths=spread_depths(len(layers), count=4), strategies=[advice.strategy], epochs=epochs,
        layers=layers, batch_size=BATCH, metric="accuracy", refit="none", seed=seed,
    )  # fmt: skip
    plan, lr, why = pick(advice, result, val_samples=len(held))
    return plan, lr, {**found, "searched": result.best.choice, "why": why}


def regrets(cells: list[dict[str, Any]]) -> Iterator[tuple[str, str, int, int, float]]:
    """Yield (plan, task, samples, seed, regret) of each cell whose whole grid has been run."""
    accuracy = {(c["task"], c["samples"], c["seed"], c["plan"]): c["accuracy"] for c in cells}
    for place in sorted({key[:3] for key in accuracy}):
        if any((*place, plan) not in accuracy for plan in GRID):
            continue
        best = max(accuracy[(*place, plan)] for plan in GRID)
        for plan in dict.fromkeys([*CHOOSERS, *BASELINES, *GRID]):
            if (*place, plan) in accuracy:
                yield plan, *place, best - accuracy[(*place, plan)]


def table(cells: list[dict[str, Any]]) -> str:
    """Return mean regret in points with its standard error over cells, for each plan."""
    rows = list(regrets(cells))
    if not rows:
        return (
            f"{len(cells)} trainings so far; no cell has its whole grid yet. "
            "Run: python -m benchmarks advice --run"
        )
    lines = [f"{'plan':32} {'regret':>8} {'error':>7} {'worst':>7} {'cells':>6}   (points of test accuracy)"]
    for plan in dict.fromkeys([*CHOOSERS, *BASELINES, *GRID]):
        own = 100 * np.array([row[4] for row in rows if row[0] == plan])
        if len(own):
            error = own.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else float("nan")
            lines.append(f"{plan:32} {own.mean():8.2f} {error:7.2f} {own.max():7.2f} {len(own):6d}")
    total = len(TASKS) * len(SIZES) * len(SEEDS)
    places = len({row[1:4] for row in rows})
    lines.append(f"{places} of {total} cells (task x samples x seed) have their whole grid")
    return "\n".join(lines)
