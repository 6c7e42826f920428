"""What the cache costs: its recording pass, its memory, and loops in which nothing can be cached.

*pass*: computing and storing the prefix of all samples, over one forward of the whole model without
gradients; alone, and with what every later phase of gradual unfreezing needs; then with folded batch-norms
and with larger batches. The look at the first batch, once for a phase, is not part of it. *idle*: an epoch of
full fine-tuning with a cache that found nothing to skip, over the same epoch without one. CPU time of one
thread, by turns; median over the rounds and range.

*memory*: the most that a process takes for a plain run of two epochs, and for a cached one with a budget of
64 MiB, which it may take besides. Told is also what it takes beside the values that it stores: the recording.

    python -m benchmarks recording [resnet50|vit|lite0|minilm ...] [--part passes] [--rounds 7]
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

import layerwise
from benchmarks.cache import NETWORKS, Case, cases, epoch, logits_of, prepare
from benchmarks.measuring import Ratio, Results, by_runs, by_steps, in_new_process, verdict
from layerwise.cache.filling import Filled

LARGER = 4  # times the loader's batch
BUDGET_BYTES = 2**26


def _case(name: str, batches: int) -> Case:
    """Return the case of a network, with the data of a few batches."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (case,) = cases([name])
    case.data = Subset(case.data, range(min(batches * case.batch, len(case.data))))  # type: ignore[arg-type]
    return case


def _timed(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def _layers(case: Case) -> layerwise.LayerMap:
    example = next(iter(DataLoader(case.data, 2)))
    inputs = {k: v for k, v in example.items() if k != "labels"} if isinstance(example, dict) else example[0]
    return layerwise.layer_map(case.model, inputs, granularity="stages")


def _forward(case: Case, loader: DataLoader[Any]) -> None:
    with torch.no_grad():
        for batch in loader:
            logits_of(case.model, batch)


def _emptied(cache: layerwise.PrefixCache) -> None:
    """Forget all stored values, but not how they are computed."""
    for supply in cache._supplies:
        for feed in supply.feeds:
            for column in (*(site.column for site in feed.sites.values()), *feed.leaves.values()):
                column.forget(torch.arange(len(column.filled)))


def passes(name: str, rounds: int, batches: int) -> dict[str, Any]:
    """Compare a recording pass, plain, folded and in larger batches, with a forward of the whole model."""
    case = _case(name, batches)
    prepare(case)
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch)
    exact, near = (
        layerwise.PrefixCache(case.model, loader, storage="memory", exact=exact) for exact in (True, False)
    )
    for cache in (exact, near):
        cache.fill(call=lambda batch: logits_of(case.model, batch))
    told: dict[str, Filled] = {}

    def filling(cache: layerwise.PrefixCache, kind: str, **options: Any) -> Callable[[], float]:
        def fill() -> float:
            _emptied(cache)
            began_s = time.process_time()
            told[kind] = cache.fill(**options)
            return time.process_time() - began_s

        return fill

    larger = LARGER * case.batch
    timed = by_runs(
        {
            "forward": lambda: _timed(lambda: _forward(case, loader)),
            "pass": filling(exact, "pass"),
            "folded": filling(near, "folded", fold=True),
            "larger": filling(near, "larger", batch_size=larger),
            "larger, exact": filling(exact, "larger, exact", batch_size=larger),
        },
        rounds=rounds + 1,
    )[1:]
    return {
        "pass": Ratio.of(timed, "pass", "forward").to_list(),
        "folded of pass": Ratio.of(timed, "folded", "pass").to_list(),
        "larger of pass": Ratio.of(timed, "larger", "pass").to_list(),
        "batch_norms": told["folded"].folded,
        "difference": told["folded"].difference,
        "batch_size": case.batch,
        "larger_batch_size": larger,
        "larger_is_exact": told["larger, exact"].batch_size == larger,
    }


def all_phases(name: str, rounds: int, batches: int) -> dict[str, Any]:
    """Compare the pass that fills every phase of gradual unfreezing with a forward of the whole model."""
    case = _case(name, batches)
    layers = _layers(case)
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=2, last_epochs=2)
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch)
    tuner = layerwise.Tuner(
        case.model, plan, torch.optim.SGD, lr=0.01, steps_per_epoch=len(loader), layers=layers
    )
    cache = layerwise.PrefixCache(case.model, loader, storage="memory", tuner=tuner, budget_bytes=2**40)
    case.model.train()
    cache.fill(call=lambda batch: logits_of(case.model, batch))

    def fill() -> float:
        _emptied(cache)
        return _timed(cache.fill)

    contenders = {"forward": lambda: _timed(lambda: _forward(case, loader)), "all phases": fill}
    timed = by_runs(contenders, rounds=rounds + 1)[1:]
    values = sum(len(feed.sites) for supply in cache._supplies for feed in supply.feeds)
    return {"all phases": Ratio.of(timed, "all phases", "forward").to_list(), "values": values}


def idle(name: str, rounds: int, batches: int) -> dict[str, Any]:
    """Compare full fine-tuning with a cache that finds nothing to skip, and without one."""
    case = _case(name, batches)
    case.model.requires_grad_(True).train()
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch)
    watched = copy.deepcopy(case.model)
    cache = layerwise.PrefixCache(watched, loader)
    timed = by_steps(
        {
            "plain": epoch(case.model, lambda: loader, logits_of),
            "watched": epoch(watched, cache.batches, logits_of),
        },
        rounds=rounds,
    )
    return {"idle": Ratio.of(timed, "watched", "plain").to_list()}


def _peak(name: str, batches: int, cached: bool) -> tuple[int, int]:
    """Train two epochs; return the most memory that this process took, and the bytes it stored."""
    case = _case(name, batches)
    _layers(case)  # as for every plan; what torch loads to record a model is then in both processes
    prepare(case)
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch)
    cache = None
    if cached:
        cache = layerwise.PrefixCache(case.model, loader, storage="memory", budget_bytes=BUDGET_BYTES)
    for _ in range(2):
        steps: Callable[[], Iterator[bool]] = epoch(
            case.model, cache.batches if cache is not None else lambda: loader, logits_of
        )
        for _ in steps():
            pass
    stored = 0
    for supply in cache._supplies if cache is not None else ():
        for feed in supply.feeds:
            stored += sum(site.column.nbytes for site in feed.sites.values())
            stored += sum(column.nbytes for column in feed.leaves.values())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, stored


def memory(name: str, rounds: int, batches: int) -> dict[str, Any]:
    """Compare the median peaks of plain and cached runs of two epochs, each in a process of its own."""
    plain, cached = (
        [in_new_process(_peak, name, batches, with_cache, environment={}) for _ in range(rounds)]
        for with_cache in (False, True)
    )
    return {
        "plain_bytes": statistics.median_low(peak for peak, _ in plain),
        "cached_bytes": statistics.median_low(peak for peak, _ in cached),
        "stored_bytes": cached[0][1],
        "budget_bytes": BUDGET_BYTES,
    }


def lines(row: dict[str, Any]) -> Iterator[str]:
    """Yield what one part found, for people."""
    for kind, limit in LIMITS.items():
        if kind in row:
            ratio = Ratio(*row[kind])
            yield f"{kind + ' / ' + AGAINST[kind]:30s} {ratio!s:22s} {verdict(ratio.median, limit)}"
    if "batch_norms" in row:
        yield (
            f"{'folded / pass':30s} {Ratio(*row['folded of pass'])!s:22s} {row['batch_norms']} batch-norms, "
            f"values within {row['difference']:.1e}"
        )
        yield (
            f"{'larger / pass':30s} {Ratio(*row['larger of pass'])!s:22s} batches of "
            f"{row['larger_batch_size']} in place of {row['batch_size']}, bits "
            f"{'equal' if row['larger_is_exact'] else 'differ'}"
        )
    if "plain_bytes" in row:
        plain, cached, stored, budget = (
            row[f"{kind}_bytes"] / 2**20 for kind in ("plain", "cached", "stored", "budget")
        )
        yield (
            f"{'peak memory over plain':30s} {cached - plain:.0f} MiB over {plain:.0f} MiB, {stored:.0f} of "
            f"them stored {verdict(round(cached - plain), budget)} MiB"
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recording")
    parser.add_argument("what", nargs="*", choices=[[], *NETWORKS], help="networks; default all")
    parser.add_argument("--part", choices=PARTS, action="append", help="default all")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each kind, by turns")
    parser.add_argument("--batches", type=int, default=8, help="of the data")
    parser.add_argument("--resume", action="store_true", help="measure only what the results lack")
    options = parser.parse_args(arguments)
    results = Results("recording")
    for name in options.what or NETWORKS:
        for part in options.part or PARTS:
            key = f"{name} {part}"
            if not (options.resume and key in results.rows):
                row = PARTS[part](name, options.rounds, options.batches)
                results.save(key, {**row, "rounds": options.rounds, "batches": options.batches})
            for line in lines(results.rows[key]):
                print(f"{name:10s} {line}", flush=True)


PARTS: dict[str, Callable[[str, int, int], dict[str, Any]]] = {
    "memory": memory,
    "passes": lambda *given: in_new_process(passes, *given, environment={}),
    "all phases": lambda *given: in_new_process(all_phases, *given, environment={}),
    "idle": lambda *given: in_new_process(idle, *given, environment={}),
}
LIMITS = {"pass": 1.1, "all phases": 1.15, "idle": 1.02}
AGAINST = {"pass": "no-grad forward", "all phases": "no-grad forward", "idle": "plain step"}
