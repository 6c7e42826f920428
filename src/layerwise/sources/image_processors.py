"""The image processors of transformers as `Preprocessing`, or an error where they do something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.errors import ModelError
from layerwise.sources.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

# What transformers' processors do to pixels beyond resize, centre crop, rescale and normalise.
OTHER_STEPS = (
    "do_flip_channel_order",
    "do_pad",
    "do_align_long_axis",
    "do_align_axis",
    "do_crop_margin",
    "do_thumbnail",
    "do_color_quantize",
    "do_grayscale",
    "size_divisor",
    "resize_short",
)
# Processors that crop or resize by a rule which their settings do not show.
OTHER_RULES = ("Levit", "Perceiver", "PoolFormer", "PPLCNet", "TextNet", "Donut")


def from_image_processor(processor: Mapping[str, Any], channels: int | None = None) -> Preprocessing:
    """Return the preprocessing that a transformers image processor's settings describe.

    The pixels come from torchvision and Pillow instead of the processor itself, so that augmentation
    and the cache work the same for all models. Values differ by two steps of 8-bit colour at most; where
    an odd number of pixels is cropped, and with the filter "nearest", the two may choose neighbouring ones.

    Args:
        processor: ``AutoImageProcessor.from_pretrained(...).to_dict()``, which has the defaults of its
            class; a file alone may lack them.
        channels: of the model, for a processor that does not normalise; default 3.

    Raises:
        ModelError: the settings do not say to what size images are brought, or ask for what the
            transforms here do not do (another order of colours, padding, ...). All are named.
    """
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    problems = [f"{name} is {processor[name]}" for name in OTHER_STEPS if processor.get(name)]
    problems += [f"the processor is a {kind}" for rule in OTHER_RULES if kind.startswith(rule)]
    cropped = processor.get("do_center_crop")
    if cropped and processor.get("crop_pct"):
        problems.append("both crop_pct and do_center_crop are set")
    if problems:
        raise ModelError(
            f"the image processor does what the transforms here do not: {', '.join(problems)}. "
            f"Pass preprocessing= with your own choice."
        )
    crop, resize = _sizes(processor)
    # All that follows the crop is one line a channel: (pixel x scale - offset - mean) / std.
    rescaled = processor.get("do_rescale", True)
    scale = 255 * float(processor.get("rescale_factor") or 1 / 255) if rescaled else 255.0
    offset = 1.0 if rescaled and processor.get("rescale_offset") else 0.0
    mean, std = _values(processor, "image_mean", IMAGENET_MEAN), _values(processor, "image_std", IMAGENET_STD)
    divisor = std
    if not processor.get("do_normalize", True):
        count = channels or min(len(mean), 3)
        mean, divisor = (0.0,) * count, (1.0,) * count
    if processor.get("include_top"):  # EfficientNet divides once more
        divisor = tuple(one * other for one, other in zip(divisor, std, strict=False))
    # Pillow's numbers, which transformers keeps in its files.
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    resample = processor.get("resample")
    interpolation: Any = names[2 if resample is None else int(resample)]
    if abs(scale - 1) < 1e-6 and not offset:  # the common case keeps its round numbers
        return Preprocessing(crop, resize, mean, divisor, interpolation)
    mean = tuple((value + offset) / scale for value in mean)
    return Preprocessing(crop, resize, mean, tuple(value / scale for value in divisor), interpolation)


def _sizes(processor: Mapping[str, Any]) -> tuple[tuple[int, int], int | tuple[int, int] | None]:
    """Return an image processor's crop and resize."""
    size = processor.get("size") or {}
    crop_pct = processor.get("crop_pct")
    cropped = processor.get("do_center_crop")
    if isinstance(size, int):  # files of before 2022
        size = {"shortest_edge": size} if cropped or crop_pct else {"height": size, "width": size}
    size = {name: int(value) for name, value in dict(size).items() if value}
    crop = _height_width(processor["crop_size"]) if cropped and processor.get("crop_size") else None
    if not processor.get("do_resize", True):
        if crop is None:
            raise ModelError(
                "the image processor neither resizes nor crops, so that images keep their own sizes. "
                "Pass preprocessing= with the size that the model is to get."
            )
        return crop, None
    shortest = size.get("shortest_edge")
    if set(size) == {"shortest_edge"} and shortest is not None and crop_pct:
        # ConvNeXt's convention: below 384 pixels resize to size / crop_pct, then crop the centre.
        square = (shortest, shortest)
        return square, int(shortest / crop_pct) if shortest < 384 else square
    if set(size) == {"shortest_edge"} and shortest is not None and crop is not None:
        return crop, shortest
    if set(size) == {"height", "width"}:
        return crop or _height_width(size), _height_width(size)
    raise ModelError(
        f"the image processor's size is {size}{'' if crop else ', and it does not crop'}; expected 'height' "
        f"and 'width', or 'shortest_edge' and a crop. Pass preprocessing= with your own choice."
    )


def check_pixels(processor: Any, preprocessing: Preprocessing) -> None:
    """Compare one picture's pixels with those of a transformers image processor.

    Processors are programs, and some follow rules that their settings do not show.

    Raises:
        ModelError: they differ by more than rounding and one pixel's shift.
    """
    import numpy as np
    import torch
    from PIL import Image

    # Smooth, so that rounding and shifts matter little; each colour runs another way.
    down, right = np.mgrid[0:256, 0:320]
    colours = np.stack([right * 0.79, down, 255 - right * 0.79], axis=-1).astype(np.uint8)
    image = Image.fromarray(colours).convert("L" if preprocessing.channels == 1 else "RGB")
    try:
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    except Exception as error:  # the library raises all kinds
        raise ModelError(
            f"the image processor fails on a picture with {preprocessing.channels} channels "
            f"({type(error).__name__}: {error}). Pass preprocessing= with your own choice."
        ) from error
    ours = preprocessing.transform()(image)
    reason = f"images of shape {tuple(theirs.shape)} instead of {tuple(ours.shape)}"
    if ours.shape == theirs.shape:
        steps = (ours - theirs).abs() * 255 * torch.tensor(preprocessing.std)[:, None, None]
        if steps.max() <= 3 + 255 / min(preprocessing.crop):
            return
        reason = f"pixels up to {steps.max():.0f} of 255 steps away from those that its settings describe"
    raise ModelError(
        f"the image processor {type(processor).__name__} makes {reason}: it follows a rule of its own. "
        f"Pass preprocessing= with your own choice."
    )


def _values(processor: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = processor.get(name)
    if values is None:
        return default
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    return (int(size["height"]), int(size["width"]))
