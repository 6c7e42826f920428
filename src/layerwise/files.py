"""Files that are written whole or not at all: under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Every unfinished file or folder begins like this, so that what a kill left behind is recognised."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the system says that there is no room for a file: on the disk, in the quota, in one file."""


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make `path` hold what `write` puts into the path it is given, or leave it as it was.

    The temporary file lies in the same folder, so that the rename is one operation of the file system.
    Where `path` is a link, the file it points to is written; an existing file keeps its permissions, and a
    new one has those that the system gives new files, whatever `write` chooses.

    Raises:
        OSError: the disk is full (the room on it is told) or the folder cannot be written; the temporary
            file is removed. Or `path` is a device or a pipe, which a rename would put an end to.
    """
    path = Path(os.path.realpath(path))
    if is_special(path):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and not a file", str(path))
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    temporary = _temporary(path)
    try:
        with _named(path, temporary):
            # nobody may read meanwhile what only the owner may
            temporary.touch(mode=0o666 if mode is None else 0o600)
            mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
            write(temporary)
            sync(temporary)
            temporary.chmod(mode)  # safetensors makes a file of its own, that only the owner may read
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses to remove even what is not there
            temporary.unlink()
    sync(path.parent)


def is_special(path: Path) -> bool:
    """Return whether `path` is there and neither a file nor a folder: a device, a pipe, a socket."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder `path` hold what `fill` puts into the folder it is given, or leave it as it was.

    A folder that is there already is moved aside first and removed last: a kill between the two leaves
    no `path`, never a mixed one. Of several writers at once each puts its whole folder there, and that of
    the last one stays. Where `path` is a link, the folder it points to is written. The files in it have the
    permissions that the system gives new files, whatever `fill` chooses.

    Raises:
        OSError: as for `write_file`; or `path` is a file.
    """
    path = Path(os.path.realpath(path))
    if _is_no_folder(path):
        raise NotADirectoryError(errno.ENOTDIR, "there is a file, and no folder", str(path))
    temporary = _temporary(path)
    try:
        with _named(path, temporary):
            temporary.mkdir(parents=True)
            fill(temporary)
            usual = stat.S_IMODE(temporary.stat().st_mode) & 0o666
            for file in temporary.iterdir():
                if file.is_file():
                    file.chmod(usual)
                sync(file)
            sync(temporary)
        while not _put(temporary, path):
            pass  # another writer was faster between the two renames, so there is a folder to replace again
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(path.parent)


def _is_no_folder(path: Path) -> bool:
    """Return whether something else than a folder is there, by one look: other writers move it aside."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return False


@contextlib.contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Give an error of the system the name that the caller knows; of a full disk also the room on it.

    What safetensors tells of the system is made such an error.
    """
    try:
        yield
    except Exception as error:
        told = re.search(r"(?:\(os error |Os { code: )(\d+)", str(error))  # the latter before safetensors 0.6
        if type(error).__name__ == "SafetensorError" and told:
            found = OSError(int(told[1]), os.strerror(int(told[1])))
        elif isinstance(error, OSError) and error.errno is not None:  # one with a text alone would lose it
            found = error
        else:
            raise
        if found.filename is None or str(found.filename).startswith(str(temporary)):
            found.filename = str(path)
        if found.errno in FULL and found.strerror == os.strerror(found.errno):  # else it was told before
            found.strerror = f"{found.strerror} ({free_room(path)} free there)"
        raise found from None if found is error else error


def free_disk_bytes(path: Path) -> int:
    """Return the free space of the disk on which `path` is, or will be."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def free_room(path: Path) -> str:
    """Return `free_disk_bytes` for messages."""
    return f"{free_disk_bytes(path) / 2**20:,.0f} MiB"


def _temporary(path: Path) -> Path:
    """Return a new path beside `path`, with its suffix; the whole of a long name would be too long."""
    return path.parent / f"{TEMPORARY}{uuid.uuid4().hex}{path.suffix[:16]}"


def _put(temporary: Path, path: Path) -> bool:
    """Rename a folder to `path`, what is there moved aside; return whether nobody else came in between."""
    replaced = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}-replaced"
    with contextlib.suppress(FileNotFoundError):  # none is there, or another writer has it aside
        path.rename(replaced)
    try:
        temporary.rename(path)
        done = True
    except BaseException as error:
        if not isinstance(error, OSError) or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            if replaced.exists():
                replaced.rename(path)
            raise
        done = False
    shutil.rmtree(replaced, ignore_errors=True)
    return done


def write_text(path: Path, text: str) -> None:
    """Make `path` hold `text`, in UTF-8, or leave it as it was."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Make `path` hold `data` as indented JSON, or leave it as it was."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def with_nulls(data: Any) -> Any:
    """Return plain data with None for each number that is NaN or infinite, which JSON cannot hold.

    >>> with_nulls({"loss": float("nan"), "rows": [1, 2.5]})
    {'loss': None, 'rows': [1, 2.5]}
    """
    if isinstance(data, dict):
        return {key: with_nulls(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [with_nulls(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files and folders that a kill left in `folder`; return their names."""
    found = sorted(folder.glob(f"{TEMPORARY}*"))
    for path in found:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    return [path.name for path in found]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
