"""What devices do in other ways than a CPU: they work beside Python, and not all have float64."""

from __future__ import annotations

import time

import torch


def clock_s(device: torch.device) -> float:
    """Return a clock's time in seconds, once `device` has done all that it was given.

    A GPU works beside Python: a clock that does not wait tells how long it took to ask.
    """
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest type of real numbers that a device has: float64, on Apple's GPUs float32."""
    return torch.float32 if device.type == "mps" else torch.float64
