"""Regret of `layerwise.advise` on real tasks: how far the advised plan is from the best of a grid.

Development tasks, at hand when the rules were written: solar cells (ELPV), MNIST and 8x8 digits at 64 px with
EfficientNet-Lite0, and the topics of Debian packages with MiniLM. Held-out tasks, added when the rules stood:
`benchmarks.held_out`. Each at 100, 300 and 1,000 training samples and three seeds, in batches of 16. For each
cell every plan of `GRID`, every baseline, and what the choosers say are trained for the same number of
epochs. ``auto`` is advice followed by a short search on a fifth of the training samples held out.

Regret: of one task and size, the mean over the seeds of each plan's test accuracy; the highest mean of the
grid minus that of the plan in question; averaged over tasks and sizes. The last columns take the best plan
of each seed by itself, which counts luck as skill, so no method can reach 0 there.

``python -m benchmarks advice`` prints a table for each group of tasks from
``benchmarks/results/advice/*.json``, one file a task (``--each``: every task and size as well); ``--run``
first trains what is missing, in pieces that can be interrupted (``--minutes``, ``--tasks``, ``--sizes``,
``--seeds``, ``--plans``; processes with different tasks may run at once). A task whose data are not installed
is named and left out, and the exit code is then 1. Nothing is printed that was not run: a table says how many
cells it is over. A plan that two choosers come to is trained once.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.held_out import HELD_OUT, MissingPackageError, held_out_task
from benchmarks.tasks import PIXELS, Rows, Task, image_task, text_task
from layerwise.choosing.advice import Advice, advise
from layerwise.choosing.auto import TRIALS, pick, space_around
from layerwise.choosing.search import search
from layerwise.files import write_json
from layerwise.layers.layermap import LayerMap
from layerwise.layers.mapping import layer_map
from layerwise.layers.randomness import seed_everything
from layerwise.plans.parsing import parse_strategy
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Schedule
from layerwise.training.fit import fit

RESULTS = Path(__file__).parent / "results" / "advice"
SIZE, BATCH = 64, 16
TASKS = ("elpv", "mnist", "digits", "debian")
GROUPS = {"development": TASKS, "held out": tuple(HELD_OUT)}
"""Tasks reported together: those at hand when the rules were written, and those added afterwards."""
EPOCHS = {100: 15, 300: 8, 1000: 4}
"""Training samples -> epochs of every plan: more where there are few."""
TEXT_EPOCHS = {100: 10, 300: 6, 1000: 3}
SIZES, SEEDS = tuple(EPOCHS), (0, 1, 2)
GRID = (
    "linear_probe",
    "top_k(k=2)",
    "top_k(k=3)",
    "top_k(k=5)",
    "full",
    "gradual_unfreezing(decay=0.9)",
)
BASELINES = ("linear_probe", "top_k(k=2)", "full", "fine_tune")
"""What people do without advice; ``fine_tune`` is fastai's recipe at its own default rate."""
FINE_TUNE_LR = 2e-3
CHOOSERS = ("advise", "auto")
FIRST = "advise, as first held out"
"""What was advised before held-out results changed a rule; kept in the results where it differs."""


@dataclass
class Cell:
    """One training set: a task, its size and a seed.

    Attributes:
        task: the data set and its network.
        samples: for training.
        seed: of the draw, the new head and the training.
    """

    task: Task
    samples: int
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What its results are filed under."""
        return {"task": self.task.name, "samples": self.samples, "seed": self.seed}

    @property
    def epochs(self) -> int:
        """Length of every plan."""
        return (TEXT_EPOCHS if isinstance(self.task.pool, Rows) else EPOCHS)[self.samples]

    def model(self) -> nn.Module:
        """Return the network where training starts; every call the same."""
        seed_everything(self.seed)
        return self.task.network()

    @cached_property
    def layers(self) -> LayerMap:
        """The layer map that all plans are made for."""
        first = self.task.pool[0]
        example = (
            {k: v[None].expand(2, -1) for k, v in first.items() if k != "labels"}
            if isinstance(first, dict)
            else torch.stack([first[0]] * 2)
        )
        return layer_map(self.model(), example, "stages")

    @cached_property
    def advice(self) -> Advice:
        """What `layerwise.advise` says."""
        return advise(
            self.model(), self.task.train(self.samples, self.seed), layers=self.layers, epochs=self.epochs,
            batch_size=BATCH, pretraining="supervised", seed=self.seed,
        )  # fmt: skip

    def named(self, strategy: str) -> tuple[Plan, float]:
        """Return a plan of the grid with its base rate; fastai's recipe keeps its own schedule and rate."""
        if strategy == "fine_tune":
            return parse_strategy(strategy, self.layers, epochs=self.epochs), FINE_TUNE_LR
        schedule = Schedule(shape="cosine", warmup_frac=0.05)
        plan = parse_strategy(strategy, self.layers, epochs=self.epochs, schedule=schedule)
        return plan, self.task.probe_lr if strategy == "linear_probe" else self.task.lr

    def searched(self) -> tuple[Plan, float, dict[str, Any]]:
        """Return what ``--strategy auto`` chooses after a short search on a held-out fifth."""
        chosen = self.task.draw(self.samples, self.seed)
        order = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(self.seed))]
        held, rest = order[: len(order) // 5].tolist(), order[len(order) // 5 :].tolist()
        space = space_around(self.advice, groups=len(self.layers))
        # "balanced" needs every class, and a rare one may be held out whole
        whole = len(self.task.labels[rest].unique()) == self.task.classes
        result = search(
            copy.deepcopy(self.model()), Subset(self.task.pool, rest), Subset(self.task.pool, held),
            trials=TRIALS, **space, layers=self.layers, batch_size=BATCH, metric="accuracy", refit="none",
            fit_options=self.advice.fit_options if whole else {}, seed=self.seed,
        )  # fmt: skip
        plan, lr, why = pick(self.advice, result, val_samples=len(held), tried=space["strategies"][0])
        return plan, lr, {"searched": result.best.choice, "why": why}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks advice", description=__doc__)
    parser.add_argument("--run", action="store_true", help="train what is missing first")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--tasks", default=",".join(name for group in GROUPS.values() for name in group))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--plans", help="only these: strategies, 'advise', 'auto'; separated by ';'")
    parser.add_argument("--each", action="store_true", help="print every task and size too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args(arguments)
    missing = run(options) if options.run else []
    rows = [row for path in sorted(options.results.glob("*.json")) for row in json.loads(path.read_text())]
    for name, tasks in GROUPS.items():
        own = [row for row in rows if row["task"] in tasks]
        print(f"{name}\n{table(own, cells=len(tasks) * len(SIZES) * len(SEEDS))}\n")
        if options.each:
            print(f"{each(own)}\n")
    for message in missing:
        print(message, file=sys.stderr)
    return 1 if missing else 0


def run(options: argparse.Namespace) -> list[str]:
    """Train the missing cells, saving after each; all tasks with the first seed before the second.

    Returns:
        One message for each task whose data are not installed.
    """
    missing: dict[str, str] = {}
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * (options.minutes or float("inf"))
    wanted = (
        options.plans.split(";") if options.plans else list(dict.fromkeys([*GRID, *BASELINES, *CHOOSERS]))
    )
    for seed in map(int, options.seeds.split(",")):
        for name in options.tasks.split(","):
            try:
                task = load_task(name)
            except MissingPackageError as error:
                missing[name] = f"{name} is left out: {error}"
                continue
            path = options.results / f"{name}.json"
            rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
            for samples in map(int, options.sizes.split(",")):
                cell = Cell(task, samples, seed)
                for plan in wanted:
                    key = {**cell.key, "plan": plan}
                    if any(all(row[k] == v for k, v in key.items()) for row in rows):
                        continue
                    if time.monotonic() > until:
                        return list(missing.values())
                    rows.append({**key, **measure(cell, plan, rows)})
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, rows)
                    print(json.dumps(rows[-1]), flush=True)
    return list(missing.values())


def load_task(name: str) -> Task:
    """Return a task by name."""
    if name in HELD_OUT:
        return held_out_task(name, SIZE)
    return image_task(name, SIZE) if name in PIXELS else text_task()


def measure(cell: Cell, name: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Train one plan, or what a chooser says, and return its test metrics and CPU seconds."""
    began = time.process_time()
    found: dict[str, Any] = {}
    fit_options: dict[str, Any] = {}
    if name in CHOOSERS:
        advice = cell.advice
        plan, lr, fit_options = advice.plan, advice.lr, advice.fit_options
        found = {"chosen": advice.strategy, "similarity": advice.similarity, "confidence": advice.confidence}
        if name == "auto":
            plan, lr, more = cell.searched()
            found |= more
    else:
        plan, lr = cell.named(name)
    found |= {"lr": lr, "digest": digest(plan, lr, fit_options), "choosing_cpu_s": _since(began)}
    for row in rows:  # training is deterministic: the same plan on the same cell needs no second run
        if {k: row.get(k) for k in (*cell.key, "digest")} == {**cell.key, "digest": found["digest"]}:
            return {**found, **{k: row[k] for k in ("accuracy", "balanced_accuracy")}, "cpu_s": _since(began)}
    result = fit(
        cell.model(), cell.task.train(cell.samples, cell.seed), None, test=cell.task.test, plan=plan,
        layers=cell.layers, lr=lr, batch_size=BATCH, seed=cell.seed, keep="last", progress=False,
        classes=[str(number) for number in range(cell.task.classes)], **fit_options,
    )  # fmt: skip
    assert result.test is not None
    scores = {k: round(result.test[k], 4) for k in ("accuracy", "balanced_accuracy")}
    return {**found, **scores, "cpu_s": _since(began)}


def digest(plan: Plan, lr: float, fit_options: dict[str, Any]) -> str:
    """Return a short name of everything that decides a training run on a given cell."""
    text = json.dumps([plan.to_dict(), lr, fit_options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _since(began: float) -> float:
    return round(time.process_time() - began, 1)


def regrets(rows: list[dict[str, Any]]) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Return each plan's regrets: of every task and size, of every cell; and the number of whole cells.

    `FIRST` is among the plans where a cell has it; in the other cells it is what is advised now.
    """
    accuracy = {(r["task"], r["samples"], r["seed"], r["plan"]): 100 * r["accuracy"] for r in rows}
    plans = list(dict.fromkeys([*CHOOSERS, *BASELINES, *GRID]))
    if any(row["plan"] == FIRST for row in rows):
        plans.insert(1, FIRST)
        advised = {key[:3]: value for key, value in accuracy.items() if key[3] == "advise"}
        accuracy = {**{(*place, FIRST): value for place, value in advised.items()}, **accuracy}
    whole = [place for place in sorted({key[:3] for key in accuracy})
             if all((*place, plan) in accuracy for plan in GRID)]  # fmt: skip
    by_cell: dict[str, list[float]] = {plan: [] for plan in plans}
    by_size: dict[str, list[float]] = {plan: [] for plan in plans}
    for place in whole:
        best = max(accuracy[(*place, plan)] for plan in GRID)
        for plan in plans:
            if (*place, plan) in accuracy:
                by_cell[plan].append(best - accuracy[(*place, plan)])
    for size in sorted({place[:2] for place in whole}):
        cells = [place for place in whole if place[:2] == size]
        means = {plan: np.mean([accuracy[(*place, plan)] for place in cells])
                 for plan in plans if all((*place, plan) in accuracy for place in cells)}  # fmt: skip
        best = max(means[plan] for plan in GRID)
        for plan, mean in means.items():
            by_size[plan].append(float(best - mean))
    return by_size, by_cell, len(whole)


def table(rows: list[dict[str, Any]], *, cells: int) -> str:
    """Return mean regret in points with its standard error, for each plan, over so many of `cells` cells."""
    by_size, by_cell, whole = regrets(rows)
    if not whole:
        return (
            f"{len(rows)} trainings so far; no cell has its whole grid yet. "
            "Run: python -m benchmarks advice --run"
        )
    lines = [
        f"{'plan':32} {'regret':>7} {'error':>6} {'worst':>6} {'sizes':>6}   "
        f"{'by seed':>7} {'error':>6} {'cells':>6}   (points of test accuracy)"
    ]
    for plan, regret in by_size.items():
        first, second = np.array(regret), np.array(by_cell[plan])
        if len(second):  # a plan may lack the seeds of a size, and still have cells
            means = f"{first.mean():7.2f} {_error(first):6.2f} {first.max():6.2f}" if regret else f"{'-':>21}"
            lines.append(
                f"{plan:32} {means} {len(first):6d}   "
                f"{second.mean():7.2f} {_error(second):6.2f} {len(second):6d}"
            )
    lines.append(f"{whole} of {cells} cells (task x samples x seed) have their whole grid")
    return "\n".join(lines)


def each(rows: list[dict[str, Any]]) -> str:
    """Return a line for each task and size: regret of the choosers, what was advised, and the best plan."""
    lines = [f"{'task':13} {'size':>5} {'seeds':>5} " + " ".join(f"{name:>6}" for name in CHOOSERS)
             + "   best plan (accuracy), advised"]  # fmt: skip
    for task, samples in sorted({(row["task"], row["samples"]) for row in rows}):
        own = [row for row in rows if (row["task"], row["samples"]) == (task, samples)]
        by_size, _, whole = regrets(own)
        if whole:
            best = next(plan for plan in GRID if by_size[plan] == [0.0])
            scores = [row["accuracy"] for row in own if row["plan"] == best]
            said = [row["chosen"] for row in own if row["plan"] == "advise"]
            found = " ".join(f"{by_size[name][0]:6.2f}" if by_size[name] else f"{'':6}" for name in CHOOSERS)
            lines.append(f"{task:13} {samples:5d} {whole:5d} {found}   {best} ({np.mean(scores):.3f}), "
                         f"{', '.join(dict.fromkeys(said))}")  # fmt: skip
    return "\n".join(lines)


def _error(values: np.ndarray[Any, Any]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
