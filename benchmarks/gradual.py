"""Whole runs on real photos, decoding and first pass included: cached, plain, peers, and the floor.

    python -m benchmarks gradual [pipeline|gradual|depths ...] [--images 128] [--size 224] [--batch 32]
                                 [--rounds 3] [--resume]

*pipeline*: the last three groups of EfficientNet-Lite0 trained for 8 epochs on ELPV. *gradual*: gradual
unfreezing over 10 epochs. *depths*: five freeze depths, 5 epochs each, the deepest training half of the
network's work, as a search runs them, against five runs of their own. The peers, fastai and Lightning with
finetuning-scheduler, train the same parameters in the same phases from the same loader.

*floor*: one forward of the data, and each phase's trained part on ready tensors. CPU time of one thread;
the contenders take turns run by run, and are compared within a round. Each run has a process of its own: what
ran before in a process decides how fast glibc hands out memory.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from benchmarks.measuring import Ratio, Results, Seconds, by_runs, in_new_process, verdict
from benchmarks.peers import PEERS, Phases, installed
from benchmarks.tasks import lite0
from layerwise.cache.changes.fingerprint import weights_digest
from layerwise.errors import plural
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.sources.demo import elpv_rows

RATE = 7e-4
PlanOf = Callable[[LayerMap], Plan]
Run = tuple[float, str]
"""CPU seconds, and a digest of the weights at the end; ``""`` of who trains others than the plain loop."""


@dataclass(frozen=True)
class Work:
    """What the contenders do.

    Attributes:
        title: for people.
        plans: trained one after the other.
        limits: contender -> most that the cached run may take of its time.
    """

    title: str
    plans: tuple[PlanOf, ...]
    limits: dict[str, float]

    def contenders(self) -> list[str]:
        """Return who does it: of several plans only the cached and the plain loop."""
        return ["cached", "plain", *(["floor", *installed()] if len(self.plans) == 1 else [])]


WORKS = {
    "pipeline": Work(
        "last three groups, 8 epochs",
        (lambda layers: layerwise.top_k(layers, k=3, epochs=8),),
        {"plain": 0.3, "fastai": 0.3, "finetuning-scheduler": 0.3},
    ),
    "gradual": Work(
        "gradual unfreezing, 10 epochs",
        (lambda layers: layerwise.gradual_unfreezing(layers, epochs=10),),
        {"floor": 1.1},
    ),
    "depths": Work(
        "five freeze depths, 5 epochs each",
        tuple(partial(layerwise.top_k, k=k, epochs=5) for k in (1, 2, 3, 4, 5)),
        {"plain": 0.5},
    ),
}


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


def train(plan_of: PlanOf, data: Photos, *, cached: bool, pool: Any = None) -> Run:
    """Train by a plan."""
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
    weights = model.state_dict()
    return seconds, weights_digest(weights, weights)


def train_all(plans: Sequence[PlanOf], data: Photos, *, cached: bool) -> Run:
    """Train by one plan after the other; with a cache, by what they share of it."""
    pool = None
    if cached and len(plans) > 1:
        pool = layerwise.CachePool(upcoming=dict(phases_of(prepared(one, data)[2])[0] for one in plans))
    seconds, ends = zip(*(train(one, data, cached=cached, pool=pool) for one in plans))
    return sum(seconds), " ".join(ends)


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


def run(contender: str, work: str, data: Photos) -> Run:
    """Do a work as one of the contenders does; for a new process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plans = WORKS[work].plans
    if contender == "floor":
        return floor(plans[0], data), ""
    if contender in PEERS:
        phases = phases_of(prepared(plans[0], data)[2])
        torch.manual_seed(0)
        return PEERS[contender][1](lite0(2), data.loader(), phases, RATE), ""
    return train_all(plans, data, cached=contender == "cached")


def measure(name: str, data: Photos, save: Callable[[dict[str, Any]], None], *, rounds: int) -> None:
    """Measure the cached run's time over that of each other contender; `save` gets the rounds so far."""
    work = WORKS[name]
    ends: dict[str, str] = {}

    def contender(one: str) -> Callable[[], float]:
        def timed() -> float:
            seconds, ends[one] = in_new_process(run, one, name, data, environment={})
            return float(seconds)

        return timed

    def after_round(timed: list[Seconds]) -> None:
        others = [one for one in timed[0] if one != "cached"]
        save(
            {
                "work": work.title,
                "ratios": {one: Ratio.of(timed, "cached", one).to_list() for one in others},
                "limits": work.limits,
                "cpu_s": {one: [round(seconds[one], 1) for seconds in timed] for one in timed[0]},
                "rounds": len(timed),
                "bit_equal_to_plain": ends["cached"] == ends["plain"],
            }
        )

    by_runs({one: contender(one) for one in work.contenders()}, rounds=rounds, after_round=after_round)


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
    data = Photos(options.images, size=options.size, batch=options.batch)
    about = {"images": len(data), "size": data.size, "batch": data.batch}
    results = Results("gradual")
    for name in options.what or WORKS:
        key = " ".join(map(str, (name, *about.values())))
        if not (options.resume and key in results.rows):

            def save(row: dict[str, Any], key: str = key) -> None:
                results.save(key, {**about, **row})

            measure(name, data, save, rounds=options.rounds)
        print(lines(results.rows[key]), flush=True)
