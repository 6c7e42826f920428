"""`Preprocessing`: how a model wants its images, as plain data, and the transform built from it.

Where a pretrained model says what it was trained with (timm's configuration, torchvision's
``weights.transforms()``, a transformers image processor), that is read into one `Preprocessing`, which a
run saves beside its weights, so that ``predict`` sees the same pixels as ``fit`` did. The transforms
themselves are torchvision's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from layerwise.errors import DataError, MissingExtraError, ModelError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Augment = Literal["none", "flip", "light", "randaugment", "trivialaugment"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
AUGMENTS: tuple[str, ...] = get_args(Augment)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a model sees it: resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        crop: height and width of what the model gets, in pixels.
        resize: an integer is the length that the short side is resized to, the ratio of the sides kept;
            a pair is the exact height and width; None leaves the size as it is.
        mean: per channel, of pixels in [0, 1]; its length is the number of channels (1 is grey, 3 RGB).
        std: per channel, likewise.
        interpolation: the filter of the resize, by torchvision's name.
        keep_ratio: where `resize` is a pair: the smallest size that covers it with the image's own ratio.

    >>> Preprocessing(crop=(224, 224), resize=256).at(112)
    Preprocessing(crop=(112, 112), resize=128, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), \
interpolation='bilinear', keep_ratio=False)
    """

    crop: tuple[int, int]
    resize: int | tuple[int, int] | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    keep_ratio: bool = False

    def __post_init__(self) -> None:
        problems = []
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            problems.append(
                f"mean has {len(self.mean)} and std {len(self.std)} values; expected 1 (grey) or 3 (RGB) each"
            )
        if any(not value > 0 for value in self.std):
            problems.append(f"std is {self.std}; expected values above 0")
        sizes = [self.crop] if self.resize is None else [self.crop, _pair(self.resize)]
        sides = [s for size in sizes if isinstance(size, tuple | list) and len(size) == 2 for s in size]
        if len(sides) < 2 * len(sizes) or not all(isinstance(side, int) for side in sides):
            expected = "a height and a width in whole pixels (of a resize also one side, or None)"
            problems.append(f"crop is {self.crop} and resize {self.resize}; expected {expected}")
        elif any(side < 1 for side in sides):
            problems.append(f"crop is {self.crop} and resize {self.resize}; expected sides of at least 1")
        if self.interpolation not in INTERPOLATIONS:
            problems.append(
                f"interpolation is {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
            )
        if problems:
            raise DataError("preprocessing is wrong: " + "; ".join(problems) + ".")

    @property
    def channels(self) -> int:
        """Number of channels that the model gets."""
        return len(self.mean)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Shape of one input of the model: channels, height, width."""
        return (self.channels, *self.crop)

    def at(self, size: int | tuple[int, int]) -> Preprocessing:
        """Return the same preprocessing for another input size, with the same share cropped (rounded down).

        Args:
            size: side of the square, or height and width, in pixels.
        """
        height, width = _pair(size)
        if self.resize is None:
            resize: int | tuple[int, int] | None = None
        elif isinstance(self.resize, int) and self.crop[0] == self.crop[1] and height != width:
            # The short side alone would not cover an oblong, whose rest would be black.
            scaled = (self.resize * height // self.crop[0], self.resize * width // self.crop[1])
            return dataclasses.replace(self, crop=(height, width), resize=scaled, keep_ratio=True)
        elif isinstance(self.resize, int):
            resize = self.resize * min(height, width) // min(self.crop)
        else:
            resize = (self.resize[0] * height // self.crop[0], self.resize[1] * width // self.crop[1])
        return dataclasses.replace(self, crop=(height, width), resize=resize)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Build from what `to_dict` returned (lists for tuples are fine, as JSON makes them).

        Raises:
            DataError: a key is missing or unknown, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(data) - known or not {"crop", "resize"} <= set(data):
            raise DataError(
                f"preprocessing has the keys {sorted(data)}; expected crop, resize and optionally "
                f"{', '.join(sorted(known - {'crop', 'resize'}))}."
            )
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**values)

    def transform(self, augment: Augment = "none") -> Callable[[Any], Tensor]:
        """Return the transform: PIL image -> float tensor of shape `input_size`.

        Args:
            augment: what is varied at random, for training only. Randomness comes from torch's global
                generator, which a `DataLoader` seeds in each worker.

                * ``"none"``: nothing; every epoch sees the same tensors, so they can be cached.
                * ``"flip"``: mirrored left to right with probability 1/2.
                * ``"light"``: a random crop of 60-100 % of the area, flip, brightness and contrast ±20 %.
                * ``"randaugment"``: random crop, flip, and RandAugment's two operations of magnitude 9.
                * ``"trivialaugment"``: random crop, flip, and TrivialAugment's single operation.

                Not for images where left and right or the colours carry the label.

        Raises:
            DataError: `augment` is not one of these names.
            MissingExtraError: torchvision is not installed.

        Source: Cubuk et al. 2020 (RandAugment), Müller & Hutter 2021 (TrivialAugment).
        """
        if augment not in AUGMENTS:
            raise DataError(
                f"augment is {augment!r}; expected one of {', '.join(AUGMENTS)}."
                f"{did_you_mean(augment, AUGMENTS, count=1)}"
            )
        transforms = _transforms()
        mode = transforms.InterpolationMode(self.interpolation)
        # The order of torchvision's own presets; also in `default` below.
        to_tensor = [transforms.ToTensor(), transforms.Normalize(self.mean, self.std)]
        resize: list[Any] = []
        if self.keep_ratio and self.resize is not None:
            resize = [_Cover(_pair(self.resize), mode)]
        elif self.resize is not None:
            size = self.resize if isinstance(self.resize, int) else list(self.resize)
            resize = [transforms.Resize(size, interpolation=mode)]
        crop = transforms.CenterCrop(list(self.crop))
        flip = transforms.RandomHorizontalFlip()
        if augment in ("none", "flip"):
            steps = [*resize, crop, *([flip] if augment == "flip" else [])]
        else:
            steps = [
                transforms.RandomResizedCrop(list(self.crop), scale=(0.6, 1.0), interpolation=mode),
                flip,
                {
                    "light": lambda: transforms.ColorJitter(brightness=0.2, contrast=0.2),
                    "randaugment": lambda: transforms.RandAugment(num_ops=2, magnitude=9),
                    "trivialaugment": transforms.TrivialAugmentWide,
                }[augment](),
            ]
        composed: Callable[[Any], Tensor] = transforms.Compose([*steps, *to_tensor])
        return composed


@dataclass(frozen=True)
class _Cover:
    """Resize an image to the smallest size with its own ratio that covers `size` (height, width)."""

    size: tuple[int, int]
    mode: Any

    def __call__(self, image: Any) -> Any:
        from torchvision.transforms import functional

        ratio = min(image.height / self.size[0], image.width / self.size[1])
        sides = [round(image.height / ratio), round(image.width / ratio)]
        return functional.resize(image, sides, interpolation=self.mode)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _transforms() -> Any:
    try:
        from torchvision import transforms
    except ImportError as error:
        raise MissingExtraError("torchvision", "vision", "Reading images") from error
    return transforms


def from_timm(model: Any, size: int | tuple[int, int] | None = None) -> Preprocessing:
    """Return the preprocessing that timm names for `model` (``timm.data.resolve_data_config``).

    Args:
        model: a timm model.
        size: of its input, instead of its own. timm keeps the share that is cropped as a fraction, so
            this is exact where `Preprocessing.at` may be one pixel off.

    Raises:
        ModelError: its crop mode pads the image, which the transforms here do not do.
    """
    import timm

    wanted = {} if size is None else {"input_size": (3, *_pair(size))}
    config = timm.data.resolve_data_config(wanted, model=model)
    _, height, width = config["input_size"]
    scaled = (int(height / config["crop_pct"]), int(width / config["crop_pct"]))
    if config["crop_mode"] == "border":
        raise ModelError(
            "timm's configuration of this model asks for crop mode 'border', which pads images; "
            "expected 'center' or 'squash'. Pass preprocessing= with your own choice."
        )
    keep_ratio = config["crop_mode"] == "center"
    square = scaled[0] == scaled[1]
    return Preprocessing(
        crop=(height, width),
        resize=scaled[0] if keep_ratio and square else scaled,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        keep_ratio=keep_ratio and not square,
    )


def from_torchvision(weights: Any) -> Preprocessing:
    """Return the preprocessing of a torchvision weights entry (``weights.transforms()``).

    Args:
        weights: a member of a torchvision ``WeightsEnum`` for image classification.
    """
    preset = weights.transforms()
    side, resize = preset.crop_size[0], preset.resize_size[0]
    return Preprocessing(
        crop=(side, side),
        resize=resize,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
