"""History: one line of JSON for each epoch, with nothing in it that two equal runs would not share.

Wall-clock times differ between equal runs, so they stand in a file of their own (``timings.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerwise.files import write_text


class History:
    """The lines of a run so far, in memory and, with a path, in a file.

    Args:
        path: file of JSON lines; None keeps the history in memory only.
        entries: lines that are there already (a resumed run). The file is made to hold exactly them,
            since a killed run may have written one line more than its last checkpoint knows.
    """

    def __init__(self, path: Path | None, entries: list[dict[str, Any]] | None = None) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = list(entries or [])
        self._write()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line; the file is replaced whole, so it never ends in half a line."""
        self.entries.append(entry)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_text(self.path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in self.entries))


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a history file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
