"""The frozen-prefix cache on hundreds of models: is a cut found, and is it bit for bit exact?

    python -m benchmarks cuts [transformers|torchvision|timm|others ...] [--large 50] [--again refused failed]
    python -m benchmarks cuts --table

Each model gets random weights, and its first groups are frozen: 60 % of them, and all but the head. It is
trained on two batches for two epochs with the cache, which has every batch in the second, and then plainly,
from the same weights and seeds. Outputs, gradients and buffers must be equal bit for bit in each step. A cut
that is refused says why; a wrong one is a fault. Images are as small as the model takes them.

Each result is a line of ``benchmarks/results/cuts.jsonl``; what stands there is not run again. The table is
made of these lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import layerwise
from benchmarks.oracles import timm_family, timm_names
from benchmarks.other_models import other_models
from benchmarks.transformers_models import SMALL, Small
from layerwise.cache.telling import phases_of
from layerwise.errors import CacheError
from layerwise.layers.randomness import seed_everything
from layerwise.layers.structures import tensors_in

BATCHES = 2  # that are trained on
PIXELS = (64, 96, 128, 192, 224, 256, 299)
FRACTIONS = (0.6, 1.0)
LISTS = ("torchvision", "timm", "transformers")
OTHERS = "others"  # of packages that are no part of the project's own (`benchmarks.other_models`)
RESULTS = Path(__file__).parent / "results" / "cuts.jsonl"

Make = Callable[[int], tuple[nn.Module, list[Any]]]


@dataclass
class Examined:
    """What came of one model.

    Attributes:
        part: the list that the model is from, one of `LISTS`, or `OTHERS`.
        name: of the model.
        frozen_frac: part of the groups that is frozen; 1 is all but the head.
        state: ``"exact"``, ``"refused"``, ``"wrong"``, or ``"failed"`` where the plain loop itself fails.
        why: in words; where it is cut for an exact one.
        kb_per_sample: stored.
        skipped: part of the forward's operations (FLOPs) that is not run any more.
        cpu_s: that the model took in all.
        batch: samples in a batch.
    """

    part: str
    name: str
    frozen_frac: float
    state: str
    why: str = ""
    kb_per_sample: float = 0.0
    skipped: float = 0.0
    cpu_s: float = 0.0
    batch: int = 8


def examine(found: Examined, make: Make) -> None:
    """Train a model plain and cached, compare, and note in `found` what came of it."""
    torch.manual_seed(0)
    model, samples = make(found.batch)
    loader: DataLoader[Any] = DataLoader(samples, batch_size=found.batch)  # type: ignore[arg-type]
    layers = layerwise.layer_map(model, next(iter(loader)))
    learning = len(layers) - min(max(round(len(layers) * found.frozen_frac), 1), len(layers) - 1)
    plan = layerwise.top_k(layers, k=learning, epochs=1)
    layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=BATCHES, layers=layers)
    model.train()
    learners = [p for p in model.parameters() if p.requires_grad]
    before = [(tensor, tensor.detach().clone()) for tensor in (*learners, *model.buffers())]

    def trained(batches: Callable[[], Iterable[Any]]) -> list[str]:
        """Train for two epochs; return digests of all outputs, gradients and buffers in each step."""
        with torch.no_grad():
            for tensor, content in before:
                tensor.copy_(content)
        optimizer = torch.optim.AdamW(learners, lr=1e-3)
        seed_everything(0)
        seen: list[str] = []
        for batch in chain(batches(), batches()):
            output = model(**batch) if isinstance(batch, dict) else model(batch)
            answers = [t for t in tensors_in(output) if t.is_floating_point()]
            model.zero_grad()
            sum(t.float().pow(2).mean() for t in answers if t.requires_grad).backward()  # type: ignore[union-attr]
            seen += [f"output {number} {_digest(t)}" for number, t in enumerate(answers)]
            seen += [f"gradient of {n} {_digest(p.grad)}" for n, p in model.named_parameters()]
            seen += [f"buffer {n} {_digest(b)}" for n, b in model.named_buffers()]
            optimizer.step()
        return seen

    with layerwise.PrefixCache(model, loader, storage="memory") as cache:
        replays: list[bool] = []
        cached = trained(lambda: _watched(cache, replays))
        (supply,) = cache._supplies
        phases, reason = list(phases_of(supply).values()), supply.reason
        found.why = cache.describe()
    plain = trained(lambda: loader)  # last: the cache must be right from the model's very first call
    unequal = [what for what, other in zip(plain, cached, strict=True) if what != other]
    if unequal:
        stable = plain == trained(lambda: loader)
        found.state = "wrong" if stable else "failed"
        found.why = f"{unequal[0].rsplit(' ', 1)[0]} differs" if stable else "two plain runs differ"
    elif reason or not phases or not phases[-1].verified or not all(replays[BATCHES:]):
        found.state = "refused"
    else:
        cut = phases[-1].cut
        assert cut is not None
        found.state, found.why = "exact", ", ".join(map(str, cut.frontier))
        found.kb_per_sample = round(cut.bytes_per_sample / 1024, 2)
        found.skipped = round(cut.skipped_flops / max(cut.flops, 1), 4)


def _watched(cache: layerwise.PrefixCache, replays: list[bool]) -> Iterator[Any]:
    """Yield an epoch's batches, and note of each whether the cache answers for it."""
    for batch in cache.batches():
        lives = cache._calls._lives
        replays.append(bool(lives) and lives[-1].replayed)
        yield batch


def _digest(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(tensor.shape)} {hashlib.blake2b(data, digest_size=16).hexdigest()}".replace(" ", "")


# -- the models -----------------------------------------------------------------------------------


def images(batch: int, size: int, channels: int = 3) -> list[Tensor]:
    """Return random images for `BATCHES` batches."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(BATCHES * batch, channels, size, size, generator=generator))


def smallest_images(model: nn.Module, batch: int, own: int, channels: int = 3) -> list[Tensor]:
    """Return images of the smallest size of `PIXELS` that the model trains on, or else of its own."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    fitting = own
    with torch.no_grad():
        for size in PIXELS:
            try:
                model.train()(torch.zeros(batch, channels, size, size))
            except Exception:  # whatever a model says to images that are too small
                continue
            fitting = size
            break
        for buffer, content in buffers:  # zeros would spoil the running statistics
            buffer.copy_(content)
    return images(batch, fitting, channels)


def text_samples(small: Small, batch: int) -> list[dict[str, Tensor]]:
    """Return samples for a transformers model: its example's ids, and random numbers for the rest."""
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name, value in small.example().items():
        value = torch.cat([value] * (BATCHES * batch // len(value)))
        if value.is_floating_point():
            value = torch.randn(value.shape, generator=generator)
        columns[name] = value
    return [{name: value[i] for name, value in columns.items()} for i in range(BATCHES * batch)]


def timm_model(name: str, batch: int) -> tuple[nn.Module, list[Any]]:
    """Return a timm model with ten classes, and images."""
    import timm

    model = timm.create_model(name, num_classes=10)
    channels, size, _ = model.default_cfg.get("input_size", (3, 224, 224))
    if model.default_cfg.get("fixed_input_size", False):
        return model, images(batch, size, channels)
    return model, smallest_images(model, batch, size, channels)


def torchvision_model(name: str, batch: int) -> tuple[nn.Module, list[Any]]:
    """Return a torchvision classification model, and images."""
    import torchvision

    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    return model, smallest_images(model, batch, 224)


def torchvision_sizes() -> dict[str, int]:
    """Return the parameters of each of torchvision's classification models."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    return {n: torchvision.models.get_model_weights(n).DEFAULT.meta["num_params"] for n in names}


def timm_sizes(every: bool) -> dict[str, int]:
    """Return the parameters of the small model of each timm family, or of all models of the layer maps."""
    import timm

    families: dict[Any, str] = {}
    for name in timm_names():
        families.setdefault(timm_family(name), name)
    sizes = {}
    for name in timm_names() if every else families.values():
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return sizes


def models_of(part: str, *, every: bool, large: int) -> dict[str, Make]:
    """Return the models of one list, the smallest first, by name: a function that makes each."""
    if part == "transformers":
        return {small.name: lambda batch, s=small: (s.build(), text_samples(s, batch)) for small in SMALL}  # type: ignore[misc]
    if part == OTHERS:
        return other_models(large * 1_000_000, lambda model, batch: smallest_images(model, batch, 224))
    sizes = torchvision_sizes() if part == "torchvision" else timm_sizes(every)
    make = torchvision_model if part == "torchvision" else timm_model
    names = sorted((name for name in sizes if sizes[name] <= large * 1_000_000), key=sizes.__getitem__)
    return {name: lambda batch, n=name: make(n, batch) for name in names}  # type: ignore[misc]


# -- the results ----------------------------------------------------------------------------------


def read_results(path: Path) -> dict[tuple[str, str, float, int], Examined]:
    """Return the results of a file; a later line of the same model counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Examined(**json.loads(line)) for line in lines]
    return {(one.part, one.name, one.frozen_frac, one.batch): one for one in found}


def table(results: Iterable[Examined]) -> str:
    """Return how many were exact, and each of the others with its reason; Markdown."""
    results = list(results)
    rows = [
        "| list | batch | models | cases | exact | refused | wrong | plain loop fails |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, batch in sorted({(one.part, one.batch) for one in results}):
        mine = [one for one in results if (one.part, one.batch) == (part, batch)]
        counts = [
            sum(one.state == state for one in mine) for state in ("exact", "refused", "wrong", "failed")
        ]
        share = f"{counts[0]} ({counts[0] / len(mine):.1%})"
        others = " | ".join(map(str, counts[1:]))
        models = len({one.name for one in mine})
        rows.append(f"| {part} | {batch} | {models} | {len(mine)} | {share} | {others} |")
    rows += ["", "| not exact | batch | frozen | what came of it | reason |", "|---|---|---|---|---|"]
    for one in sorted(results, key=lambda one: (one.state, one.part, one.name)):
        if one.state != "exact":
            frozen = "all but the head" if one.frozen_frac == 1 else f"{one.frozen_frac:.0%}"
            why = one.why.removeprefix("prefix cache: off: ").replace("|", r"\|").replace("\n", "; ")
            rows.append(f"| {one.part} {one.name} | {one.batch} | {frozen} | {one.state} | {why} |")
    return "\n".join(rows)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuts")
    known = (*LISTS, OTHERS)
    parser.add_argument("lists", nargs="*", default=list(LISTS), help=f"of {', '.join(known)}")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--all-timm", action="store_true", help="not only a small model of each family")
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch; even")
    parser.add_argument("--large", type=int, default=50, help="leave out models of more million parameters")
    parser.add_argument(
        "--again", nargs="*", default=(), help="states that are run again: refused failed ..."
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results, and run nothing"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.lists) - set(known)
    if unknown:
        parser.error(f"unknown list {unknown.pop()!r}; there are {', '.join(known)}")
    results = read_results(options.out)
    if options.table:
        print(table(results.values()))
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for part in options.lists:
        for name, make in models_of(part, every=options.all_timm, large=options.large).items():
            for frozen_frac in FRACTIONS:
                key = part, name, frozen_frac, options.batch
                before = results.get(key)
                if (before and before.state not in options.again) or name not in (options.only or [name]):
                    continue
                found = _attempt(Examined(part, name, frozen_frac, "failed", batch=options.batch), make)
                results[key] = found
                with open(options.out, "a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
                print(f"   {part} {name} {frozen_frac}: {found.state}: {found.why}", flush=True)
    print(table(one for one in results.values() if one.part in options.lists), flush=True)


def _attempt(found: Examined, make: Make) -> Examined:
    began_s = time.process_time()
    try:
        examine(found, make)
    except CacheError as error:  # the cache itself: a ghost's value was needed while the loop ran
        found.state, found.why = "wrong", str(error)[:300]
    except Exception as error:  # a sweep goes on whatever one model does
        found.why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found.cpu_s = round(time.process_time() - began_s, 1)
    return found
