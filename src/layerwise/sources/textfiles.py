"""Rows of text data, by part: one table, a folder of tables, or a data set of Hugging Face `datasets`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, MissingExtraError, did_you_mean_beside, first_line, listed
from layerwise.sources.fetching import hub_if_found
from layerwise.sources.tables import PARTS, TABLES, Row, read_rows, read_text, require_columns

CONLL = (".conll", ".bio", ".iob", ".iob2")


@dataclass
class TextRows:
    """Rows by part, and what a data set knows of its own labels.

    Attributes:
        parts: ``"train"``, ``"val"``, ``"test"`` -> rows.
        label_names: column -> names of its class numbers, where the data set stores numbers.
        notes: which parts were taken under another name, or left out; for people.
    """

    parts: dict[str, list[Row]]
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_parts(
    source: str | Path,
    *,
    val: str | Path | None = None,
    test: str | Path | None = None,
    split_column: str | None = None,
    encoding: str = "utf-8",
) -> TextRows:
    """Return the rows of `source`, and of the `val` and `test` files where those are named.

    Args:
        source: a table (.csv, .tsv, .jsonl, .json, .parquet, .conll), a folder with one table for each
            part (``train.csv``, ``val.csv`` or ``validation.csv`` or ``dev.csv``, ``test.csv``), a folder
            that ``Dataset.save_to_disk`` wrote, or ``hf:ID`` of a data set on the hub (only data files
            are read; code that comes with a data set is not run).
        val: a table for validation.
        test: a table for testing.
        split_column: names the part of each row of `source`.
        encoding: of text files.

    Raises:
        DataError: nothing is there, or it is of another kind, or parts overlap.
        MissingExtraError: the package datasets is needed and not installed.
    """
    found = _read_source(source, encoding)
    for name, path in (("val", val), ("test", test)):
        if path is None:
            continue
        if name in found.parts:
            raise DataError(
                f"{str(source)!r} has a {name} part of its own, and {str(path)!r} is given too. Give one of "
                "them."
            )
        found.parts[name] = read_table(Path(path), encoding)
    if split_column is not None:
        if set(found.parts) != {"train"}:
            raise DataError(
                f"split_column is {split_column!r}, but the parts ({', '.join(found.parts)}) are files of "
                "their own. Leave it out."
            )
        found.parts = _split_by_column(str(source), found.parts["train"], split_column)
    found.parts = {name: found.parts[name] for name in ("train", "val", "test") if name in found.parts}
    if not found.parts.get("train"):
        raise DataError(
            f"data {str(source)!r} has no training rows (parts: {', '.join(found.parts) or 'none'})."
        )
    return found


def _split_by_column(source: str, rows: list[Row], column: str) -> dict[str, list[Row]]:
    require_columns(f"data {source!r}", list(rows[0]), {column: "--split-column"})
    parts: dict[str, list[Row]] = {}
    bad = []
    for number, row in enumerate(rows, start=1):
        part = PARTS.get(str(row[column]).strip().lower())
        if part is None:
            bad.append(f"row {number} has {row[column]!r} in {column!r}; expected train, val or test")
        else:
            parts.setdefault(part, []).append(row)
    if bad:
        raise DataError(
            listed(f"{len(bad)} of {len(rows)} rows of {source!r} are of no part", bad)
            + "\nRepair or remove them, or name the column that says it: --split-column."
        )
    return parts


def read_table(path: Path, encoding: str = "utf-8") -> list[Row]:
    """Return the rows of one file; of .conll files one row a sentence, with ``tokens`` and ``tags``."""
    if path.suffix.lower() in CONLL and path.is_file():
        return _read_conll(path, encoding)
    return read_rows(path, encoding=encoding)


def _read_source(source: str | Path, encoding: str) -> TextRows:
    text = str(source)
    if text.startswith("hf:"):
        return _read_hub(text.removeprefix("hf:"))
    path = Path(source)
    if path.is_file():
        return TextRows({"train": read_table(path, encoding)})
    if not path.is_dir():
        raise DataError(
            f"data {text!r} does not exist.{did_you_mean_beside(path)} Expected a table "
            f"({', '.join(TABLES)}), a folder of tables, or hf:ID for a data set on the hub."
        )
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(path)
    files: dict[str, Path] = {}
    notes = []
    for file in sorted(path.iterdir()):
        part = PARTS.get(file.stem.lower())
        if file.suffix.lower() not in (*TABLES, *CONLL):
            continue
        if part is None:
            notes.append(f"{file.name!r} beside the tables of the parts was left out")
            continue
        if part in files:
            raise DataError(
                f"data folder {text!r} has two tables for {part}: {files[part].name}, {file.name}."
            )
        files[part] = file
    if "train" not in files:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"data folder {text!r} has no train table (it holds {inside}). Expected train.csv (or "
            f"{', '.join(TABLES[1:])}) and optionally val and test beside it."
        )
    parts = {part: read_table(file, encoding) for part, file in files.items()}
    return TextRows(parts, notes=tuple(notes))


def _read_conll(path: Path, encoding: str) -> list[Row]:
    """Read one word a line, its tag in the last column, an empty line between sentences."""
    # Words may hold other blanks and line separators of Unicode.
    lines = read_text(path, encoding).split("\n")
    rows: list[Row] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        cells = re.split(r"[ \t]+", line.strip(" \t\r"))
        if not line.strip() or cells[0] == "-DOCSTART-":
            if tokens:
                rows.append({"tokens": tokens, "tags": tags})
                tokens, tags = [], []
        elif len(cells) < 2:
            raise DataError(f"line {number} of {str(path)!r} is {line!r}; expected a word and its tag.")
        else:
            tokens.append(cells[0])
            tags.append(cells[-1])
    if not rows:
        raise DataError(f"{str(path)!r} has no sentences; expected a word and its tag a line.")
    return rows


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "text", purpose) from error
    return datasets


def _read_saved(path: Path) -> TextRows:
    datasets = _datasets(f"The data set {str(path)!r}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # its formats raise all kinds
        raise DataError(
            f"data folder {str(path)!r} cannot be read by datasets ({first_line(error)})."
        ) from error
    return _from_datasets(loaded, str(path))


def _read_hub(name: str) -> TextRows:
    datasets = _datasets(f"The data set {name!r}")
    repository, _, subset = name.partition("@")
    try:
        with hub_if_found():
            loaded = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # downloads and formats raise all kinds
        raise DataError(
            f"data set 'hf:{name}' cannot be opened ({first_line(error)}). Expected an id on the hub (hf:ID "
            f"or hf:ID@SUBSET); without a network, give a folder or a table."
        ) from error
    return _from_datasets(loaded, f"hf:{name}")


def _from_datasets(loaded: Any, source: str) -> TextRows:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    parts: dict[str, list[Row]] = {}
    names: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for split in sorted(splits, key=lambda name: name.lower() not in PARTS):  # parts by their own names first
        data = splits[split]
        part = PARTS.get(split.lower().removesuffix("_matched"))  # MNLI's, of the same kind of text as train
        if part is None or part in parts:
            notes.append(f"split {split!r} of {source!r} is left out")  # "unsupervised" and the like
            continue
        if split.lower() not in PARTS:
            notes.append(f"{part}: the split {split!r}")
        parts[part] = data.to_list()
        for column, feature in data.features.items():
            inner = getattr(feature, "feature", feature)  # of a list of class numbers
            if hasattr(inner, "names"):
                names[column] = tuple(inner.names)
    if not parts:
        raise DataError(f"data set {source!r} has the splits {', '.join(splits)}; expected train.")
    return TextRows(parts, names, tuple(notes))
