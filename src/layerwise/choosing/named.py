"""Models, data and sources by name, as the command line gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.choosing.signature import Signature
from layerwise.errors import DataError, ModelError

if TYPE_CHECKING:
    from layerwise.sources.opened import OpenedModel
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText


def open_task(
    model: str,
    data: str,
    *,
    weights: str | None = None,
    input_size: int | None = None,
    granularity: str = "stages",
    val_frac: float = 0.2,
    test_frac: float = 0.0,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Prepared | PreparedText:
    """Return model, data and layer map opened as ``layerwise fit`` opens them.

    Args:
        model: spec of the model.
        data: folder or table of labelled images, a table of texts, or a data set's name.
        weights: file to load instead of the library's own.
        input_size: side of the images in pixels.
        granularity: of the layer map.
        val_frac: share of train to validate on, where the data has no part for it.
        test_frac: share of train to test on, likewise.
        seed: of the split and the new head.
        options: of `layerwise.fit`.
        text: fields of `layerwise.training.text_job.TextOptions`, for texts; None for images.

    Raises:
        LayerwiseError: model, weights or data cannot be opened.
    """
    from layerwise.training.job import Job, open_job

    job = Job(
        model=model,
        data=data if data.startswith(("demo:", "hf:")) else str(Path(data).resolve()),
        strategy="full",
        weights=weights,
        granularity=granularity,
        input_size=input_size,
        val_frac=val_frac,
        test_frac=test_frac,
        options={"seed": seed, **(options or {})},
        text=text,
    )
    return open_job(job)


def open_images_alone(
    model: str, data: str, *, weights: str | None = None, input_size: int | None = None
) -> tuple[OpenedModel, Any]:
    """Return a model with its own head, and all images of a folder without labels.

    Raises:
        LayerwiseError: model, weights or images cannot be opened.
    """
    from layerwise.sources.models import open_model

    opened = open_model(model, weights=weights, input_size=input_size)
    return opened, unlabelled(opened, data)


def unlabelled(opened: OpenedModel, data: str) -> Any:
    """Return all images in a folder, whatever its sub-folders, as a data set without labels.

    Raises:
        ModelError: the model takes no images.
        DataError: there is no such folder, or no image in it.
    """
    from layerwise.sources.images import image_list

    if opened.preprocessing is None:
        raise ModelError(
            f"{opened.spec!r} takes no images. For texts say in which column they are (--text-column); other "
            "inputs can be given in Python: layerwise.shift, layerwise.signature."
        )
    return _Inputs(image_list([data], opened.preprocessing))


def fit_options(prepared: Prepared | PreparedText) -> dict[str, Any]:
    """Return the options of `layerwise.fit` that follow from the data of a task: its classes, or its kind."""
    task = {"task": prepared.task} if hasattr(prepared, "task") else {}
    return {"classes": prepared.data.classes or None, **task}


def open_source(opened: OpenedModel, source: str | None, signature: str | Path | None) -> Any:
    """Return what a shift is measured against: a folder's images, a saved signature, or None.

    Raises:
        DataError: both are given, or one cannot be opened.
    """
    if source is not None and signature is not None:
        raise DataError("a source folder and a signature are both given; give one of them.")
    if signature is not None:
        return Signature.load(signature)
    return None if source is None else unlabelled(opened, source)


class _Inputs:
    """A data set of pairs as one of inputs alone."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index][0]
