"""Layer maps of hundreds of models against oracles that no one here wrote, and what a map costs.

    python -m benchmarks layer_maps [timm|torchvision|transformers|cost ...] [--part 1/4]

Prints a line for each model that the oracle does not agree with, then the totals.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Iterable

import torch
from torch import nn

from benchmarks.oracles import (
    Verdict,
    judge_timm,
    judge_torchvision,
    judge_transformers,
    timm_family,
    timm_names,
    torchvision_names,
)
from benchmarks.transformers_models import SMALL
from layerwise.layers.mapping import layer_map


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks layer_maps")
    parser.add_argument("what", nargs="*", default=["cost", "transformers", "torchvision", "timm"])
    parser.add_argument("--part", default="1/1", help="2/4 is every fourth model from the second on")
    options = parser.parse_args(arguments)
    number, parts = (int(text) for text in options.part.split("/"))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for what in options.what:
        print(f"-- {what}", flush=True)
        if what == "cost":
            _cost()
        elif what == "timm":
            _timm(timm_names()[number - 1 :: parts])
        elif what == "torchvision":
            _torchvision(torchvision_names()[number - 1 :: parts])
        elif what == "transformers":
            _transformers()
        else:
            raise SystemExit(f"unknown part {what!r}; there are timm, torchvision, transformers and cost")


def _report(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Print what went wrong as it comes; return all verdicts."""
    done = []
    for verdict in verdicts:
        done.append(verdict)
        faults = []
        if verdict.error:
            faults.append(verdict.error)
        elif not verdict.complete:
            faults.append("not every parameter in exactly one group")
        if verdict.discordant:
            share = verdict.discordant / verdict.pairs
            faults.append(f"{share:.2%} of pairs discordant (worst: {', '.join(verdict.worst)})")
        if verdict.head is False and verdict.layers is not None:
            faults.append(f"head {', '.join(verdict.layers.outputs) or 'none'}")
        if verdict.first is False:
            faults.append("first convolution not in the first group")
        if verdict.found_blocks != verdict.expected_blocks:
            faults.append(f"{verdict.found_blocks} layers instead of {verdict.expected_blocks}")
        if faults:
            print(f"   {verdict.name}: {'; '.join(faults)}", flush=True)
    return done


def _share(title: str, good: int, total: int) -> None:
    print(f"   {title}: {good} of {total} ({good / max(total, 1):.1%})", flush=True)


def _timm(names: list[str]) -> None:
    verdicts = _report(judge_timm(name) for name in names)
    mapped = [v for v in verdicts if not v.error]
    _share("models mapped, every parameter in exactly one group", sum(v.complete for v in mapped), len(names))
    compared = [v for v in mapped if v.pairs]
    families = {timm_family(v.name) for v in compared}
    disordered = {timm_family(v.name) for v in compared if v.discordant}
    _share("families without a discordant pair", len(families) - len(disordered), len(families))
    _share("models without a discordant pair", sum(not v.discordant for v in compared), len(compared))
    heads = [v.head for v in mapped if v.head is not None]
    _share("head equal to default_cfg['classifier']", sum(heads), len(heads))
    firsts = [v.first for v in mapped if v.first is not None]
    _share("first convolution in the first group", sum(firsts), len(firsts))


def _torchvision(names: list[str]) -> None:
    verdicts = _report(judge_torchvision(name) for name in names)
    mapped = [v for v in verdicts if not v.error]
    _share("models mapped, every parameter in exactly one group", sum(v.complete for v in mapped), len(names))
    classifiers = [v for v in mapped if v.head is not None]
    _share("classifiers ordered as registered", sum(not v.discordant for v in classifiers), len(classifiers))
    _share("classifiers' heads", sum(bool(v.head) for v in classifiers), len(classifiers))


def _transformers() -> None:
    verdicts = _report(judge_transformers(small) for small in SMALL)
    mapped = [v for v in verdicts if not v.error]
    _share("models mapped, every parameter in exactly one group", sum(v.complete for v in mapped), len(SMALL))
    _share("layers in the order of their numbers", sum(not v.discordant for v in mapped), len(mapped))
    equal = sum(v.found_blocks == v.expected_blocks for v in mapped)
    _share("number of layers as configured", equal, len(mapped))


def _cost() -> None:
    """Time maps after a first one, in CPU seconds: they run in one thread and compute nothing."""
    import timm
    import transformers

    layer_map(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.zeros(2, 3, 8, 8))
    with torch.device("meta"):
        resnet = timm.create_model("resnet50")
    _time("ResNet-50, 224 pixels", resnet, torch.zeros(2, 3, 224, 224))
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    _time("ViT-B/16, 224 pixels", vit, torch.zeros(2, 3, 224, 224))
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    _time("Llama 7B, 64 tokens", llama, {"input_ids": torch.ones(2, 64, dtype=torch.long)})
    for blocks in (50, 100, 200, 400):
        _time(f"{blocks} residual blocks", _Deep(blocks), torch.zeros(2, 16))


def _time(title: str, model: nn.Module, example: object) -> None:
    start = time.process_time()
    layers = layer_map(model, example)
    seconds = time.process_time() - start
    modules = sum(1 for _ in model.modules())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"   {title}: {seconds:.2f} CPU s, {len(layers)} groups, {modules} modules, "
        f"{1e3 * seconds / modules:.2f} ms a module, process peak {peak:,.0f} MiB",
        flush=True,
    )


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class _Deep(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block() for _ in range(blocks)))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))
