"""Whole runs on real photos, decoding included: cached, plain, and the floor.

    python -m benchmarks gradual [--images 320] [--what pipeline|gradual|depths ...]

*pipeline*: the last groups of EfficientNet-Lite0 trained for 8 epochs on ELPV, first pass included.
*gradual*: gradual unfreezing over 10 epochs; its floor is one forward of the data plus every phase's trained
part on ready tensors. *depths*: five freeze depths one after another, 5 epochs each, the deepest training
half of the network's work, sharing their values; against five independent runs. CPU time of one thread.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from benchmarks.tasks import lite0
from layerwise.cache.store import Column
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.sources.demo import elpv_rows

SIZE, BATCH = 128, 32


class Photos(Dataset[Any]):
    """ELPV photos, decoded and resized each time one is asked for."""

    def __init__(self, count: int) -> None:
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
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255 - 0.5) / 0.5, label


def train(plan_of: Callable[[LayerMap], Plan], data: Photos, *, cached: bool, pool: Any = None) -> Any:
    """Train by a plan; return (CPU seconds, weights, the tuner's phases' trained groups)."""
    torch.manual_seed(0)
    model = lite0(2)
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH, shuffle=True)
    layers = layerwise.layer_map(model, torch.zeros(2, 3, SIZE, SIZE), granularity="stages")
    plan = plan_of(layers)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=7e-4, steps_per_epoch=len(loader), layers=layers
    )
    torch.manual_seed(1)
    began_s = time.process_time()
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, pool=pool) if cached else None
    for _ in tuner.epochs():
        model.train()
        for images, labels in loader if cache is None else cache.batches():
            nn.functional.cross_entropy(model(images), labels).backward()
            tuner.step()
    seconds = time.process_time() - began_s
    if cache is not None:
        print("   " + cache.describe().replace("\n", "\n   "), flush=True)
    return seconds, {name: value.clone() for name, value in model.state_dict().items()}


def floor(plan_of: Callable[[LayerMap], Plan], data: Photos) -> float:
    """Return the CPU seconds of one forward of the data and of each phase's trained part on ready tensors."""
    torch.manual_seed(0)
    model = lite0(2)
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH)
    layers = layerwise.layer_map(model, torch.zeros(2, 3, SIZE, SIZE), granularity="stages")
    plan = plan_of(layers)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=7e-4, steps_per_epoch=len(loader), layers=layers
    )
    with torch.no_grad():
        began_s = time.process_time()
        model.eval()
        for images, _ in loader:
            model(images)
        seconds = time.process_time() - began_s
    for _ in tuner.epochs():
        model.train()
        start = _first_trained(tuner.trainable_names(tuner.phase_index))
        ready = _ready(model, loader, start)
        began_s = time.process_time()
        for value, labels in ready:
            nn.functional.cross_entropy(_rest(model, value, start), labels).backward()
            tuner.step()
        seconds += time.process_time() - began_s
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


def _compare(title: str, plan_of: Callable[[LayerMap], Plan], data: Photos, with_floor: bool) -> None:
    print(f"-- {title}", flush=True)
    plain_s, plain = train(plan_of, data, cached=False)
    cached_s, cached = train(plan_of, data, cached=True)
    same = all(torch.equal(value, cached[name]) for name, value in plain.items())
    text = f"   cached {cached_s:.1f} s, plain {plain_s:.1f} s: {cached_s / plain_s:.3f} of plain"
    if with_floor:
        floor_s = floor(plan_of, data)
        text += f"; floor {floor_s:.1f} s: {cached_s / floor_s:.3f} of the floor"
    print(f"{text}; weights {'bit-equal' if same else 'DIFFERENT'}", flush=True)


def depths(data: Photos) -> None:
    """Five freeze depths, the deepest from the middle of the work on, 5 epochs each."""
    print("-- five freeze depths searched", flush=True)
    pool: dict[str, Column] = {}
    shared_s = independent_s = 0.0
    for count in (1, 2, 3, 4, 5):
        plan_of = lambda layers, k=count: layerwise.top_k(layers, k=k, epochs=5)  # noqa: E731
        independent_s += train(plan_of, data, cached=False)[0]
        shared_s += train(plan_of, data, cached=True, pool=pool)[0]
    print(
        f"   shared cache {shared_s:.1f} s, independent {independent_s:.1f} s: {shared_s / independent_s:.3f}"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradual")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("what", nargs="*", default=["pipeline", "gradual", "depths"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = Photos(options.images)
    if "pipeline" in options.what:
        _compare(
            "last three groups, 8 epochs", lambda layers: layerwise.top_k(layers, k=3, epochs=8), data, True
        )
    if "gradual" in options.what:
        _compare(
            "gradual unfreezing, 10 epochs",
            lambda layers: layerwise.gradual_unfreezing(layers, epochs=10),
            data,
            True,
        )
    if "depths" in options.what:
        depths(data)
