"""Rows of a table file (CSV, TSV, JSON lines, Parquet) with the columns that are asked for."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.errors import (
    DataError,
    MissingExtraError,
    did_you_mean,
    did_you_mean_beside,
    named_kind,
    plural,
    shorten,
)

Row = dict[str, Any]
DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
TABLES = (*DELIMITERS, *JSON_LINES, *PARQUET)
# Names that people give to the parts of a split -> ours.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
    "testing": "test",
}
SHOWN = 10
# Python's reader stops at 131,072 characters a cell; longer ones are for the caller to judge.
CELL_LIMIT = 2**31 - 1


def read_rows(
    path: str | Path, columns: Sequence[str] | Mapping[str, str] = (), *, encoding: str = "utf-8"
) -> list[Row]:
    """Return the rows of the table at `path`, all columns of each.

    Args:
        path: ``.csv``, ``.tsv``, ``.jsonl`` (or ``.json`` that holds one list), ``.parquet``. CSV and TSV
            begin with a line of column names; where that has no comma (no tab) but a semicolon, a tab or a
            bar, cells are separated by that.
        columns: that must be there; see `require_columns`.
        encoding: of text files; a byte-order mark is skipped.

    Raises:
        DataError: the file is missing, of another kind, empty, not in `encoding`, lacks one of
            `columns` (the message names those there are), or has malformed rows (all are listed).
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        if path.is_dir():
            raise DataError(f"table {str(path)!r} is a folder; expected a file.")
        raise DataError(f"table {str(path)!r} does not exist.{did_you_mean_beside(path)}")
    if suffix in DELIMITERS:
        names, rows = _read_delimited(path, DELIMITERS[suffix], encoding)
    elif suffix in JSON_LINES:
        names, rows = _read_json(path, encoding)
    elif suffix in PARQUET:
        names, rows = _read_parquet(path)
    else:
        raise DataError(f"table {str(path)!r} ends in {path.suffix!r}; expected one of {', '.join(TABLES)}.")
    if not names:
        raise DataError(f"table {str(path)!r} is empty; expected rows of named columns.")
    require_columns(f"table {str(path)!r}", names, columns)
    if not rows:
        raise DataError(
            f"table {str(path)!r} has no rows; expected one a sample below a line of column names."
        )
    return rows


def unused_split(rows: Sequence[Row], split_column: str | None) -> tuple[str, ...]:
    """Return a note where a column ``split`` says train, val or test and no `split_column` is named."""
    values = {str(row.get("split", "")).strip().lower() for row in rows}
    if split_column is not None or not values <= set(PARTS):
        return ()
    return ("the column 'split' is not used; it is with --split-column split (split_column='split')",)


def require_columns(table: str, names: Sequence[str], columns: Sequence[str] | Mapping[str, str]) -> None:
    """Raise a `DataError` that names the columns there are, unless all of `columns` are among `names`.

    Args:
        table: for the message.
        names: of the columns there are.
        columns: that must be there; or a mapping of them to the options by which others are named.
    """
    missing = [column for column in columns if column not in names]
    if missing:
        hints = "".join(dict.fromkeys(did_you_mean(column, names, count=1) for column in missing))
        if isinstance(columns, Mapping):
            hints += f" Name yours: {', '.join(columns[column] for column in missing)}."
        raise DataError(
            f"{table} has no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, names)) or 'none'}.{hints}"
        )


def label_name(value: Any) -> str | None:
    """Return what a cell says as a label: no blanks around it, whole numbers without ".0"; None for nothing.

    >>> label_name(" cat "), label_name(10.0), label_name(float("nan"))
    ('cat', '10', None)
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers of a column with gaps
    return str(value).strip() or None


def unknown_class(label: str, part: str, known: Collection[str]) -> str:
    """Return what is wrong with a label of a part that is none of the classes of a model."""
    close = did_you_mean(label, known, count=1)
    return f"class {label!r} of {part} is none of the model's ({shorten(known)}).{close}".rstrip(".")


def read_text(path: Path, encoding: str) -> str:
    """Return the text of a table file without its byte-order mark; see `read_rows` for the errors."""
    content = path.read_bytes()
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    try:
        return content.decode(encoding)
    except LookupError as error:
        raise DataError(
            f"encoding {encoding!r} is not known; expected e.g. utf-8, latin-1, cp1252."
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        name = "utf-16" if utf16 else "cp1252"
        raise DataError(
            f"table {str(path)!r} is not {error.encoding.replace('-sig', '')}: line {line} has the byte "
            f"0x{content[error.start]:02x}. Save it as UTF-8; of texts layerwise fit and predict take "
            f"another: --encoding {name} (encoding={name!r}{'' if utf16 else ', Western Windows'})."
        ) from error


def _read_delimited(path: Path, delimiter: str, encoding: str) -> tuple[list[str], list[Row]]:
    text = read_text(path, encoding)
    delimiter = _evident_delimiter(text, delimiter)
    rows: list[Row] = []
    problems = []
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            for cells in reader:
                if len(cells) == len(names):
                    rows.append(dict(zip(names, cells, strict=True)))
                elif cells:  # an empty line is no row
                    problems.append(f"line {reader.line_num} has {plural(len(cells), 'cell')}")
        except csv.Error as error:
            raise DataError(
                f"table {str(path)!r} is malformed at line {reader.line_num}: {error}. Check its quotes."
            ) from error
    if len(set(names)) < len(names):
        raise DataError(f"table {str(path)!r} has two columns of one name: {', '.join(names)}. Rename one.")
    if problems:
        raise DataError(
            f"table {str(path)!r} has {plural(len(names), 'column')} ({', '.join(names)}) but "
            f"{shorten(problems, SHOWN)}. Quote cells that hold {delimiter!r}."
        )
    return names, rows


def _evident_delimiter(text: str, delimiter: str) -> str:
    """Return `delimiter`, or the other one that alone stands in the line of column names."""
    header = text.partition("\n")[0]
    if delimiter in header:
        return delimiter
    return next((other for other in (";", "\t", "|") if other in header), delimiter)


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(CELL_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json(path: Path, encoding: str) -> tuple[list[str], list[Row]]:
    text = read_text(path, encoding)
    if text.lstrip().startswith("["):
        try:
            entries = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:
            raise DataError(f"table {str(path)!r} is not JSON: {error}.") from error
        kind = "entry"
    else:
        entries, kind = [], "line"
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                entries.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"table {str(path)!r} is not JSON lines: line {number}: {error}. "
                    f"Expected one object a line."
                ) from error
    problems = [
        f"{kind} {number} is {named_kind(entry)}" for number, entry in entries if not isinstance(entry, dict)
    ]
    if problems:
        raise DataError(f"table {str(path)!r}: expected objects, but {shorten(problems, SHOWN)}.")
    names = list(dict.fromkeys(name for _, entry in entries for name in entry))
    return names, [{name: entry.get(name) for name in names} for _, entry in entries]


def _read_parquet(path: Path) -> tuple[list[str], list[Row]]:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")  # it has no type information
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("pyarrow", "text", "Reading Parquet files") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"table {str(path)!r} is not a whole Parquet file ({error}).") from error
    return list(table.column_names), table.to_pylist()
