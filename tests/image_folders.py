"""Small folders of real image files, generated: two classes that a network can tell apart."""

from __future__ import annotations

import random
from pathlib import Path

COLOURS = {"green": (40, 200, 40), "red": (200, 40, 40), "blue": (40, 40, 200)}


def make_images(folder: Path, *, classes: tuple[str, ...] = ("green", "red"), count: int = 12) -> Path:
    """Fill `folder` with a folder of noisy, coloured PNG files for each class; return it."""
    from PIL import Image

    draw = random.Random(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour = tuple(max(0, min(255, value + draw.randint(-60, 60))) for value in COLOURS[name])
            Image.new("RGB", (40, 36), colour).save(folder / name / f"{index}.png")
    return folder
