"""A lock between the processes of one machine that share a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from layerwise.errors import RunError, warn
from layerwise.files import is_special


class FileLock(AbstractContextManager[None]):
    """Held by one process at a time, for the body of each ``with``; freed by the system when that one dies.

    Not for nesting: leaving an inner ``with`` frees the lock.

    Args:
        file: an open file; what it holds is not touched.
    """

    def __init__(self, file: IO[Any]) -> None:
        self._file = file

    def __enter__(self) -> None:
        import fcntl  # POSIX only, so not at import time

        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_UN)


class JournalLock:
    """Optuna's lock of a journal file, freed by the system when the process that holds it dies.

    Optuna's own is a link beside the journal. One that a killed process left is waited for 30 seconds, and
    for ever where the journal's path is relative or was moved.

    Args:
        path: of the journal, which exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock; cut off half a line at the end, behind which Optuna would write.

        Warns:
            LayerwiseWarning: there was one, left by a full disk or a loss of power.
        """
        file = self._path.open("rb+")
        FileLock(file).__enter__()
        self._file = file
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            warn(f"the last line of {self._path} was cut short; the search goes on without it")
        return True

    def release(self) -> None:
        """Free the lock."""
        self._file.close()


@contextmanager
def lock_beside(storage: str | Path | None) -> Iterator[AbstractContextManager[None]]:
    """Yield a lock for those who share a journal file; one that never waits for a URL or memory (None).

    Raises:
        RunError: `storage` is there and no file; to read a device as a journal may never end.
    """
    if storage is None or "://" in str(storage):
        yield nullcontext()
        return
    if Path(storage).is_dir() or is_special(Path(storage)):
        raise RunError(
            f"the storage {str(storage)!r} is a folder, a device or a pipe. Expected the path of a journal "
            "file, or a URL that Optuna knows, such as sqlite:///search.db."
        )
    path = Path(f"{storage}.workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield FileLock(file)
