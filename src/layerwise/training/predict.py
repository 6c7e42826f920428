"""Predictions of a run for image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import DataError, RunError, listed, plural
from layerwise.training.run import Run


@dataclass(frozen=True)
class Predictions:
    """What `predict_images` found.

    Attributes:
        rows: for each image ``"image"`` (its path) and what `Run.predict` returns for it.
        skipped: (path, reason) of images that could not be read, where they were to be left out.
    """

    rows: list[dict[str, Any]]
    skipped: tuple[tuple[str, str], ...] = ()


def predict_images(
    run: Run,
    images: Sequence[str | Path],
    *,
    batch_size: int = 32,
    skip_bad_images: bool = False,
    path_column: str | None = None,
) -> Predictions:
    """Return the run's predictions for image files, preprocessed as in training.

    Args:
        run: from `load_run`.
        images: files; folders, which stand for their images; tables with a column of paths.
        batch_size: images of one forward pass.
        skip_bad_images: leave out files that cannot be read and list them.
        path_column: of tables; None is that of training, ``"path"`` where none was named.

    Raises:
        RunError: the run knows no preprocessing of images.
        DataError: a path does not exist, a table lacks the column, or (without `skip_bad_images`) a file
            cannot be read, or none can.
    """
    from layerwise.sources.images import image_list

    if run.preprocessing is None:
        raise RunError(
            f"{run.path} does not know how its images were prepared (it was started from Python). Load it "
            "with layerwise.load_run(...) and give its predict() a batch of tensors."
        )
    column = path_column or run.table.get("path_column") or "path"
    data = image_list(images, run.preprocessing, classes=run.classes, path_column=column)
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] = []
    for begin in range(0, len(data), batch_size):
        tensors, paths = [], []
        for index in range(begin, min(begin + batch_size, len(data))):
            try:
                tensors.append(data[index][0])
                paths.append(data.paths[index])
            except DataError as error:
                if not skip_bad_images:
                    raise
                # the cause is what is wrong with the file, without the advice to leave it out
                skipped.append((data.paths[index], str(error.__cause__ or error)))
        if tensors:
            decoded = run.predict(torch.stack(tensors))
            rows += [{"image": path, **row} for path, row in zip(paths, decoded)]
    if not rows:
        reasons = [reason for _, reason in skipped]
        raise DataError(listed(f"none of {plural(len(data), 'image')} can be read", reasons))
    return Predictions(rows, tuple(skipped))
