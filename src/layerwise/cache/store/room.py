"""How much room there is in memory, and how to give some back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Return how much memory this process may still take.

    That is what control groups leave, divided among the processes that were started together on this
    machine (``torchrun`` and ``accelerate launch`` say how many).
    """
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP / "memory.max"
    text = limit.read_text().strip() if limit.is_file() else "max"
    if text != "max":
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])  # read files, given up as soon as room is needed
        free = min(free, max(int(text) - used, 0))
    together = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return free // max(int(together), 1) if together.isdigit() else free


def format_bytes(count: float) -> str:
    """Return a size for people.

    >>> format_bytes(1536), format_bytes(3 * 2**30)
    ('1.5 KB', '3.0 GB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KB", "MB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GB"


def give_back_memory() -> None:
    """Have the C library return to the system what was freed, where it can be asked to (glibc).

    Passes over large activations leave pieces between what is kept, too small for the next activation.
    """
    with contextlib.suppress(AttributeError, TypeError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)
