"""`Shelf`: a folder of columns on disk that runs and processes share, each whole or not there at all.

    FOLDER/<key>/meta.json     format, shape, type, rows, SHA-256 of the data
    FOLDER/<key>/rows.bin      the rows
    FOLDER/.part-<random>/     what one process is filling; a lock file inside shows that it lives

A column is filled in a folder of its own, there, and moved when it is complete, so a reader never meets half
a column; of two processes that fill the same one, the first to finish publishes. The key is a hash of all
that the values depend on, so a stale column is simply not found. What is found is checked against its
SHA-256 once, and removed if it was cut short or altered.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from layerwise.cache.remedies import STORE_ELSEWHERE
from layerwise.cache.store.column import Column, RowSpec
from layerwise.errors import CacheError
from layerwise.files import FULL, free_room, sha256, write_json

logger = logging.getLogger("layerwise.cache")

FORMAT = 1
_KEY = re.compile(r"[0-9a-f]{40}")
_STALE_S = 3600
_LOCK = "lock"
_PART = ".part-"
_TEMPORARY = "layerwise-part-"


class NoPlaceError(CacheError):
    """Values cannot be stored: the disk is full, or the folder no place for files."""


@dataclass(frozen=True)
class Entry:
    """One published column, for listings.

    Attributes:
        key: its name.
        nbytes: size on disk.
        rows: number of samples.
        what: where in which model it was taken.
        modified_s: time of publication, seconds since the epoch.
    """

    key: str
    nbytes: int
    rows: int
    what: str
    modified_s: float


class _Workroom:
    """A folder for the columns that this process fills; it goes with the process, however that ends.

    Args:
        parent: where; made if need be.
        prefix: of its name. Folders of this prefix whose processes are gone are removed.

    Attributes:
        folder: its path.
        filling: the columns -> their folder in it, the name that they will have, and what they are.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent, prefix)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self.filling: WeakKeyDictionary[Column, tuple[Path, str, str]] = WeakKeyDictionary()
        self._process = os.getpid()
        self._lock = open(self.folder / "unlocked", "wb")  # noqa: SIM115  (open as long as the process lives)
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(self.folder / "unlocked", self.folder / _LOCK)  # under this name it is always locked

    def remove(self, folder: Path) -> None:
        """Remove one of the folders in it; a forked process has a copy of this, but the files are not its."""
        if self._process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove it with all that is in it."""
        self.filling.clear()
        self._lock.close()
        self.remove(self.folder)


class Shelf:
    """Columns on disk.

    Args:
        folder: where; made when the first column is. None is a temporary folder that is removed when the
            shelf is closed or the program ends; that of a program that was killed is removed by the next.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lasting = folder
        self._work: _Workroom | None = None

    @property
    def lasting(self) -> bool:
        """Whether what is published can be found by later runs."""
        return self._lasting is not None

    @property
    def root(self) -> Path:
        """The folder, whether it exists or not."""
        if self._lasting is not None:
            return self._lasting
        return Path(tempfile.gettempdir()) if self._work is None else self._work.folder

    def find(self, key: str, rows: int, spec: RowSpec) -> Column | None:
        """Return the published column `key`, read-only; None if there is none that can be trusted."""
        if self._lasting is None or not os.path.lexists(folder := self._lasting / key):
            return None
        try:
            if _can_be_trusted(folder, rows, spec):
                return Column(rows, spec, file=folder / "rows.bin", is_filled=True)
        except (OSError, RuntimeError):  # torch's, of a file that is gone: another process removes it
            return None
        with contextlib.suppress(OSError):
            _delete(folder)
        return None

    def create(self, key: str, rows: int, spec: RowSpec, what: str) -> Column:
        """Return a new column in a file of its own, not yet to be seen by others.

        The file goes with the column, unless it was published before.

        Args:
            key: under which it is to be found once it is complete; ``""`` if never.
            rows: number of samples.
            spec: of one row.
            what: where in which model it is taken.

        Raises:
            NoPlaceError: there is no room for it, or no file can be made there.
        """
        try:
            if self._work is None:
                self._work = _Workroom(self.root, _PART if self.lasting else _TEMPORARY)
                weakref.finalize(self, self._work.close)
            folder = self._work.folder / secrets.token_hex(8)
            folder.mkdir()
            try:
                column = Column(rows, spec, file=folder / "rows.bin")
            except BaseException:
                self._work.remove(folder)
                raise
        except OSError as error:
            place = self._lasting or Path(tempfile.gettempdir())
            room = f" ({free_room(place)} free there)" if error.errno in FULL else ""
            raise NoPlaceError(
                f"nothing can be stored in {str(place)!r}: {error.strerror}{room}{STORE_ELSEWHERE}"
            ) from error
        self._work.filling[column] = folder, key, what
        weakref.finalize(column, self._work.remove, folder)  # its values are worth nothing any more
        return column

    def publish_complete(self) -> None:
        """Make the columns whose rows are all there visible to others."""
        if self._lasting is None or self._work is None:
            return
        for column, (folder, key, what) in list(self._work.filling.items()):
            if not key or not column.is_whole:
                continue
            try:
                column.flush()
                meta = {
                    "format": FORMAT,
                    "shape": list(column.spec.shape),
                    "dtype": str(column.spec.dtype),
                    "stored": str(column.spec.stored),
                    "rows": len(column.filled),
                    "sha256": sha256(folder / "rows.bin"),
                    "what": what,
                }
                write_json(folder / "meta.json", meta)
            except OSError as error:  # a full disk; this run has its values all the same
                logger.info("prefix cache: the values at %s are not kept for later: %s", what, error)
                continue
            try:
                os.rename(folder, self._lasting / key)  # fails if somebody else was first: his is as good
            except OSError:
                self._work.remove(folder)
            del self._work.filling[column]
        if not self._work.filling:
            self.close()

    def close(self) -> None:
        """Remove unfinished columns, and the folder if it is temporary."""
        if self._work is not None:
            self._work.close()
            self._work = None


def _is_abandoned(folder: Path) -> bool:
    with contextlib.suppress(ImportError, OSError):  # without locks there is no telling; or its owner lives
        import fcntl

        try:
            with open(folder / _LOCK, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except FileNotFoundError:  # its owner is about to lock it, or was killed in that instant
            return time.time() - folder.stat().st_mtime > _STALE_S
    return False


def remove_leftovers(parent: Path, prefix: str = _PART) -> None:
    """Delete unfinished columns of processes that are gone."""
    for folder in parent.glob(f"{prefix}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def entries(folder: Path) -> list[Entry]:
    """Return what is published in `folder`, oldest first; damaged columns count as ``"damaged"``."""
    found = []
    for path in folder.iterdir():
        if not _KEY.fullmatch(path.name):
            continue
        meta = _meta(path)
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            found.append(
                Entry(
                    key=path.name,
                    nbytes=_file_bytes(path / "rows.bin"),
                    rows=meta.get("rows", 0),
                    what=str(meta.get("what", "")) if meta else "damaged",
                    modified_s=path.lstat().st_mtime,
                )
            )
    return sorted(found, key=lambda entry: (entry.modified_s, entry.key))


def remove(folder: Path, keys: list[str] | None = None) -> list[Entry]:
    """Delete published columns (all of them, or those whose key begins with one of `keys`), and leftovers.

    Returns:
        What was deleted.

    Raises:
        CacheError: one of `keys` fits no column; nothing is deleted then.
    """
    present = entries(folder)
    chosen = present
    if keys is not None:
        unknown = [key for key in keys if not key or not any(e.key.startswith(key) for e in present)]
        if unknown:
            raise CacheError(
                f"no cached value in {folder} has a key that begins with {unknown[0]!r}. List them: "
                f"layerwise cache ls {shlex.quote(str(folder))}"
            )
        chosen = [e for e in present if any(e.key.startswith(key) for key in keys)]
    for entry in chosen:
        with contextlib.suppress(FileNotFoundError):
            _delete(folder / entry.key)
    remove_leftovers(folder)
    return chosen


def _file_bytes(path: Path) -> int:
    """Return the size of a file; 0 for what is none, or lies in a folder that this user may not read."""
    with contextlib.suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def _delete(path: Path) -> None:
    """Delete a column; of what is a link, or no folder, that alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _meta(folder: Path) -> dict[str, Any]:
    """Return what is told of a published column; nothing of a damaged one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last one of JSON that is nested too deeply
        return {}
    return meta if isinstance(meta, dict) and type(meta.get("rows")) is int else {}


def _can_be_trusted(folder: Path, rows: int, spec: RowSpec) -> bool:
    meta, data = _meta(folder), folder / "rows.bin"
    wanted = [FORMAT, list(spec.shape), str(spec.dtype), str(spec.stored), rows]
    if [meta.get(name) for name in ("format", "shape", "dtype", "stored", "rows")] != wanted:
        return False
    is_complete = data.is_file() and data.stat().st_size == max(rows * spec.row_bytes, 1)
    return is_complete and sha256(data) == meta.get("sha256")
