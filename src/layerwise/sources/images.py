"""Images with a class each: folders a class, or a table of paths and labels, as `ImageData`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerwise.errors import DataError, did_you_mean_beside, listed, plural
from layerwise.sources.copies import images_with_content, tell_copies
from layerwise.sources.imagefile import find_bad_images
from layerwise.sources.imagelisting import (
    Samples,
    files_in,
    is_image,
    list_folders,
    list_paths,
    list_table,
    raise_problems,
)
from layerwise.sources.imageset import ImageSet
from layerwise.sources.preprocessing import Augment, Preprocessing
from layerwise.sources.splits import VAL_FRAC, fracs_to_split, stratified_split
from layerwise.sources.tables import TABLES

Check = Literal["auto", "full", "header"]
FULL_CHECK_LIMIT = 5000


@dataclass(frozen=True)
class ImageData:
    """The parts of an image data set.

    Attributes:
        train: with the augmentation that was asked for.
        val: None where there is none.
        test: likewise.
        classes: name of each class number.
        skipped: (path, reason) of the files that were left out because they cannot be read.
        notes: what was chosen, for people: how the split was made, files that are no images; and, up to 5,000
            images, which stand in several classes or parts.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, ImageSet]:
        """Return the parts that there are, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}


def open_images(
    source: str | Path,
    preprocessing: Preprocessing,
    *,
    val_frac: float = VAL_FRAC,
    test_frac: float = 0.0,
    seed: int = 0,
    augment: Augment = "none",
    skip_bad_images: bool = False,
    check: Check = "auto",
    path_column: str = "path",
    label_column: str = "label",
    split_column: str | None = None,
    skip_bad_rows: bool = False,
    classes: Sequence[str] = (),
) -> ImageData:
    """Return the images under `source`, split and ready for a model.

    `source` is one of three:

    * a folder with a subfolder ``train`` (and ``val``, ``test``; ``valid``, ``validation`` and ``dev`` are
      understood), each holding a folder of images a class;
    * a folder that holds a folder of images a class, split here;
    * a table (.csv, .tsv, .jsonl, .parquet) with a column of paths, relative to it, and one of labels.

    A part that is missing is split off from train, by `seed`, every class in the same share; with a
    ``val`` folder or `split_column` present, `val_frac` is not used, and likewise for test.

    Args:
        source: folder or table.
        preprocessing: of the model (`OpenedModel.preprocessing`).
        val_frac: share to split off for validation, in [0, 1); 0 for none.
        test_frac: share to split off for testing.
        seed: of the split.
        augment: random variation of the training images; see `Preprocessing.transform`.
        skip_bad_images: leave out files that cannot be read and list them in `ImageData.skipped`.
        check: how files are checked before training starts: ``"full"`` decodes each (milliseconds a
            file), ``"header"`` reads a few bytes and finds no truncated files, ``"auto"`` is full up to
            5,000 files and wherever `skip_bad_images` is set.
        path_column: of a table.
        label_column: of a table.
        split_column: of a table: holds train, val or test for each row.
        skip_bad_rows: of a table: leave out rows without a path or a label and list them in
            `ImageData.skipped`.
        classes: of a model, in the order of its outputs; the data, and each part, may lack some. None given
            are those of the data, at least two, sorted as texts.

    Raises:
        DataError: the source is missing, has no images, one class, an empty class, classes that differ
            between its parts or are none of `classes`, or (without `skip_bad_images`) files that cannot be
            read. All problems found are in one message.
        MissingExtraError: Pillow or torchvision is not installed.
    """
    source = Path(source)
    if source.is_dir():
        listing = list_folders(source)
    elif source.is_file():
        listing = list_table(source, path_column, label_column, split_column, skip_bad_rows)
    else:
        raise DataError(
            f"data {str(source)!r} does not exist.{did_you_mean_beside(source)} Expected a folder "
            f"with a folder of images a class, or a table of paths and labels."
        )
    notes = list(listing.notes)
    parts, skipped = _readable(listing.parts, skip_bad_images, check)
    raise_problems(source, listing, parts, classes)

    classes = tuple(classes or sorted({label for samples in parts.values() for _, label in samples}))
    fracs, unused = fracs_to_split(parts, val_frac=val_frac, test_frac=test_frac)
    notes += unused
    if any(fracs):
        train = parts["train"]
        split = stratified_split([label for _, label in train], fracs, seed=seed)
        for name, frac, indices in zip(("val", "test"), fracs, split[1:], strict=True):
            if frac:
                parts[name] = [train[index] for index in indices]
                notes.append(f"{name}: {plural(len(indices), 'image')} split off from train, seed {seed}")
        parts["train"] = [train[index] for index in split[0]]
    if sum(map(len, parts.values())) <= FULL_CHECK_LIMIT:
        notes += tell_copies(images_with_content(parts), "image")
    number = {name: index for index, name in enumerate(classes)}

    def make(name: str) -> ImageSet | None:
        if name not in parts:
            return None
        paths = [path for path, _ in parts[name]]
        targets = [number[label] for _, label in parts[name]]
        chosen: Augment = augment if name == "train" else "none"
        return ImageSet(paths, targets, classes, preprocessing, augment=chosen)

    train_set = make("train")
    assert train_set is not None  # raise_problems saw to it
    left_out = (*listing.skipped, *skipped)
    return ImageData(train_set, make("val"), make("test"), classes, left_out, tuple(notes))


def image_list(
    paths: Sequence[str | Path],
    preprocessing: Preprocessing,
    *,
    classes: Sequence[str] = (),
    path_column: str = "path",
) -> ImageSet:
    """Return images without labels (targets are -1), for prediction.

    Args:
        paths: of image files; of folders, which stand for the images in them; of tables of paths.
        preprocessing: of the model.
        classes: name of each class number.
        path_column: of tables.

    Raises:
        DataError: a path does not exist, a folder has no images, or a table cannot be read.
    """
    found: list[Path] = []
    problems = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in files_in(path) if is_image(file)]
            found.extend(inside)
            if not inside:
                problems.append(f"folder {str(path)!r} has no images")
        elif path.is_file():
            is_table = path.suffix.lower() in TABLES
            found.extend(list_paths(path, path_column) if is_table else [path])
        else:
            problems.append(f"{str(path)!r} does not exist")
    if not paths:
        problems.append("no paths were given")
    if problems:
        raise DataError(listed("images cannot be opened", problems))
    return ImageSet(found, [-1] * len(found), classes, preprocessing)


def _readable(
    parts: Mapping[str, Samples], skip: bool, check: Check
) -> tuple[dict[str, Samples], list[tuple[str, str]]]:
    """Return the samples that can be read, and those left out; raises unless `skip`."""
    if check not in ("auto", "full", "header"):
        raise DataError(f"check is {check!r}; expected 'auto', 'full' or 'header'.")
    every = [(part, path, label) for part, samples in parts.items() for path, label in samples]
    decode = check == "full" or (check == "auto" and (skip or len(every) <= FULL_CHECK_LIMIT))
    bad = find_bad_images([path for _, path, _ in every], decode=decode)
    if bad and not skip:
        raise DataError(
            listed(f"{len(bad)} of {len(every)} images cannot be read", list(bad.values()))
            + "\nRepair or remove them, or leave them out: --skip-bad-images of layerwise fit and predict "
            "(skip_bad_images=True)."
        )
    kept: dict[str, Samples] = {part: [] for part in parts}
    for index, (part, path, label) in enumerate(every):
        if index not in bad:
            kept[part].append((path, label))
    return kept, [(str(every[index][1]), reason) for index, reason in bad.items()]
