"""History: one line of JSON for each epoch, with nothing in it that two equal runs would not share.

Wall-clock times differ between equal runs, so they stand in a file of their own (``timings.json``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import RunError, plural
from layerwise.files import with_nulls, write_text

_NOTES = 3
"""Notes of epochs that a result repeats; the file has all."""


class History:
    """The lines of a run so far, in memory and, with a path, in a file.

    Args:
        path: file of JSON lines; None keeps the history in memory only.
        entries: lines that are there already (a resumed run). The file is made to hold exactly them,
            since a killed run may have written one line more than its last checkpoint knows.

    Raises:
        RunError: `path` is a folder.
    """

    def __init__(self, path: Path | None, entries: list[dict[str, Any]] | None = None) -> None:
        if path is not None and path.is_dir():
            raise RunError(
                f"{path} is a folder, and the history of a run is a file. Move it away and resume."
            )
        self.path = path
        self.entries: list[dict[str, Any]] = list(entries or [])
        self._write()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line; the file is replaced whole, so it never ends in half a line."""
        self.entries.append(entry)
        self._write()

    def values(self, metric: str) -> list[float]:
        """Return a validation metric of all epochs."""
        return [entry[name_of(metric)] for entry in self.entries]

    def notes(self) -> list[str]:
        """Return what was noted in the epochs: the first notes, and how many more there are."""
        found = [entry["note"] for entry in self.entries if "note" in entry]
        more = len(found) - _NOTES
        return found[:_NOTES] + (
            [f"the same kind of note in {plural(more, 'more epoch')}"] if more > 0 else []
        )

    def _write(self) -> None:
        if self.path is not None:
            lines = (json.dumps(with_nulls(e), ensure_ascii=False, allow_nan=False) for e in self.entries)
            write_text(self.path, "".join(line + "\n" for line in lines))


def name_of(metric: str) -> str:
    """Return what a validation metric is called in a line: the loss stands beside that of training."""
    return "val_loss" if metric == "loss" else metric


def not_finite(values: Mapping[str, float], where: str) -> str:
    """Return a note that names the numbers that are NaN or infinite; ``""`` where there are none.

    >>> not_finite({"loss": float("nan"), "accuracy": 0.5}, "validation of epoch 2")
    'validation of epoch 2: loss is nan (null in the files). Look for NaN in these data, or lower lr'

    Args:
        values: metric name -> number.
        where: the data that they were measured on, and when.
    """
    found = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not found:
        return ""
    return f"{where}: {', '.join(found)} (null in the files). Look for NaN in these data, or lower lr"


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
