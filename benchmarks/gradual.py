"""Whole runs on real photos, decoding and first pass included: cached, plain, peers, and the floor.

    python -m benchmarks gradual [pipeline|gradual|depths ...] [--images 128] [--size 224] [--batch 32]
                                 [--rounds 3] [--resume]

*pipeline*: the last three groups of EfficientNet-Lite0 trained for 8 epochs on ELPV. *gradual*: gradual
unfreezing over 10 epochs. *depths*: five freeze depths, 5 epochs each, the deepest training half of the
network's work, as a search runs them, against five independent runs. The peers, fastai and Lightning with
finetuning-scheduler, train the same parameters in the same phases from the same loader.

*floor*: one forward of the data, and each phase's trained part on ready tensors. CPU time of one thread;
the contenders take turns run by run, and are compared within a round.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from benchmarks.measuring import Ratio, Results, Seconds, by_runs, verdict
from benchmarks.peers import PEERS, Phases, installed
from benchmarks.tasks import lite0
from layerwise.errors import plural
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.sources.demo import elpv_rows

RATE = 7e-4
PlanOf = Callable[[LayerMap], Plan]
Save = Callable[[dict[str, Any]], None]
"""Keeps the figures of the rounds so far."""


class Photos(Dataset[Any]):
    """ELPV photos, decoded and resized each time one is asked for.

    Args:
        count: how many.
        size: width and height, in pixels.
        batch: how many a loader puts together.
    """

    def __init__(self, count: int, *, size: int, batch: int) -> None:
        self.size, self.batch = size, batch
        rows = elpv_rows()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.rows = [rows[i][:2] for i in order[:count]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np
        from PIL import Image

        path, label = self.rows[index]
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5, label

    def loader(self) -> DataLoader[Any]:
        """Return a loader of them all that shuffles."""
        return DataLoader(self, batch_size=self.batch, shuffle=True)


def prepared(plan_of: PlanOf, data: Photos) -> tuple[nn.Module, DataLoader[Any], layerwise.Tuner]:
    """Return a network, its loader, and a tuner that carries the plan out; always the same."""
    torch.manual_seed(0)
    model = lite0(2)
    loader = data.loader()
    layers = layerwise.layer_map(model, torch.zeros(2, 3, data.size, data.size), granularity="stages")
    tuner = layerwise.Tuner(
        model, plan_of(layers), torch.optim.AdamW, lr=RATE, steps_per_epoch=len(loader), layers=layers
    )
    torch.manual_seed(1)
    return model, loader, tuner


def phases_of(tuner: layerwise.Tuner) -> Phases:
    """Return which parameters learn in each phase, and for how many epochs."""
    return [
        (tuner.trainable_names(number), int(phase.epochs or 0))
        for number, phase in enumerate(tuner.plan.phases)
    ]


def train(
    plan_of: PlanOf, data: Photos, weights: dict[str, Tensor], *, cached: bool, pool: Any = None
) -> float:
    """Train by a plan; return the CPU seconds, and leave what was learned in `weights`."""
    model, loader, tuner = prepared(plan_of, data)
    make_cache = layerwise.PrefixCache  # imported by that, as peers are before their time begins
    began_s = process_time()
    cache = make_cache(model, loader, tuner=tuner, pool=pool) if cached else None
    for _ in tuner.epochs():
        model.train()
        for images, labels in loader if cache is None else cache.batches():
            nn.functional.cross_entropy(model(images), labels).backward()
            tuner.step()
    seconds = process_time() - began_s
    weights.update({name: value.clone() for name, value in model.state_dict().items()})
    return seconds


def floor(plan_of: PlanOf, data: Photos) -> float:
    """Return the CPU seconds of one forward of the data and of each phase's trained part on ready tensors."""
    model, loader, tuner = prepared(plan_of, data)
    with torch.no_grad():
        began_s = process_time()
        model.eval()
        for images, _ in loader:
            model(images)
        seconds = process_time() - began_s
    for _ in tuner.epochs():
        model.train()
        start = _first_trained(tuner.trainable_names())
        ready = _ready(model, loader, start)
        began_s = process_time()
        for value, labels in ready:
            nn.functional.cross_entropy(_rest(model, value, start), labels).backward()
            tuner.step()
        seconds += process_time() - began_s
    return seconds


def _first_trained(names: frozenset[str]) -> int:
    """Return the number of the first block that learns; 7 is conv_head, 8 the classifier, -1 the stem."""
    if any(name.startswith(("conv_stem", "bn1")) for name in names):
        return -1
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    if blocks:
        return min(blocks)
    return 7 if any(name.startswith("conv_head") for name in names) else 8


def _ready(model: nn.Module, loader: DataLoader[Any], start: int) -> Iterable[tuple[Tensor, Tensor]]:
    if start < 0:
        return loader  # nothing is frozen: the photos themselves, decoded
    found = []
    with torch.no_grad():
        for images, labels in loader:
            value = model.bn1(model.conv_stem(images))
            for block in model.blocks[: min(start, 7)]:
                value = block(value)
            if start == 8:
                value = model.global_pool(model.bn2(model.conv_head(value)))
            found.append((value, labels))
    return found


def _rest(model: nn.Module, value: Tensor, start: int) -> Tensor:
    if start < 0:
        return model(value)
    if start == 8:
        return model.classifier(value)
    for block in model.blocks[start:]:
        value = block(value)
    return model.forward_head(model.bn2(model.conv_head(value)))


def whole_run(plan_of: PlanOf, data: Photos, save: Save, *, rounds: int, limits: dict[str, float]) -> None:
    """Measure the cached run's time over that of each other contender."""
    plain: dict[str, Tensor] = {}
    cached: dict[str, Tensor] = {}

    def peer(name: str) -> Callable[[], float]:
        def run() -> float:
            phases = phases_of(prepared(plan_of, data)[2])
            torch.manual_seed(0)
            return PEERS[name][1](lite0(2), data.loader(), phases, RATE)

        return run

    contenders: dict[str, Callable[[], float]] = {
        "cached": lambda: train(plan_of, data, cached, cached=True),
        "floor": lambda: floor(plan_of, data),
        "plain": lambda: train(plan_of, data, plain, cached=False),
        **{name: peer(name) for name in installed()},
    }

    def after_round(timed: list[Seconds]) -> None:
        same = all(torch.equal(value, cached[name]) for name, value in plain.items())
        save({**_compared(timed, "cached", limits), "bit_equal_to_plain": same})

    by_runs(contenders, rounds=rounds, after_round=after_round)


def depths(data: Photos, save: Save, *, rounds: int, limits: dict[str, float]) -> None:
    """Measure five depths that share their stored values over five runs of their own, 5 epochs each."""
    counts = (1, 2, 3, 4, 5)
    plans: list[PlanOf] = [lambda layers, k=k: layerwise.top_k(layers, k=k, epochs=5) for k in counts]  # type: ignore[misc]
    ends: dict[str, list[dict[str, Tensor]]] = {"shared": [], "independent": []}

    def shared() -> float:
        upcoming = [phases_of(prepared(plan_of, data)[2])[0] for plan_of in plans]
        pool = layerwise.CachePool(upcoming=dict(upcoming))
        ends["shared"] = [{} for _ in plans]
        return sum(train(p, data, w, cached=True, pool=pool) for p, w in zip(plans, ends["shared"]))

    def independent() -> float:
        ends["independent"] = [{} for _ in plans]
        return sum(train(p, data, w, cached=False) for p, w in zip(plans, ends["independent"]))

    def after_round(timed: list[Seconds]) -> None:
        pairs = zip(ends["shared"], ends["independent"])
        same = all(torch.equal(value, one[name]) for one, other in pairs for name, value in other.items())
        save({**_compared(timed, "shared", limits), "bit_equal_to_plain": same})

    by_runs({"shared": shared, "independent": independent}, rounds=rounds, after_round=after_round)


def _compared(timed: list[Seconds], one: str, limits: dict[str, float]) -> dict[str, Any]:
    others = [name for name in timed[0] if name != one]
    return {
        "ratios": {name: Ratio.of(timed, one, name).to_list() for name in others},
        "limits": limits,
        "cpu_s": {name: [round(seconds[name], 1) for seconds in timed] for name in timed[0]},
        "rounds": len(timed),
    }


def lines(row: dict[str, Any]) -> str:
    """Return the table of one part."""
    same = "bit-equal to the plain loop's" if row["bit_equal_to_plain"] else "NOT those of the plain loop"
    photos = f"{plural(row['images'], 'photo')} of {row['size']} pixels in batches of {row['batch']}"
    found = [f"-- {row['work']}; {photos}; {plural(row['rounds'], 'round')}; weights {same}"]
    for name, values in row["ratios"].items():
        ratio = Ratio(*values)
        found.append(f"   of {name:22s} {ratio!s:22s} {verdict(ratio.median, row['limits'].get(name))}")
    return "\n".join(found)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradual")
    parser.add_argument("what", nargs="*", help="of pipeline, gradual, depths; default all")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="pixels; the network's own by default")
    parser.add_argument("--batch", type=int, default=32, help="photos; as in `layerwise fit` by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="measure only what the results lack")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = Photos(options.images, size=options.size, batch=options.batch)
    about = {"images": len(data), "size": data.size, "batch": data.batch}
    results = Results("gradual")
    third = {"plain": 0.3, "fastai": 0.3, "finetuning-scheduler": 0.3}
    parts: dict[str, tuple[str, PlanOf | None, dict[str, float]]] = {
        "pipeline": ("last three groups, 8 epochs", lambda m: layerwise.top_k(m, k=3, epochs=8), third),
        "gradual": (
            "gradual unfreezing, 10 epochs",
            lambda m: layerwise.gradual_unfreezing(m, epochs=10),
            {"floor": 1.1},
        ),
        "depths": ("five freeze depths, 5 epochs each", None, {"independent": 0.5}),
    }
    for name in options.what or parts:
        work, plan_of, limits = parts[name]
        key = " ".join(map(str, (name, *about.values())))
        if not (options.resume and key in results.rows):

            def save(row: dict[str, Any], key: str = key, work: str = work) -> None:
                results.save(key, {"work": work, **about, **row})

            if plan_of is None:
                depths(data, save, rounds=options.rounds, limits=limits)
            else:
                whole_run(plan_of, data, save, rounds=options.rounds, limits=limits)
        print(lines(results.rows[key]), flush=True)
