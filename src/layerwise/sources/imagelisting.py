"""`Listing`: which images a folder or a table names, and what is wrong with it, before any is opened."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import DataError, did_you_mean, listed, plural
from layerwise.sources.imagefile import EXTENSIONS
from layerwise.sources.tables import PARTS, label_name, read_rows, unknown_class, unused_split

Samples = list[tuple[Path, str]]


@dataclass
class Listing:
    """What a source names, before any file is opened.

    Attributes:
        parts: (path, label) of each sample, by part.
        problems: for which the source cannot be used.
        notes: what was chosen, for people.
        skipped: (place, reason) of what was left out.
    """

    parts: dict[str, Samples]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


def list_folders(root: Path) -> Listing:
    """Return the images of a folder, a class a subfolder, in parts where there are part folders."""
    folders = _folders_in(root)
    part_folders = _part_folders(root, folders)
    parts: dict[str, Samples] = {}
    problems = [f"{str(link)!r} is a link to nothing" for link in _broken_links(root, *part_folders)]
    others = 0
    outside = sum(is_image(entry) for folder in {root, *part_folders} for entry in folder.iterdir())
    for folder, part in part_folders.items():
        samples: Samples = []
        for class_folder in _folders_in(folder):
            files = files_in(class_folder)
            images = [file for file in files if is_image(file)]
            others += len(files) - len(images)
            samples += [(file, class_folder.name) for file in images]
            if not images:
                problems.append(
                    f"class folder {str(class_folder)!r} has no images; put some there, or remove it"
                )
            if not is_text(class_folder):
                problems.append(
                    f"the path {str(class_folder)!r} is no text in {sys.getfilesystemencoding()}, in which "
                    "file names are read here; rename it, or set PYTHONUTF8=1 if it is UTF-8"
                )
        parts[part] = samples
    if not any(parts.values()) and any(is_image(entry) for entry in root.iterdir()):
        raise DataError(
            f"data folder {str(root)!r} holds images itself; expected a folder for each class, with its "
            f"images inside. Move them into class folders, or give a table of paths and labels."
        )
    notes = []
    if others:
        notes.append(
            f"{plural(others, 'file that is no image was', 'files that are no images were')} left out"
        )
    if outside:
        were = plural(
            outside, "image outside of the class folders was", "images outside of the class folders were"
        )
        notes.append(f"{were} left out")
    if root not in part_folders:
        notes += [
            f"{folder.name!r} beside the folders of the parts was left out"
            for folder in folders
            if folder not in part_folders
        ]
    return Listing(parts, tuple(problems), tuple(notes))


def _folders_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _part_folders(root: Path, folders: Sequence[Path]) -> dict[Path, str]:
    """Return which of `folders` hold a part, and which; `root` itself as train where none does.

    Raises:
        DataError: two hold the same part, or all hold some, and none train.
    """
    found = {folder: PARTS[folder.name.lower()] for folder in folders if folder.name.lower() in PARTS}
    names = list(found.values())
    if both := [folder.name for folder, part in found.items() if names.count(part) > 1]:
        raise DataError(
            f"data folder {str(root)!r} has two folders for one part ({', '.join(both)}); "
            f"expected one of each of train, val and test."
        )
    if "train" in names:
        return found
    if found and len(found) == len(folders):
        raise DataError(
            f"data folder {str(root)!r} has {', '.join(f.name for f in folders)} but no train folder. "
            f"Add one, or give the folder above the classes."
        )
    return {root: "train"}


def _broken_links(*folders: Path) -> list[Path]:
    """Return the links to nothing in some folders, where a class or a part may have been."""
    entries = [entry for folder in dict.fromkeys(folders) for entry in sorted(folder.iterdir())]
    return [entry for entry in entries if entry.is_symlink() and not (entry.exists() or entry.suffix)]


def files_in(folder: Path) -> list[Path]:
    """Return all files under `folder`, sorted; links to folders are followed, dangling ones are files."""
    found: list[Path] = []
    here = folder.resolve()
    waiting = [(folder, frozenset((here, *here.parents)))]
    while waiting:
        inside, above = waiting.pop()
        for entry in inside.iterdir():
            if not entry.is_dir():
                found.extend([entry] if entry.is_file() or entry.is_symlink() else [])
            elif (real := entry.resolve()) not in above:  # else a link in a circle
                waiting.append((entry, above | {real, *real.parents}))
    return sorted(found)


def list_table(
    table: Path, path_column: str, label_column: str, split_column: str | None, skip_bad_rows: bool
) -> Listing:
    """Return the images that a table names."""
    columns = {
        path_column: "--path-column (for texts give a model that reads them, hf:)",
        label_column: "--label-column",
        **({split_column: "--split-column"} if split_column else {}),
    }
    rows = read_rows(table, columns)
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
            listed(f"table {str(table)!r} has {plural(len(problems), 'bad row')}", problems)
            + "\nRepair or remove them; rows without a path or label can be left out: --skip-bad-rows "
            "of layerwise fit (skip_bad_rows=True)."
        )
    return Listing(parts, notes=unused_split(rows, split_column), skipped=tuple(skipped))


def list_paths(table: Path, path_column: str) -> list[Path]:
    """Return the images that a table names, whatever else it says of them.

    Args:
        table: the file.
        path_column: holds their paths.

    Raises:
        DataError: it cannot be read, or has rows without a path.
    """
    rows = read_rows(table, {path_column: "--path-column"})
    without = [number for number, row in enumerate(rows, start=1) if label_name(row[path_column]) is None]
    if without:
        problems = [f"row {number} has no {path_column}" for number in without]
        raise DataError(listed(f"table {str(table)!r} has {plural(len(without), 'bad row')}", problems))
    return [table.parent / str(row[path_column]) for row in rows]


def raise_problems(
    source: Path, listing: Listing, parts: Mapping[str, Samples], known: Collection[str]
) -> None:
    """Raise one error with all that is wrong with the classes of a data set; `known` are those of a model."""
    problems = [*listing.problems]
    classes = {part: {label for _, label in samples} for part, samples in parts.items()}
    before = {part: {label for _, label in samples} for part, samples in listing.parts.items()}
    for part, labels in before.items():
        gone = sorted(labels - classes[part])
        problems += [f"class {label!r} of {part} has no readable image left" for label in gone]
    train = classes.get("train", set())
    if not any(classes.values()):
        if not problems:
            missing = "a folder for each class, with its images inside"
            missing = "rows with a path and a label" if source.is_file() else missing
            problems.append(f"there are no images; expected {missing}")
    elif not train:
        problems.append("the train part has no images")
    elif len(train) == 1 and not known:
        problems.append(
            f"there is one class ({next(iter(train))!r}); expected at least two. Add images of another"
        )
    for part, labels in classes.items():
        if known:
            problems += [unknown_class(label, part, known) for label in sorted(labels.difference(known))]
        if part == "train" or not train:
            continue
        if not labels:
            problems.append(f"the {part} part has no images")
        elif not known:
            for label in sorted(labels - train):
                close = did_you_mean(label, train, count=1)
                problems.append(f"class {label!r} is in {part} and not in train.{close}".rstrip("."))
            problems += [f"class {label!r} is in train and not in {part}" for label in sorted(train - labels)]
    if problems:
        raise DataError(listed(f"data {str(source)!r} cannot be used", problems))


def is_text(path: Path) -> bool:
    """Return whether a path can be written down: Python reads bytes of other encodings as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


def is_image(path: Path) -> bool:
    """Return whether a path is a file, or a link to nothing, that is named like an image, and not hidden."""
    named = path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    return named and (path.is_file() or (path.is_symlink() and not path.exists()))
