"""`decide`: whether caching the frozen prefix pays, where to keep it, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from layerwise.cache.cutting.cut import Cut
from layerwise.cache.store.room import format_bytes
from layerwise.errors import percent

Storage = Literal["auto", "memory", "disk", "off"]

_MEMORY_BYTES_PER_S = 2e9  # gathering rows from memory or the page cache, cautiously
_DISK_BYTES_PER_S = 2e8  # an ordinary SSD when the page cache does not hold the file
_LEAST_GAIN = 1.05
_MOST_TOLD = 30
_BACKWARD = 2.0  # a backward pass costs about two forward passes


@dataclass(frozen=True)
class Decision:
    """What was chosen for one loader and one set of trainable parameters.

    Attributes:
        storage: ``"memory"``, ``"disk"`` or ``"off"``.
        reason: a sentence for people.
        bytes_per_sample: of what is stored.
        samples: number of samples (times views).
        prefix_frac: part of an uncached step that the frozen prefix takes, 0 to 1; measured on one batch.
        speedup: expected time of an uncached step over a cached one.
    """

    storage: Literal["memory", "disk", "off"]
    reason: str
    bytes_per_sample: int = 0
    samples: int = 0
    prefix_frac: float = 0.0
    speedup: float = 1.0

    @property
    def total_bytes(self) -> int:
        """Bytes for all samples."""
        return self.bytes_per_sample * self.samples


def decide(
    storage: Storage,
    *,
    bytes_per_sample: int,
    samples: int,
    batch: int,
    prefix_s: float,
    suffix_s: float,
    epochs: int | None,
    memory_bytes: int,
    disk_bytes: int,
    shared: bool = False,
    processes: int = 1,
) -> Decision:
    """Weigh time saved against bytes needed.

    With :math:`p` seconds for the prefix and :math:`s` for forward and backward of the rest, reading
    included, a cached step is :math:`(p + s) / s` times faster.

    Args:
        storage: what the user asked for. ``"memory"`` and ``"disk"`` are taken as they are, as long as
            they fit.
        bytes_per_sample: to store.
        samples: to store, views included.
        batch: samples in a step.
        prefix_s: forward time of the prefix for one batch, in seconds.
        suffix_s: forward time of the rest for one batch, in seconds; its backward is taken as twice that.
        epochs: how many epochs this cut will serve; None if unknown (several are assumed).
        memory_bytes: budget in memory.
        disk_bytes: budget on disk.
        shared: a folder was named to keep the cache for later runs.
        processes: that train together, each with a cache of its own. The samples change hands from epoch
            to epoch, so one process sees each of them only every so many epochs.

    Returns:
        The choice with its reason.
    """
    total = bytes_per_sample * samples
    after = suffix_s * (1 + _BACKWARD)
    fits_memory, fits_disk = total <= memory_bytes, total <= disk_bytes
    in_memory = storage == "memory" or (storage == "auto" and fits_memory and not shared)
    speed = _MEMORY_BYTES_PER_S if in_memory else _DISK_BYTES_PER_S
    speedup = (prefix_s + after) / max(after + bytes_per_sample * batch / speed, 1e-9)
    prefix_frac = prefix_s / max(prefix_s + after, 1e-9)

    def made(where: Literal["memory", "disk", "off"], reason: str) -> Decision:
        return Decision(where, reason, bytes_per_sample, samples, prefix_frac, speedup)

    size = f"{format_bytes(bytes_per_sample)} a sample, {format_bytes(total)} in all"
    if not total:
        size = "stored in an earlier pass, but for a few samples"
    share = percent(prefix_frac, 1, digits=0)
    gain = f"the frozen prefix is {share}% of a step; {_faster(speedup)} once cached"
    if storage == "off":
        return made("off", "switched off")
    if storage == "auto":
        if epochs is not None and epochs <= processes and not shared:
            who = "" if processes == 1 else f" by each of {processes} processes"
            return made("off", f"each sample is seen only once{who} with this cut, too seldom to be reused")
        if speedup < _LEAST_GAIN:
            return made("off", f"too little to gain: {gain} ({size})")
        if fits_memory and not shared:
            return made("memory", f"{gain} ({size}; budget {format_bytes(memory_bytes)})")
        if fits_disk:
            return made("disk", f"{gain} ({size})")
        return made(
            "off",
            f"{size} fit neither in the budget of memory ({format_bytes(memory_bytes)}) nor in that of files "
            f"({format_bytes(disk_bytes)}); {gain}. Give budget_bytes= or store bfloat16",
        )
    if storage == "memory" and not fits_memory:
        return made("off", f"{size} do not fit into the budget of {format_bytes(memory_bytes)}")
    if storage == "disk" and not fits_disk:
        return made("off", f"{size} do not fit on the disk, of which {format_bytes(disk_bytes)} may be used")
    return made(storage, f"asked for; {gain} ({size})")


def kept(cut: Cut, where: Literal["memory", "disk"], samples: int) -> Decision:
    """Return the decision for a phase whose values were stored before: nothing is left to weigh.

    The gain is told from floating-point operations, as nothing was timed.
    """
    after = (cut.flops - cut.skipped_flops) * (1 + _BACKWARD)
    whole = cut.skipped_flops + after
    speedup = whole / max(after, 1.0)
    gain = f"{_faster(speedup)} by its operations" if speedup < 100 else "hardly any work is left"
    reason = f"stored in an earlier pass; {gain}"
    return Decision(where, reason, 0, samples, cut.skipped_flops / max(whole, 1.0), speedup)


def _faster(speedup: float) -> str:
    if speedup > _MOST_TOLD:  # the loop itself then takes most of a step
        return f"over {_MOST_TOLD}x faster"
    if speedup >= _LEAST_GAIN:
        return f"about {speedup:.{1 if speedup < 10 else 0}f}x faster"
    return "hardly faster" if speedup * _LEAST_GAIN >= 1 else f"about {1 / speedup:.1f}x slower"


def process_count() -> int:
    """Return how many processes train together by torch's distributed package; 1 if this one is alone."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1
