"""`Column`: one cached value of every sample, in memory or in a memory-mapped file.

A row is one sample's value in the physical order in which it was computed; all rows of a column have one
shape. Reading gathers rows into a new tensor, so what the training step does to it in place never reaches
the cache.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from layerwise.cache.comparing import is_near, same_bits
from layerwise.errors import CacheError

Where = Literal["memory", "disk"]
_CPU = torch.device("cpu")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class RowSpec:
    """Shape and type of one row.

    Attributes:
        shape: of a row.
        dtype: of the values as they are computed and handed out.
        stored: of the values as they are kept; another one than `dtype` is not exact.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        return torch.Size(self.shape).numel() * self.stored.itemsize


class Column:
    """Rows of one value; filled in any order.

    Args:
        rows: how many samples there can be.
        spec: of one row.
        file: of a column on disk; None keeps it in memory. The whole file is reserved at once, so a full
            disk shows here and not in the middle of an epoch.
        is_filled: a former column filled the file; it is only read.

    Attributes:
        spec: of one row.
        filled: for each row whether it holds its value; bool, (rows,).

    Raises:
        OSError: the file cannot be made or reserved.
    """

    def __init__(
        self, rows: int, spec: RowSpec, *, file: Path | None = None, is_filled: bool = False
    ) -> None:
        self.spec, self._file = spec, file
        self.filled = torch.full((rows,), is_filled)
        self._whole: bool | None = None  # None: not known since rows changed
        shape = (rows, *spec.shape)
        if file is None:
            self._data = torch.empty(shape, dtype=spec.stored)
            return
        if not is_filled:
            with open(file, "wb") as made:
                reserve_file(made.fileno(), max(rows * spec.row_bytes, 1), file.parent)
        size = torch.Size(shape).numel()
        self._data = torch.from_file(str(file), not is_filled, size, dtype=spec.stored).view(shape)

    @property
    def where(self) -> Where:
        """Where the rows are kept."""
        return "memory" if self._file is None else "disk"

    @property
    def nbytes(self) -> int:
        """Bytes reserved for all rows."""
        return len(self.filled) * self.spec.row_bytes

    def missing(self, rows: torch.Tensor) -> torch.Tensor:
        """Return for each of `rows` (int64) whether its value is not there yet."""
        return ~self.filled[rows]

    @property
    def is_whole(self) -> bool:
        """Whether all rows are filled."""
        if self._whole is None:
            self._whole = bool(self.filled.all())
        return self._whole

    def has(self, rows: torch.Tensor) -> bool:
        """Return whether all of `rows` (int64) are filled."""
        return self.is_whole or not self.missing(rows).any()

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Store one value a row.

        Args:
            rows: which; int64, (n,).
            values: (n, *shape) in the computed type.

        Raises:
            CacheError: a value is too large for the type in which it is to be stored.
        """
        if self.spec.stored != values.dtype:
            values = narrowed(values, self.spec.stored)
        _words(self._data)[rows] = _words(values.to(self._data.device))
        self.filled[rows] = True
        self._whole = None

    def forget(self, rows: torch.Tensor) -> None:
        """Take the values of `rows` (int64) for missing."""
        self.filled[rows] = False
        self._whole = None

    def get(self, rows: torch.Tensor, device: torch.device = _CPU) -> torch.Tensor:
        """Return a new tensor (n, *shape) on `device` with the values of `rows` (int64, all filled)."""
        values = self._data.index_select(0, rows)
        if device.type != "cpu" or self.spec.stored != self.spec.dtype:
            values = values.to(device).to(self.spec.dtype)
        return values

    def agrees(self, rows: torch.Tensor, values: torch.Tensor, *, exact: bool) -> bool:
        """Return whether values just computed are what is stored of them, but for what storing rounds off.

        Args:
            rows: int64, (n,); those that are not filled are left out.
            values: of `rows`; (n, *shape).
            exact: to the bit, and not but for rounding.

        Raises:
            CacheError: a value is too large for the type in which it is stored.
        """
        if values.dtype != self.spec.dtype:
            return False
        there = self.filled[rows]
        values = values[there]
        if self.spec.stored != values.dtype:
            values = narrowed(values, self.spec.stored)
        return (same_bits if exact else is_near)(values.cpu(), self._data.index_select(0, rows[there]))

    def flush(self) -> None:
        """Write what is still in the page cache to the disk, where the column is."""
        assert self._file is not None
        with open(self._file, "rb+") as file:
            os.fsync(file.fileno())


def _words(values: torch.Tensor) -> torch.Tensor:
    """Return a view as integers that torch writes to by index, of types of which it does not."""
    kind = values.dtype
    is_bare = kind.itemsize == 1 if kind.is_floating_point else not (kind.is_signed or kind == torch.bool)
    return values.view(_WORDS[kind.itemsize]) if is_bare else values


def reserve_file(descriptor: int, size: int, folder: Path) -> None:
    """Give an open, empty file in `folder` `size` bytes of real disk space.

    Writing to a mapped file on a full disk would kill the process; reserving first raises instead.

    Raises:
        OSError: there is no room, or the file may not grow so large.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    if shutil.disk_usage(folder).free < size:  # macOS and Windows have no posix_fallocate
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.truncate(descriptor, size)


def narrowed(values: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Return floating-point values in a narrower type; what is finite stays so.

    Raises:
        CacheError: one of them is too large for it, and not only by rounding.
    """
    narrow = values.to(stored)
    if not narrow.isinf().any():
        return narrow
    finite, limit = values.isfinite(), torch.finfo(stored)
    largest = float(values.abs().masked_fill(~finite, 0).max())
    if largest > limit.max * (1 + limit.eps):
        name = str(stored).removeprefix("torch.")
        raise CacheError(
            f"a frozen activation of {largest:.3g} does not fit into {name} (largest value {limit.max:g}). "
            f"Store it {'as bfloat16, or ' if stored == torch.float16 else ''}in its own type."
        )
    return narrow.clamp(limit.min, limit.max).where(finite, narrow)
