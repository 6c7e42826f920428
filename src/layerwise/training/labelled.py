"""`open_labelled`: images or texts with labels, from files, as a run reads them; for `Run.evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerwise.errors import DataError, RunError
from layerwise.training.job import IMAGE_TABLE, data_name
from layerwise.training.run import Run
from layerwise.training.text_job import MAX_LENGTH, TextOptions

if TYPE_CHECKING:
    from layerwise.sources.images import ImageData
    from layerwise.sources.imageset import ImageSet
    from layerwise.sources.text import TextData, TextSet


def open_labelled(
    run: Run, data: str | Path, *, part: str | None = None, skip_bad_images: bool = False, **table: Any
) -> tuple[ImageSet | TextSet, tuple[str, ...]]:
    """Return labelled samples from files, prepared as in the run's training, and notes for people.

    Args:
        run: from `layerwise.load_run`; one that knows its preprocessing or its tokenizer.
        data: folder or table, as ``layerwise fit --data`` takes it; nothing is split off.
        part: ``"train"``, ``"val"`` or ``"test"`` of data with such parts; None is the test part, or all
            where there are no parts.
        skip_bad_images: leave out images that cannot be read, which the notes tell.
        **table: what is said of a table (``label_column``, ``encoding`` ...); as in training where not given,
            but for the ``split_column``, which is only that of the very table of training.

    Returns:
        A data set whose classes are the run's, in its order, for `Run.evaluate`.

    Raises:
        RunError: the run was started from Python and knows neither.
        DataError: the data cannot be read, have other classes, or no such part.
    """
    is_own = data_name(data) == run.about["data"].get("source")
    told = {name: value for name, value in run.table.items() if is_own or name != "split_column"}
    told |= {name: value for name, value in table.items() if value not in (None, False)}
    found: ImageData | TextData
    if run.tokenizer is not None:
        found = _open_texts(run, data, TextOptions.of(told))
    elif run.preprocessing is not None:
        found = _open_images(run, data, skip_bad_images, told)
    else:
        raise RunError(
            f"{run.path} does not know how its inputs were prepared (it was started from Python). Load it "
            "with layerwise.load_run(...) and give its evaluate() a data set."
        )
    parts: dict[str, Any] = dict(found.parts())
    name = part or ("train" if set(parts) == {"train"} else "test")
    if name not in parts:
        raise DataError(
            f"data {str(data)!r} have the parts {', '.join(parts)}, and no {name}. Name one: --part (part=)."
        )
    skipped = [f"left out {place}: {reason}" for place, reason in found.skipped]
    learned = ["the run learned from these data: the scores are none of a test"]
    return parts[name], (*found.notes, *skipped, *(learned if is_own and name == "train" else []))


def _open_images(run: Run, data: str | Path, skip_bad_images: bool, table: dict[str, Any]) -> ImageData:
    from layerwise.sources.images import open_images

    options = {name: value for name, value in table.items() if name in IMAGE_TABLE}
    return open_images(
        data,
        run.preprocessing,
        val_frac=0.0,
        skip_bad_images=skip_bad_images,
        classes=run.classes,
        **options,
    )


def _open_texts(run: Run, data: str | Path, options: TextOptions) -> TextData:
    from layerwise.sources.text import encode
    from layerwise.sources.texttable import read_texts

    task = cast(Any, run.task.name)
    table = read_texts(data, task=task, val_frac=0.0, classes=run.classes, **options.of_table())
    length = run.about["data"].get("max_length") or MAX_LENGTH
    found = encode(table, run.tokenizer, max_length=length)
    options.pad(found)
    return found
