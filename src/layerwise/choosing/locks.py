"""A lock between the processes of one machine that share a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any


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


@contextmanager
def lock_beside(storage: str | Path | None) -> Iterator[AbstractContextManager[None]]:
    """Yield a lock for those who share a journal file; one that never waits for a URL or memory (None)."""
    if storage is None or "://" in str(storage):
        yield nullcontext()
        return
    path = Path(f"{storage}.workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield FileLock(file)
