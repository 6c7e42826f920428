"""Models, data and sources by name, as the command line gives them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from layerwise.choosing.signature import Signature
from layerwise.errors import DataError

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.sources.opened import OpenedModel
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText


def open_task(
    model: str,
    data: str,
    *,
    weights: str | None = None,
    mismatched: Literal["error", "drop_head"] = "error",
    pretrained: bool = True,
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
        mismatched: what to do with `weights` for other classes, as `layerwise.open_model` takes it.
        pretrained: take the library's weights; False leaves random ones.
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
    from layerwise.training.job import Job, data_name, open_job

    job = Job(
        model=model,
        data=data_name(data),
        strategy="full",
        weights=weights,
        mismatched=mismatched,
        pretrained=pretrained,
        granularity=granularity,
        input_size=input_size,
        val_frac=val_frac,
        test_frac=test_frac,
        options={"seed": seed, **(options or {})},
        text=text,
    )
    return open_job(job)


def open_inputs(
    model: str,
    data: str,
    *,
    weights: str | None = None,
    mismatched: Literal["error", "drop_head"] = "error",
    pretrained: bool = True,
    input_size: int | None = None,
    granularity: str = "stages",
    seed: int = 0,
    text: dict[str, Any] | None = None,
) -> tuple[OpenedModel, Any, LayerMap]:
    """Return a model, data without their labels if they have any, and the layer map.

    Args:
        model: spec of the model.
        data: a folder of images, whatever its sub-folders; a table of images or texts; lines of texts; a
            data set's name.
        weights: file to load instead of the library's own.
        mismatched: what to do with `weights` for other classes, as `layerwise.open_model` takes it; of a text
            model the head is left in any case.
        pretrained: take the library's weights; False leaves random ones.
        input_size: side of the images in pixels.
        granularity: of the layer map.
        seed: of the split of a named data set, and of a new head.
        text: fields of `layerwise.training.text_job.TextOptions`, for texts; None for images.

    Raises:
        LayerwiseError: model, weights or data cannot be opened.
    """
    from layerwise.layers.mapping import layer_map
    from layerwise.layers.randomness import seed_everything
    from layerwise.sources.models import open_model, takes_texts
    from layerwise.training.job import NAMED

    given: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "input_size": input_size}
    given["mismatched"] = mismatched
    if data.startswith(NAMED):
        task = open_task(model, data, **given, granularity=granularity, val_frac=0.0, seed=seed, text=text)
        return task.opened, _Inputs(task.data.train), task.layers
    seed_everything(seed)
    # a text model has a head to be named by the same groups as when it is tuned
    if takes_texts(model):
        given |= {"num_classes": 2, "task": "text_classification", "mismatched": "drop_head"}
    opened = open_model(model, **given)
    samples = unlabelled(opened, data, text=text)
    return opened, samples, layer_map(opened.model, opened.example_input, cast(Any, granularity))


def has_labels(model: str, data: str, text: dict[str, Any] | None) -> bool:
    """Return whether data name the classes of their samples; of what cannot be opened, yes: so it is told.

    A folder that holds images and no folder of images names none, nor does one whose images are all in one
    folder (but ``train``), a table without the column ``label`` for which no other column is named, or a file
    of lines.
    """
    from layerwise.sources.imagelisting import is_image
    from layerwise.sources.models import takes_texts
    from layerwise.sources.tables import TABLES, read_rows

    path, text = Path(data), text or {}
    if not takes_texts(model) and path.is_dir():
        loose = any(map(is_image, path.iterdir()))
        folders = [part.name for part in path.iterdir() if any(map(is_image, part.glob("**/*")))]
        return bool(folders) if loose else len(folders) != 1 or folders == ["train"]
    if text.get("label_column") is not None or not path.is_file():
        return True
    if path.suffix.lower() not in TABLES:
        return False
    return "label" in read_rows(path, encoding=text.get("encoding", "utf-8"))[0]


def unlabelled(opened: OpenedModel, data: str, *, text: dict[str, Any] | None = None) -> Any:
    """Return all images of a folder, whatever its sub-folders, or of a table, or all texts of a file.

    Their labels are left out.

    Raises:
        DataError: there is no such folder or file, or nothing in it.
    """
    from layerwise.sources.images import image_list

    if opened.tokenizer is not None:
        return _texts(opened, data, text or {})
    assert opened.preprocessing is not None  # what reads no texts is opened for images
    columns = {name: value for name, value in (text or {}).items() if name == "path_column"}
    return _Inputs(image_list([data], opened.preprocessing, **columns))


def _texts(opened: OpenedModel, data: str, text: dict[str, Any]) -> Any:
    from layerwise.sources.text import text_list
    from layerwise.training.text_job import TextOptions, length_for
    from layerwise.training.text_predict import read_texts

    options = TextOptions.of(text)
    rows = read_texts(
        [data],
        text_column=options.text_column or "text",
        pair_column=options.pair_column,
        encoding=options.encoding,
    )
    pairs = None if options.pair_column is None else [row.pair or "" for row in rows]
    length = length_for(options, opened)
    return text_list([row.text for row in rows], opened.tokenizer, max_length=length, pairs=pairs)


def fit_options(prepared: Prepared | PreparedText) -> dict[str, Any]:
    """Return the options of `layerwise.fit` that follow from the data of a task: its classes, or its kind."""
    task = {"task": prepared.task} if hasattr(prepared, "task") else {}
    return {"classes": prepared.data.classes or None, **task}


def check_source(source: str | None, signature: str | Path | None) -> Signature | None:
    """Return the signature, if one is given: what is wrong with it is told before a model is opened.

    Raises:
        DataError: a source is given as well, or does not exist; or the signature cannot be read.
    """
    if source is not None and signature is not None:
        raise DataError("a source folder and a signature are both given; give one of them.")
    if source is not None and not Path(source).exists():
        raise DataError(f"source {source!r} does not exist; expected a folder of images, or a file of texts.")
    return None if signature is None else Signature.load(signature)


def open_source(
    opened: OpenedModel,
    source: str | None,
    signature: Signature | None,
    *,
    text: dict[str, Any] | None = None,
) -> Any:
    """Return what a shift is measured against: a folder's images, a file's texts, a signature, or None.

    Raises:
        LayerwiseError: the source cannot be opened.
    """
    return signature if source is None else unlabelled(opened, source, text=text)


class _Inputs:
    """A labelled data set as one of inputs alone."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples
        self.tokenizer = getattr(samples, "tokenizer", None)
        self.collate = getattr(samples, "collate", None)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        if isinstance(sample, dict):
            return {name: value for name, value in sample.items() if name != "labels"}
        return sample[0]
