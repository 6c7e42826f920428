"""The frozen-prefix cache on hundreds of models: is a cut found, and is it bit for bit exact?

    python -m benchmarks cuts [transformers|torchvision|timm ...] [--part 1/4] [--all-timm] [--out FILE]

Each model gets random weights, and its first groups are frozen: 60 % of them, and all but the head. It is
then trained for one epoch of two batches, plain and cached, with the same seeds. Outputs, gradients and
buffers must be equal bit for bit. A cut that is refused says why; a wrong one is a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import layerwise
from benchmarks.oracles import timm_family, timm_names
from benchmarks.transformers_models import SMALL, Small
from layerwise.layers.structures import tensors_in

BATCH, SAMPLES = 2, 4
SMALL_SIZE = 96
FRACTIONS = (0.6, 1.0)


@dataclass
class Examined:
    """What came of one model.

    Attributes:
        name: of the model.
        frozen_frac: part of the groups that is frozen; 1 is all but the head.
        state: ``"exact"``, ``"refused"``, ``"wrong"``, or ``"failed"`` where the plain loop itself fails.
        why: in words.
        kb_per_sample: stored.
        skipped: part of the forward's operations (FLOPs) that is not run any more.
        seconds: that the model took in all.
    """

    name: str
    frozen_frac: float
    state: str
    why: str = ""
    kb_per_sample: float = 0.0
    skipped: float = 0.0
    seconds: float = 0.0


def examine(name: str, model: nn.Module, samples: list[Any], frozen_frac: float) -> Examined:
    """Train a model plain and cached, and compare.

    Args:
        name: of the model, for the report.
        model: any.
        samples: `SAMPLES` samples, each a tensor or a dictionary of keyword arguments.
        frozen_frac: part of the layer groups to freeze, from the input on; 1 is all but the last.
    """
    began_s = time.perf_counter()
    loader: DataLoader[Any] = DataLoader(samples, batch_size=BATCH)  # type: ignore[arg-type]
    first = next(iter(loader))
    layers = layerwise.layer_map(model, first)
    count = len(layers)
    frozen = count - 1 if frozen_frac >= 1 else min(max(round(count * frozen_frac), 1), count - 1)
    plan = layerwise.top_k(layers, k=max(count - frozen, 1), epochs=1)
    layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    model.train()
    state = copy.deepcopy(model.state_dict())  # with its metadata, which some models read
    cache = layerwise.PrefixCache(model, loader, storage="memory")

    def run(batches: Iterable[Any]) -> list[Tensor]:
        model.load_state_dict(state)
        torch.manual_seed(0)
        seen: list[Tensor] = []
        for batch in batches:
            output = model(**batch) if isinstance(batch, dict) else model(batch)
            answers = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
            model.zero_grad()
            sum(t.float().pow(2).mean() for t in answers).backward()  # type: ignore[union-attr]
            seen += [t.detach().clone() for t in answers]
            seen += [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()]
            seen += [b.clone() for b in model.buffers()]
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = run(loader)
        if not _equal(plain, run(loader)):
            return Examined(name, frozen_frac, "failed", "two plain runs differ")
        cached = run(cache.batches())
    (feed,) = cache._feeds.values()
    phases = list(feed.phases.values())
    seconds = time.perf_counter() - began_s
    if not _equal(plain, cached):
        return Examined(name, frozen_frac, "wrong", cache.describe(), seconds=seconds)
    if feed.reason or not phases or not phases[-1].verified:
        return Examined(name, frozen_frac, "refused", cache.describe(), seconds=seconds)
    cut = phases[-1].cut
    assert cut is not None
    where = ", ".join(map(str, cut.frontier))
    return Examined(
        name, frozen_frac, "exact", where, cut.bytes_per_sample / 1024,
        cut.skipped_flops / max(cut.flops, 1), seconds,
    )  # fmt: skip


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other)
    )


def images(size: int, channels: int = 3) -> list[Tensor]:
    """Return random images."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(SAMPLES, channels, size, size, generator=generator))


def text_samples(small: Small) -> list[dict[str, Tensor]]:
    """Return samples for a transformers model: its example's ids, and random numbers for the rest."""
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name, value in small.example().items():
        value = torch.cat([value] * (SAMPLES // len(value)))
        if value.is_floating_point():
            value = torch.randn(value.shape, generator=generator)
        columns[name] = value
    return [{name: value[i] for name, value in columns.items()} for i in range(SAMPLES)]


def timm_model(name: str) -> tuple[nn.Module, list[Any]]:
    """Return a timm model and images: small ones, unless it takes only those of its own size."""
    import timm

    model = timm.create_model(name, num_classes=10)
    channels, size, _ = model.default_cfg.get("input_size", (3, 224, 224))
    fixed = model.default_cfg.get("fixed_input_size", False) or not _runs(model, channels)
    return model, images(size if fixed else SMALL_SIZE, channels)


def _runs(model: nn.Module, channels: int) -> bool:
    with torch.no_grad():
        try:
            model.eval()(torch.zeros(2, channels, SMALL_SIZE, SMALL_SIZE))
        except Exception:  # whatever a model says to images that are too small
            return False
    return True


def torchvision_model(name: str) -> tuple[nn.Module, list[Any]]:
    """Return a torchvision classification model and images."""
    import torchvision

    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    fixed = name.startswith(("vit", "maxvit", "googlenet")) or not _runs(model, 3)
    return model, images(299 if "inception" in name else 224 if fixed else SMALL_SIZE)


def small_torchvision_names(large: int) -> list[str]:
    """Return torchvision's classification models of at most `large` million parameters."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    sizes = {n: torchvision.models.get_model_weights(n).DEFAULT.meta["num_params"] for n in names}
    return [name for name in names if sizes[name] <= large * 1_000_000]


def small_timm_names(every: bool, large: int) -> list[str]:
    """Return timm's models of at most `large` million parameters: the smallest of each family, or all."""
    import timm

    chosen: dict[Any, tuple[int, str]] = {}
    names = []
    for name in timm_names():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = sum(p.numel() for p in timm.create_model(name).parameters())
        if size > large * 1_000_000:
            continue
        names.append(name)
        family = timm_family(name)
        if family not in chosen or size < chosen[family][0]:
            chosen[family] = (size, name)
    return names if every else [name for _, name in chosen.values()]


def _attempt(name: str, make: Callable[[], tuple[nn.Module, list[Any]]]) -> Iterable[Examined]:
    for frac in FRACTIONS:
        try:
            torch.manual_seed(0)
            model, samples = make()
            yield examine(name, model, samples, frac)
        except Exception as error:  # a sweep goes on whatever one model does
            yield Examined(name, frac, "failed", f"{type(error).__name__}: {str(error)[:200]}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuts")
    parser.add_argument("what", nargs="*", default=["transformers", "torchvision", "timm"])
    parser.add_argument("--part", default="1/1", help="2/4 is every fourth model from the second on")
    parser.add_argument("--all-timm", action="store_true", help="not only the smallest of each family")
    parser.add_argument("--large", type=int, default=30, help="leave out models of more million parameters")
    parser.add_argument("--out", type=Path, help="append one JSON line a model to this file")
    options = parser.parse_args(arguments)
    number, parts = (int(text) for text in options.part.split("/"))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for what in options.what:
        print(f"-- {what}", flush=True)
        makers: list[tuple[str, Callable[[], tuple[nn.Module, list[Any]]]]]
        if what == "transformers":
            makers = [(s.name, lambda s=s: (s.build(), text_samples(s))) for s in SMALL]
        elif what == "torchvision":
            makers = [(n, lambda n=n: torchvision_model(n)) for n in small_torchvision_names(options.large)]
        elif what == "timm":
            names = small_timm_names(options.all_timm, options.large)
            makers = [(n, lambda n=n: timm_model(n)) for n in names]
        else:
            raise SystemExit(f"unknown part {what!r}; there are transformers, torchvision and timm")
        counts: dict[str, int] = {}
        for name, make in makers[number - 1 :: parts]:
            for found in _attempt(name, make):
                counts[found.state] = counts.get(found.state, 0) + 1
                if found.state != "exact":
                    print(f"   {found.name} {found.frozen_frac}: {found.state}: {found.why}", flush=True)
                if options.out is not None:
                    with open(options.out, "a") as file:
                        file.write(json.dumps(asdict(found)) + "\n")
        total = max(sum(counts.values()), 1)
        shares = ", ".join(f"{state} {n} ({n / total:.1%})" for state, n in sorted(counts.items()))
        print(f"   {what}: {shares}", flush=True)
