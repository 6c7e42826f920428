"""Images with a class each: folders a class, or a table of paths and labels, as `ImageData`."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from layerwise.errors import DataError, did_you_mean
from layerwise.sources.imagefile import EXTENSIONS, find_bad_images, read_image
from layerwise.sources.preprocessing import Augment, Preprocessing
from layerwise.sources.splits import VAL_FRAC, fracs_to_split, stratified_split
from layerwise.sources.tables import PARTS, label_name, read_rows, unused_split

if TYPE_CHECKING:
    from torch import Tensor

Check = Literal["auto", "full", "header"]
FULL_CHECK_LIMIT = 5000
SHOWN = 10


class ImageSet:
    """A map-style data set: ``set[i]`` is ``(image tensor, class number)``.

    Attributes:
        paths: of the image files, in order.
        targets: class number of each; -1 where it is not known (see `image_list`).
        classes: name of each class number.
        preprocessing: how the model wants its images.
        augment: what is varied at random.
        deterministic: whether ``set[i]`` is the same tensor each time, so that features can be cached.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        targets: Sequence[int],
        classes: Sequence[str],
        preprocessing: Preprocessing,
        *,
        augment: Augment = "none",
    ) -> None:
        self.paths = tuple(map(str, paths))
        self.targets = tuple(targets)
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.augment: Augment = augment
        self._transform = preprocessing.transform(augment)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image as a float tensor (C, H, W) and its class number.

        Raises:
            DataError: the file has become unreadable; the message names it.
        """
        image = read_image(self.paths[index], channels=self.preprocessing.channels)
        return self._transform(image), self.targets[index]

    @property
    def deterministic(self) -> bool:
        """Whether an index gives the same tensor each time."""
        return self.augment == "none"

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in the order of `classes`."""
        found = Counter(self.targets)
        return {name: found[number] for number, name in enumerate(self.classes)}

    def plain(self) -> ImageSet:
        """Return the same images without augmentation, for measuring and caching."""
        other = copy.copy(self)
        other.augment = "none"
        other._transform = self.preprocessing.transform("none")
        return other

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at `indices`, in that order, with all else the same."""
        other = copy.copy(self)
        other.paths = tuple(self.paths[index] for index in indices)
        other.targets = tuple(self.targets[index] for index in indices)
        return other

    def fingerprint(self) -> str:
        """Return a short hash of what the set yields: files (path, size, time), labels, transform.

        A cache keyed by it is refused when a file was changed, a label moved or the transform differs.
        Augmented sets yield something else each time; their fingerprint says only from what.
        """
        settings = {"preprocessing": self.preprocessing.to_dict(), "augment": self.augment}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path, target in zip(self.paths, self.targets, strict=True):
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{target}\0".encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class ImageData:
    """The parts of an image data set.

    Attributes:
        train: with the augmentation that was asked for.
        val: None where there is none.
        test: likewise.
        classes: name of each class number, sorted.
        skipped: (path, reason) of the files that were left out because they cannot be read.
        notes: what was chosen, for people: how the split was made, files that are no images.
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

    Raises:
        DataError: the source is missing, has no images, one class, an empty class, classes that differ
            between its parts, or (without `skip_bad_images`) files that cannot be read. All problems
            found are in one message.
        MissingExtraError: Pillow or torchvision is not installed.
    """
    source = Path(source)
    if source.is_dir():
        listing = _list_folders(source)
    elif source.is_file():
        listing = _list_table(source, path_column, label_column, split_column, skip_bad_rows)
    else:
        siblings = [entry.name for entry in source.parent.iterdir()] if source.parent.is_dir() else []
        raise DataError(
            f"data {str(source)!r} does not exist.{did_you_mean(source.name, siblings)} Expected a folder "
            f"with a folder of images a class, or a table of paths and labels."
        )
    notes = list(listing.notes)
    parts, skipped = _readable(listing.parts, skip_bad_images, check)
    _raise_problems(source, listing, parts)

    classes = sorted({label for samples in parts.values() for _, label in samples})
    fracs, unused = fracs_to_split(parts, val_frac=val_frac, test_frac=test_frac)
    notes += unused
    if any(fracs):
        train = parts["train"]
        split = stratified_split([label for _, label in train], fracs, seed=seed)
        for name, frac, indices in zip(("val", "test"), fracs, split[1:], strict=True):
            if frac:
                parts[name] = [train[index] for index in indices]
                notes.append(f"{name}: {len(indices)} images split off from train, seed {seed}")
        parts["train"] = [train[index] for index in split[0]]
    number = {name: index for index, name in enumerate(classes)}

    def make(name: str) -> ImageSet | None:
        if name not in parts:
            return None
        paths = [path for path, _ in parts[name]]
        targets = [number[label] for _, label in parts[name]]
        chosen: Augment = augment if name == "train" else "none"
        return ImageSet(paths, targets, classes, preprocessing, augment=chosen)

    train_set = make("train")
    assert train_set is not None  # _raise_problems saw to it
    left_out = (*listing.skipped, *skipped)
    return ImageData(train_set, make("val"), make("test"), tuple(classes), left_out, tuple(notes))


def image_list(
    paths: Sequence[str | Path], preprocessing: Preprocessing, *, classes: Sequence[str] = ()
) -> ImageSet:
    """Return images without labels (targets are -1), for prediction; folders stand for their images.

    Raises:
        DataError: a path does not exist, or a folder has no images.
    """
    found: list[Path] = []
    problems = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in _files(path) if is_image(file)]
            found.extend(inside)
            if not inside:
                problems.append(f"folder {str(path)!r} has no images")
        elif path.is_file():
            found.append(path)
        else:
            problems.append(f"{str(path)!r} does not exist")
    if not paths:
        problems.append("no paths were given")
    if problems:
        raise DataError(_listed("images cannot be opened", problems))
    return ImageSet(found, [-1] * len(found), classes, preprocessing)


Samples = list[tuple[Path, str]]


@dataclass
class _Listing:
    """What a source names, before any file is opened: (path, label) by part."""

    parts: dict[str, Samples]
    empty: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def _list_folders(root: Path) -> _Listing:
    """Return the images of a folder, a class a subfolder, in parts where there are part folders."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    part_folders = {folder: PARTS[folder.name.lower()] for folder in folders if folder.name.lower() in PARTS}
    names = list(part_folders.values())
    if len(set(names)) < len(names):
        both = ", ".join(folder.name for folder in part_folders)
        raise DataError(
            f"data folder {str(root)!r} has two folders for one part ({both}); "
            f"expected one of each of train, val and test."
        )
    if "train" not in names:
        if part_folders and len(part_folders) == len(folders):
            raise DataError(
                f"data folder {str(root)!r} has {', '.join(f.name for f in folders)} but no train folder. "
                f"Add one, or give the folder above the classes."
            )
        part_folders = {root: "train"}
    parts: dict[str, Samples] = {}
    empty, others = [], 0
    for folder, part in part_folders.items():
        samples: Samples = []
        for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            if class_folder.name.startswith("."):
                continue
            files = _files(class_folder)
            images = [file for file in files if is_image(file)]
            others += len(files) - len(images)
            samples += [(file, class_folder.name) for file in images]
            if not images:
                empty.append(str(class_folder))
        parts[part] = samples
    if not any(parts.values()) and any(is_image(entry) for entry in root.iterdir()):
        raise DataError(
            f"data folder {str(root)!r} holds images itself; expected a folder for each class, with its "
            f"images inside. Move them into class folders, or give a table of paths and labels."
        )
    notes = (f"{others} files that are no images were left out",) if others else ()
    return _Listing(parts, tuple(empty), notes)


def _files(folder: Path) -> list[Path]:
    """Return all files under `folder`, sorted; links to folders are followed, dangling ones are files."""
    found: list[Path] = []
    waiting = [(folder, frozenset((folder.resolve(),)))]
    while waiting:
        inside, above = waiting.pop()
        for entry in inside.iterdir():
            if not entry.is_dir():
                found.extend([entry] if entry.is_file() or entry.is_symlink() else [])
            elif (real := entry.resolve()) not in above:  # else a link in a circle
                waiting.append((entry, above | {real}))
    return sorted(found)


def _list_table(
    table: Path, path_column: str, label_column: str, split_column: str | None, skip_bad_rows: bool
) -> _Listing:
    """Return the images that a table names."""
    columns = [path_column, label_column, *([split_column] if split_column else [])]
    hint = " Name yours: --path-column, --label-column; for texts give a model that reads them (hf:)."
    rows = read_rows(table, columns, hint=hint)
    parts: dict[str, Samples] = {}
    problems, skipped = [], []
    for number, row in enumerate(rows, start=1):
        name, label = row[path_column], label_name(row[label_column])
        part = str(row[split_column]).strip().lower() if split_column else "train"
        if label_name(name) is None or label is None:
            skipped.append((f"row {number}", f"has no {label_column if label is None else path_column}"))
        elif part not in PARTS:
            problems.append(f"row {number} has {part!r} in {split_column!r}; expected train, val or test")
        else:
            parts.setdefault(PARTS[part], []).append((table.parent / str(name), label))
    if not skip_bad_rows:
        problems += [f"{row} {reason}" for row, reason in skipped]
    if problems:
        raise DataError(
            _listed(f"table {str(table)!r} has {len(problems)} bad rows", problems)
            + "\nRepair or remove them; rows without a path or label can be left out: --skip-bad-rows "
            "(skip_bad_rows=True)."
        )
    return _Listing(parts, notes=unused_split(rows, split_column), skipped=tuple(skipped))


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
            _listed(f"{len(bad)} of {len(every)} images cannot be read", list(bad.values()))
            + "\nRepair or remove them, or leave them out: --skip-bad-images (skip_bad_images=True)."
        )
    kept: dict[str, Samples] = {part: [] for part in parts}
    for index, (part, path, label) in enumerate(every):
        if index not in bad:
            kept[part].append((path, label))
    return kept, [(str(every[index][1]), reason) for index, reason in bad.items()]


def _raise_problems(source: Path, listing: _Listing, parts: Mapping[str, Samples]) -> None:
    """Raise one error with all that is wrong with the classes of a data set."""
    problems = [f"class folder {folder!r} has no images" for folder in listing.empty]
    classes = {part: {label for _, label in samples} for part, samples in parts.items()}
    before = {part: {label for _, label in samples} for part, samples in listing.parts.items()}
    for part, labels in before.items():
        gone = sorted(labels - classes[part])
        problems += [f"class {label!r} of {part} has no readable image left" for label in gone]
    train = classes.get("train", set())
    if not any(classes.values()):
        problems.append("there are no images; expected a folder for each class, with its images inside")
    elif not train:
        problems.append("the train part has no images")
    elif len(train) == 1:
        problems.append(f"there is one class ({next(iter(train))!r}); expected at least two")
    for part, labels in classes.items():
        if part == "train" or not train:
            continue
        if not labels:
            problems.append(f"the {part} part has no images")
            continue
        for label in sorted(labels - train):
            close = did_you_mean(label, train, count=1)
            problems.append(f"class {label!r} is in {part} and not in train.{close}".rstrip("."))
        problems += [f"class {label!r} is in train and not in {part}" for label in sorted(train - labels)]
    if problems:
        raise DataError(_listed(f"data {str(source)!r} cannot be used", problems))


def _listed(summary: str, problems: Sequence[str]) -> str:
    shown = [f"\n  - {problem}" for problem in problems[:SHOWN]]
    more = f"\n  - and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{summary}:{''.join(shown)}{more}"


def is_image(path: Path) -> bool:
    """Return whether a path is a file, or a link to nothing, that is named like an image, and not hidden."""
    named = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))


def as_dict(data: ImageData) -> dict[str, Any]:
    """Return what a run keeps of its data, as plain data: classes, sizes, what was left out."""
    return {
        "classes": list(data.classes),
        "samples": {name: len(part) for name, part in data.parts().items()},
        "counts": {name: part.counts for name, part in data.parts().items()},
        "skipped": [list(entry) for entry in data.skipped],
        "notes": list(data.notes),
    }
