"""How much memory a piece of work takes at most."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """The highest use of memory in the body of `peak_memory`.

    Attributes:
        bytes: of the whole process on a CPU, of torch's tensors on a GPU; 0 until the body is left.
        exact: False where the system can only tell the highest use since the process began.
    """

    bytes: int = 0
    exact: bool = True


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest use of memory in the body, in bytes.

    On a GPU what torch has allocated. On a CPU the resident memory of the process, Python and libraries
    included: on Linux its high-water mark is set back at the start; elsewhere the mark since the process
    began is given, which may be older than the body.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    peak.exact = _reset_high_water()
    yield peak
    peak.bytes = _high_water()


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return int(psutil.Process().memory_info().peak_wset)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: the portable figure below
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
