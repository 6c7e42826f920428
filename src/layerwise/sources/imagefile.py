"""Read one image file of any kind as the RGB (or grey) picture that a person sees."""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import DataError, MissingExtraError, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Pillow raises all of these for damaged files: SyntaxError for headers of PNG, RuntimeError for AVIF.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError)


def read_image(path: str | Path, *, channels: int = 3) -> Image:
    """Return the image at `path`, decoded, upright, as 8-bit RGB or grey.

    Palettes and CMYK are converted by Pillow. Transparent pixels are put on white, since what a file
    stores under them is arbitrary. 16-bit pixels are scaled from [0, 65535]. A camera's note on how it
    was held (EXIF orientation) is followed. Of an animation the first frame is taken.

    Args:
        path: of the file.
        channels: 3 for RGB, 1 for grey.

    Raises:
        DataError: the file is missing, truncated, not an image, or holds pixels of unknown range.
        MissingExtraError: Pillow is not installed.
    """
    try:
        return _decode(path, channels)
    except _BadImageError as error:
        raise DataError(
            f"{error}. Repair or remove the file, or leave such files out: --skip-bad-images of "
            f"layerwise fit and predict (skip_bad_images=True)."
        ) from error


class _BadImageError(Exception):
    """Why one file cannot be used, without what to do about it, which depends on the caller."""


def _decode(path: str | Path, channels: int) -> Image:
    pil = _pillow()
    try:
        with pil.Image.open(path) as opened:
            image: Image = pil.ImageOps.exif_transpose(opened)
            image.load()
    except FileNotFoundError as error:
        raise _BadImageError(f"image {str(path)!r} does not exist") from error
    except (*DAMAGE, pil.Image.DecompressionBombError) as error:
        raise _BadImageError(f"image {str(path)!r} cannot be read ({str(error).rstrip('.')})") from error
    if image.width * image.height > (pil.Image.MAX_IMAGE_PIXELS or math.inf):
        _warn_of_size(str(path), image.width * image.height)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image, path)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pil.Image.new("RGBA", image.size, "white")
        image = pil.Image.alpha_composite(white, image)
    return image.convert("L" if channels == 1 else "RGB")


@functools.cache  # once for each file, whichever filters of warnings come and go
def _warn_of_size(path: str, pixels: int) -> None:
    """Warn of a large image by name; Pillow's own warning has none."""
    warn(f"image {path!r} has {pixels:,} pixels; it takes long to read, and much memory. Save it smaller.")


def _eight_bit(image: Image, path: str | Path) -> Image:
    """Scale wide pixels to 8 bits by the range of their type."""
    import numpy as np

    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    fractions = image.mode == "F" and high <= 1
    top = 1.0 if fractions else 255.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= top):  # also false for NaN
        raise _BadImageError(
            f"image {str(path)!r} has pixels from {low:g} to {high:g}; expected whole numbers from 0 to "
            f"65535, or fractions from 0 to 1"
        )
    scaled: Image = _pillow().Image.fromarray(np.round(pixels * (255.0 / top)).astype(np.uint8))
    return scaled


def find_bad_images(paths: Sequence[str | Path], *, decode: bool) -> dict[int, str]:
    """Return which of `paths` cannot be read: index -> the reason.

    Args:
        paths: of image files.
        decode: read all pixels, which also finds truncated files; otherwise only the header is read.
    """
    pil = _pillow()

    def check(path: str | Path) -> str | None:
        try:
            if decode:
                _decode(path, 3)
            else:
                with pil.Image.open(path):
                    pass
        except _BadImageError as error:
            return str(error)
        except (*DAMAGE, pil.Image.DecompressionBombError) as error:
            return f"image {str(path)!r} cannot be read ({str(error).rstrip('.')})"
        return None

    # Pillow releases the interpreter while it decodes, so threads use all cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return {index: reason for index, reason in enumerate(pool.map(check, paths)) if reason is not None}


def _pillow() -> Any:
    try:
        import PIL
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise MissingExtraError("pillow", "vision", "Reading images") from error
    return PIL
