"""A column gives back what was put in, in memory and on disk."""

from __future__ import annotations

import contextlib
import resource
import signal
from types import SimpleNamespace

import pytest
import torch

from layerwise.cache.store.column import Column, RowSpec, reserve_file
from layerwise.errors import CacheError

SPEC = RowSpec((1, 3, 2), torch.float32, torch.float32)


@pytest.mark.parametrize("disk", [False, True])
def test_put_and_get(tmp_path, disk) -> None:
    # rows come back in the order asked for, bit for bit, and know whether they are there
    column = Column(5, SPEC, file=tmp_path / "rows.bin" if disk else None)
    values = torch.randn(3, 1, 3, 2)
    column.put(torch.tensor([4, 0, 2]), values)
    assert column.missing(torch.tensor([0, 1, 2])).tolist() == [False, True, False]
    assert torch.equal(column.get(torch.tensor([2, 4])), values[[2, 0]])
    assert column.where == ("disk" if disk else "memory")


def test_what_is_handed_out_is_a_copy() -> None:
    # an in-place operation of the trained part must not reach the cache
    column = Column(2, SPEC)
    values = torch.randn(2, 1, 3, 2)
    column.put(torch.tensor([0, 1]), values)
    column.get(torch.tensor([0, 1])).zero_()
    assert torch.equal(column.get(torch.tensor([0, 1])), values)


def test_a_file_is_read_by_another_column(tmp_path) -> None:
    values = torch.randn(4, 1, 3, 2)
    column = Column(4, SPEC, file=tmp_path / "rows.bin")
    column.put(torch.arange(4), values)
    column.flush()
    again = Column(4, SPEC, file=tmp_path / "rows.bin", is_filled=True)
    assert torch.equal(again.get(torch.arange(4)), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_space_when_asked(dtype) -> None:
    column = Column(2, RowSpec((3,), torch.float32, dtype))
    column.put(torch.tensor([0, 1]), torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]]))
    got = column.get(torch.tensor([1]))
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor([[0.1, 0.2, 0.3]]), rtol=1e-2)
    assert not torch.equal(got, torch.tensor([[0.1, 0.2, 0.3]]))
    assert column.nbytes == 12


def test_float16_refuses_what_does_not_fit() -> None:
    column = Column(1, RowSpec((1,), torch.float32, torch.float16))
    with pytest.raises(CacheError, match=r"7e\+04 does not fit into float16"):
        column.put(torch.tensor([0]), torch.tensor([[7e4]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_infinite_stays_and_what_is_not_does_not_become_it(dtype) -> None:
    # masks hold -inf, or the least float32, which lies beyond the least bfloat16 but for rounding
    infinite = torch.tensor([-torch.inf, torch.inf, torch.nan, 1.0])
    column = Column(2, RowSpec((4,), torch.float32, dtype))
    column.put(torch.tensor([0]), infinite[None])
    assert torch.equal(column.get(torch.tensor([0]))[0].nan_to_num(7.0), infinite.nan_to_num(7.0))
    least = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).min
    column.put(torch.tensor([1]), torch.tensor([[least, least * -1, -torch.inf, 0.0]]))
    got = column.get(torch.tensor([1]))[0]
    assert got.isfinite().tolist() == [True, True, False, True]
    assert got[:2].tolist() == [torch.finfo(dtype).min, torch.finfo(dtype).max]


def test_no_room_raises_before_anything_is_written(tmp_path) -> None:
    # reserving fails with an OSError; a mapped write on a full disk would kill the process
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        with pytest.raises(OSError, match=r"large|space"):
            Column(10_000, SPEC, file=tmp_path / "rows.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_system_without_posix_fallocate_is_asked_for_room_first(monkeypatch, tmp_path, free) -> None:
    # macOS and Windows; of the disk on which the file is, and of no other
    asked = []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=free)

    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("shutil.disk_usage", usage)
    expected = contextlib.nullcontext() if free else pytest.raises(OSError, match="No space left")
    with open(tmp_path / "rows.bin", "wb") as file, expected:
        reserve_file(file.fileno(), 1000, tmp_path)
    assert (tmp_path / "rows.bin").stat().st_size == (1000 if free else 0)
    assert asked == [tmp_path]


def test_rows_without_numbers(tmp_path) -> None:
    # a data set may have none for a tensor
    spec = RowSpec((0,), torch.float32, torch.float32)
    column = Column(3, spec, file=tmp_path / "rows.bin")
    column.put(torch.arange(3), torch.empty(3, 0))
    column.flush()
    again = Column(3, spec, file=tmp_path / "rows.bin", is_filled=True)
    assert again.get(torch.tensor([2, 0])).shape == (2, 0)


def test_whole_until_a_row_is_forgotten() -> None:
    column = Column(3, RowSpec((2,), torch.float32, torch.float32))
    assert not column.is_whole
    column.put(torch.arange(3), torch.ones(3, 2))
    assert column.is_whole
    column.forget(torch.tensor([1]))
    assert not column.is_whole
    column.put(torch.tensor([1]), torch.ones(1, 2))
    assert column.is_whole
