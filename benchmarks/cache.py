"""The frozen-prefix cache against the plain loop, and against the floor below which no exact method can be.

*plain*: a bare PyTorch loop whose frozen part already needs no backward. *floor*: forward and backward of
the trained part alone, on ready tensors. CPU time of one thread; the three run by turns in one process, so
that a slow moment of the machine hits all of them; shown are medians of the ratios and their range.

    python -m benchmarks cache [resnet50|vit|lite0|minilm ...] [--repeats 5]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from layerwise.tuning.modes import pin_eval


@dataclass
class Case:
    """One model, what of it learns, and its trained part alone."""

    name: str
    model: nn.Module
    trains: Callable[[str], bool]
    """Whether the parameter of this name learns."""
    data: Dataset[Any]
    batch: int
    floor: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """Logits from the stored values (by site, as `str`) and the batch's integer inputs."""
    limits: tuple[float, float]
    """Most that a cached epoch may take of the floor, and of the plain epoch."""


class Images(Dataset[Any]):
    """Random images with labels, held in memory."""

    def __init__(self, count: int, size: int = 224) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class Sentences(Dataset[Any]):
    """Random token ids, padded to one length."""

    def __init__(self, count: int, length: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 30000, (count, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        for index in range(count):
            self.mask[index, length - (index * 7) % 60 :] = 0
        self.labels = torch.randint(0, 2, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": self.mask[index],
            "labels": self.labels[index],
        }


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


def _only(values: dict[str, Tensor]) -> Tensor:
    return values["value"]


def _bert_floor(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    hidden, mask = values["value"], values["attention_mask"]
    shape = (mask.shape[0], 1, mask.shape[1], mask.shape[1])
    extended = (mask[:, None, None] != 0).expand(shape)
    for layer in model.bert.encoder.layer[4:]:
        hidden = layer(hidden, extended)
    return model.classifier(model.dropout(model.bert.pooler(hidden)))


def cases(names: Iterable[str] = (), *, head_only: bool = False) -> list[Case]:
    """Return the cases of the table; `head_only` trains the output layer alone."""
    import timm
    from transformers import AutoModelForSequenceClassification, BertConfig

    def resnet() -> Case:
        model = timm.create_model("resnet50", num_classes=10, drop_rate=0.1)
        return Case(
            "ResNet-50, layer4 + fc", model, _starts("layer4", "fc"), Images(32), 8,
            lambda m, v: m.forward_head(m.layer4(_only(v))), (1.03, 0.42),
        )  # fmt: skip

    def vit() -> Case:
        model = timm.create_model("vit_small_patch16_224", num_classes=10)
        return Case(
            "ViT-S, last 3 blocks", model, _starts("blocks.9", "blocks.10", "blocks.11", "norm", "head"),
            Images(32), 8, lambda m, v: m.forward_head(m.norm(m.blocks[9:](_only(v)))), (1.03, 0.52),
        )  # fmt: skip

    def lite0() -> Case:
        model = timm.create_model("tf_efficientnet_lite0", num_classes=10, drop_rate=0.2)
        return Case(
            "EfficientNet-Lite0, blocks.6 on", model, _starts("blocks.6", "conv_head", "bn2", "classifier"),
            Images(64), 8, lambda m, v: m.forward_head(m.bn2(m.conv_head(m.blocks[6](_only(v))))),
            (1.03, 0.14),
        )  # fmt: skip

    def minilm() -> Case:
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        model = AutoModelForSequenceClassification.from_config(config)
        return Case(
            "MiniLM-6 at 128 tokens, last 2 layers", model,
            _starts("bert.encoder.layer.4", "bert.encoder.layer.5", "bert.pooler", "classifier"),
            Sentences(64), 16, _bert_floor, (1.03, 0.66),
        )  # fmt: skip

    makers = {"resnet50": resnet, "vit": vit, "lite0": lite0, "minilm": minilm}
    found = []
    for name in names or makers:
        torch.manual_seed(0)
        case = makers[name]()
        if head_only:
            case.trains = _starts("fc", "classifier", "head")
            case.floor = lambda m, v: _output_layer(m)(_only(v))
            case.limits = (float("inf"), 0.03)
        found.append(case)
    return found


def _output_layer(model: nn.Module) -> nn.Module:
    return next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))


def prepare(case: Case) -> None:
    """Freeze what does not learn, and hold it in eval mode."""
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(case.trains(name))
    frozen = [
        module
        for name, module in case.model.named_modules()
        if name and not any(p.requires_grad for p in module.parameters()) and not case.trains(name + ".")
    ]
    pin_eval(m for m in frozen if any(True for _ in m.parameters()))
    for module in frozen:
        if any(True for _ in module.parameters()):
            pin_eval(module.modules())
    case.model.train()


def logits_of(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits and labels of a batch, as a user's loop would."""
    if isinstance(batch, dict):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits, batch["labels"]
    images, labels = batch
    return model(images), labels


def epoch(
    case: Case, batches: Iterable[Any], forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
) -> float:
    """Train one epoch; return its CPU seconds."""
    learning = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01, momentum=0.9)
    began_s = time.process_time()
    for batch in batches:
        logits, labels = forward(case.model, batch)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - began_s


def measure(case: Case, *, repeats: int) -> dict[str, Any]:
    """Return the ratios of one case."""
    prepare(case)
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch, shuffle=True)
    cache = layerwise.PrefixCache(case.model, loader, storage="memory")
    began_s = time.process_time()
    cache.fill(call=lambda batch: logits_of(case.model, batch))
    first_fill_s = time.process_time() - began_s
    for stored in cache._feeds[id(loader)].sites.values():
        stored.column.filled.fill_(False)
    began_s = time.process_time()
    cache.fill()  # the pass itself, without the first batch's recording and checks
    filled_s = time.process_time() - began_s
    ordered: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch)
    with torch.no_grad():
        began_s = time.process_time()
        for batch in ordered:
            logits_of(case.model, batch)
        forward_s = time.process_time() - began_s
    feed = cache._feeds[id(loader)]
    (site,) = feed.sites
    ready = []
    for start in range(0, len(feed.sites[site].column.filled), case.batch):
        rows = torch.arange(start, start + case.batch)
        batch = next(iter(DataLoader(torch.utils.data.Subset(case.data, rows.tolist()), case.batch)))
        extra = dict(batch) if isinstance(batch, dict) else {"labels": batch[1]}
        value = feed.sites[site].layout.from_rows(feed.sites[site].column.get(rows))
        ready.append({"value": value, **extra})
    state = copy.deepcopy(case.model.state_dict())
    ratios: dict[str, list[float]] = {"floor": [], "plain": []}
    for _ in range(repeats + 1):  # the first round warms up and is thrown away
        seconds = {}
        for kind in ("plain", "cached", "floor"):
            case.model.load_state_dict(state)
            if kind == "plain":
                seconds[kind] = epoch(case, loader, logits_of)
            elif kind == "cached":
                seconds[kind] = epoch(case, cache.batches(), logits_of)
            else:
                seconds[kind] = epoch(case, ready, lambda m, v: (case.floor(m, v), v["labels"]))
        ratios["floor"].append(seconds["cached"] / seconds["floor"])
        ratios["plain"].append(seconds["cached"] / seconds["plain"])
    result = {
        "work": case.name,
        "site": str(site),
        "kb_per_sample": feed.sites[site].column.spec.row_bytes / 1024,
        "recording": filled_s / forward_s,
        "checks": (first_fill_s - filled_s) / (forward_s / len(ordered)),
        "limits": case.limits,
    }
    for kind, values in ratios.items():
        result[kind] = (statistics.median(values[1:]), min(values[1:]), max(values[1:]))
    cache.close()
    return result


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cache")
    parser.add_argument("what", nargs="*", help="of resnet50, vit, lite0, minilm; default all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of plain, cached and floor")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names, repeats = options.what, options.repeats
    print("cached epoch: CPU time over the floor's and over the plain loop's; median (range)")
    for head_only in (False, True):
        for case in cases(names, head_only=head_only):
            row = measure(case, repeats=repeats)
            part = "head only" if head_only else row["work"].split(", ")[1]
            floor, plain = (
                f"{m:.3f} ({low:.3f}-{high:.3f})" for m, low, high in (row["floor"], row["plain"])
            )
            print(
                f"{row['work'].split(', ')[0]:24s} {part:14s} of floor {floor:22s} of plain {plain:22s} "
                f"limit {row['limits'][0]:.2f} / {row['limits'][1]:.2f}  "
                f"recording pass {row['recording']:.2f}x (checks once: {row['checks']:.1f} batches) "
                f"{row['kb_per_sample']:.1f} KB a sample at {row['site']}",
                flush=True,
            )
