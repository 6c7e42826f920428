"""`Shelf`: a folder of columns on disk that runs and processes share, each whole or not there at all.

    FOLDER/<key>/meta.json     format, shape, type, rows, SHA-256 of the data
    FOLDER/<key>/rows.bin      the rows
    FOLDER/.part-<random>/     a column that somebody is filling; a lock file inside shows that he lives

A column is filled in a folder of its own and renamed when it is complete, so a reader never meets half a
column; of two processes that fill the same one, the first to finish publishes. The key is a hash of all
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
import shutil
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from layerwise.cache.store.column import Column, RowSpec
from layerwise.errors import CacheError
from layerwise.files import sha256, write_json

logger = logging.getLogger("layerwise.cache")

FORMAT = 1
_KEY = re.compile(r"[0-9a-f]{40}")
_STALE_S = 3600
_TEMPORARY = "layerwise-cache-"


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


@dataclass(frozen=True)
class _Filling:
    """A column that is being filled, with its open lock file, the name that it will have, and by whom."""

    column: weakref.ref[Column]
    lock: IO[bytes]
    key: str
    what: str
    process: int


class Shelf:
    """Columns on disk.

    Args:
        folder: where; made when the first column is. None is a temporary folder that is removed when the
            shelf is closed or the program ends; that of a program that was killed is removed by the next.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lasting = folder
        self._folder: Path | None = None
        self._temporary: dict[Path, tuple[int, IO[bytes]]] = {}  # who made it, and his lock
        self._filling: dict[Path, _Filling] = {}
        weakref.finalize(self, _remove_all, self._filling, self._temporary)

    @property
    def lasting(self) -> bool:
        """Whether what is published can be found by later runs."""
        return self._lasting is not None

    @property
    def root(self) -> Path:
        """The folder, whether it exists or not."""
        return self._folder or self._lasting or Path(tempfile.gettempdir())

    def _open(self) -> Path:
        if self._folder is None:
            if self._lasting is None:
                _remove_abandoned(Path(tempfile.gettempdir()), f"{_TEMPORARY}*")
                new = Path(tempfile.mkdtemp(prefix="layerwise-new-"))
                lock = _locked(new / "lock")
                self._folder = new.rename(new.with_name(new.name.replace("layerwise-new-", _TEMPORARY)))
                self._temporary[self._folder] = os.getpid(), lock
            else:
                self._lasting.mkdir(parents=True, exist_ok=True)
                self._folder = self._lasting
                remove_leftovers(self._folder)
        return self._folder

    def find(self, key: str, rows: int, spec: RowSpec) -> Column | None:
        """Return the published column `key`, read-only; None if there is none that can be trusted."""
        if self._lasting is None or not self._lasting.is_dir():
            return None
        folder = self._open() / key
        if not folder.is_dir():
            return None
        try:
            if not _problem(folder, rows, spec):
                return Column.opened(folder / "rows.bin", rows, spec)
        except (OSError, RuntimeError):  # torch's, of a file that is gone: another process removes it
            return None
        shutil.rmtree(folder, ignore_errors=True)
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
            OSError: there is no room for it.
        """
        part = self._open() / f".part-{secrets.token_hex(8)}"
        new = part.with_name(part.name.replace("part", "new"))
        new.mkdir()
        lock = _locked(new / "lock")
        os.rename(new, part)  # whoever sees it under this name sees it locked
        try:
            column = Column(rows, spec, file=part / "rows.bin")
        except BaseException:
            lock.close()
            shutil.rmtree(part, ignore_errors=True)
            raise
        self._filling[part] = _Filling(weakref.ref(column), lock, key, what, os.getpid())
        weakref.finalize(column, _remove, self._filling, part)  # its values are worth nothing any more
        return column

    def publish_complete(self) -> None:
        """Make the columns whose rows are all there visible to others."""
        if not self.lasting:
            return
        for part, filling in list(self._filling.items()):
            column = filling.column()
            if column is None or not filling.key or not column.is_whole:
                continue
            try:
                column.flush()
                meta = {
                    "format": FORMAT,
                    "shape": list(column.spec.shape),
                    "dtype": str(column.spec.dtype),
                    "stored": str(column.spec.stored),
                    "rows": len(column.filled),
                    "sha256": sha256(part / "rows.bin"),
                    "what": filling.what,
                }
                write_json(part / "meta.json", meta)
            except OSError as error:  # a full disk; this run has its values all the same
                logger.info("prefix cache: the values at %s are not kept for later: %s", filling.what, error)
                continue
            target = self.root / filling.key
            try:
                os.rename(part, target)  # fails if somebody else was first: his is as good
                (target / "lock").unlink(missing_ok=True)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
            filling.lock.close()
            del self._filling[part]

    def close(self) -> None:
        """Remove unfinished columns, and the folder if it is temporary."""
        _remove_all(self._filling, self._temporary)


def _remove(filling: dict[Path, _Filling], part: Path) -> None:
    one = filling.pop(part, None)
    if one is not None:
        one.lock.close()
        if one.process == os.getpid():  # a forked process has a copy of this, and the files are not its own
            shutil.rmtree(part, ignore_errors=True)


def _remove_all(filling: dict[Path, _Filling], folders: dict[Path, tuple[int, IO[bytes]]]) -> None:
    for part in list(filling):
        _remove(filling, part)
    for folder, (process, lock) in folders.items():
        lock.close()
        if process == os.getpid():
            shutil.rmtree(folder, ignore_errors=True)
    folders.clear()


def _locked(path: Path) -> IO[bytes]:
    """Return an open file with a lock that ends with this process, however it ends."""
    file = open(path, "wb")  # noqa: SIM115  (held open as long as the column is being filled)
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _abandoned(part: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False  # without locks there is no telling
    try:
        with open(part / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its owner lives, or publishes it just now
        return False
    return True


def _remove_abandoned(folder: Path, pattern: str) -> None:
    for part in folder.glob(pattern):
        if _abandoned(part):
            shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished columns of processes that are gone."""
    _remove_abandoned(folder, ".part-*")
    for new in folder.glob(".new-*"):  # killed in the instant between making and locking
        with contextlib.suppress(FileNotFoundError):
            if time.time() - new.stat().st_mtime > _STALE_S:
                shutil.rmtree(new, ignore_errors=True)


def entries(folder: Path) -> list[Entry]:
    """Return what is published in `folder`, oldest first; damaged columns count as ``"damaged"``."""
    found = []
    for path in folder.iterdir():
        if not _KEY.fullmatch(path.name):
            continue
        meta = _meta(path)
        data = path / "rows.bin"
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            found.append(
                Entry(
                    key=path.name,
                    nbytes=data.stat().st_size if data.is_file() else 0,
                    rows=meta["rows"] if meta else 0,
                    what=str(meta.get("what", "")) if meta else "damaged",
                    modified_s=path.stat().st_mtime,
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
                f"layerwise cache ls {folder}"
            )
        chosen = [e for e in present if any(e.key.startswith(key) for key in keys)]
    for entry in chosen:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder / entry.key)
    remove_leftovers(folder)
    return chosen


def _meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last one of JSON that is nested too deeply
        return None
    return meta if isinstance(meta, dict) and type(meta.get("rows")) is int else None


def _problem(folder: Path, rows: int, spec: RowSpec) -> str:
    meta = _meta(folder)
    if meta is None or meta.get("format") != FORMAT:
        return "unknown format"
    wanted = [list(spec.shape), str(spec.dtype), str(spec.stored), rows]
    if [meta.get(name) for name in ("shape", "dtype", "stored", "rows")] != wanted:
        return "other shape or type"
    data = folder / "rows.bin"
    if not data.is_file() or data.stat().st_size != max(rows * spec.row_bytes, 1):
        return "cut short"
    return "" if sha256(data) == meta.get("sha256") else "altered"
