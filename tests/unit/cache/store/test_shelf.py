"""Files of a cache are whole or not there, found by what they depend on, and refused when damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from layerwise.cache.store import shelf as shelf_module
from layerwise.cache.store.column import Column, RowSpec
from layerwise.cache.store.shelf import Shelf, entries, remove
from layerwise.errors import CacheError

SPEC = RowSpec((2,), torch.float32, torch.float32)
KEY = "a" * 40
VALUES = torch.arange(6.0).reshape(3, 2)


def published(folder: Path, key: str = KEY) -> Column:
    shelf = Shelf(folder)
    column = shelf.create(key, 3, SPEC, "layer3")
    column.put(torch.arange(3), VALUES)
    shelf.publish_complete()
    return column


def test_a_complete_column_is_found_by_the_next_run(tmp_path) -> None:
    published(tmp_path)
    found = Shelf(tmp_path).find(KEY, 3, SPEC)
    assert found is not None
    assert torch.equal(found.get(torch.arange(3)), VALUES)
    assert bool(found.filled.all())
    assert [p.name for p in tmp_path.iterdir()] == [KEY]


def test_an_incomplete_column_is_not_found(tmp_path) -> None:
    shelf = Shelf(tmp_path)
    shelf.create(KEY, 3, SPEC, "layer3").put(torch.arange(2), VALUES[:2])
    shelf.publish_complete()
    assert Shelf(tmp_path).find(KEY, 3, SPEC) is None
    shelf.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "rows", "spec"),
    [
        ("truncate", 3, SPEC),
        ("flip", 3, SPEC),
        ("no meta", 3, SPEC),
        ("bad meta", 3, SPEC),
        ("old format", 3, SPEC),
        ("none", 4, SPEC),
        ("none", 3, RowSpec((2,), torch.float64, torch.float64)),
    ],
)
def test_what_cannot_be_trusted_is_refused_and_removed(tmp_path, damage, rows, spec) -> None:
    # cut short, altered, without or with a foreign description, of another shape
    published(tmp_path)
    data, meta = tmp_path / KEY / "rows.bin", tmp_path / KEY / "meta.json"
    if damage == "truncate":
        os.truncate(data, 8)
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[5] ^= 1
        data.write_bytes(content)
    elif damage == "no meta":
        meta.unlink()
    elif damage == "bad meta":
        meta.write_text("[1]")
    elif damage == "old format":
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 0}))
    assert Shelf(tmp_path).find(KEY, rows, spec) is None
    assert not (tmp_path / KEY).exists()


def test_a_column_of_another_user_who_keeps_it_closed_is_listed(tmp_path, monkeypatch) -> None:
    # and those beside it
    published(tmp_path)
    published(tmp_path, "b" * 40)
    look = Path.stat

    def closed(path: Path, **options: bool) -> os.stat_result:
        if path.parent.name == KEY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    assert {(entry.key, entry.nbytes) for entry in entries(tmp_path)} == {(KEY, 0), ("b" * 40, 24)}


def a_file(path: Path, folder: Path) -> None:
    path.touch()


def a_link_to_nowhere(path: Path, folder: Path) -> None:
    path.symlink_to(folder / "nowhere")


def a_link_to_itself(path: Path, folder: Path) -> None:
    path.symlink_to(path)


def a_link_to_a_folder(path: Path, folder: Path) -> None:
    (folder / "notes").mkdir()
    path.symlink_to(folder / "notes")


STRANGE = pytest.mark.parametrize("make", [a_file, a_link_to_nowhere, a_link_to_itself, a_link_to_a_folder])


@STRANGE
def test_what_is_no_folder_is_listed_and_removed(tmp_path, make) -> None:
    # and the columns beside it; what a link leads to is left alone
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    published(folder, "b" * 40)
    make(folder / KEY, elsewhere)
    kept = list(elsewhere.iterdir())
    assert [(entry.what, entry.nbytes) for entry in entries(folder) if entry.key == KEY] == [("damaged", 0)]
    assert len(remove(folder)) == 2
    assert list(folder.iterdir()) == []
    assert list(elsewhere.iterdir()) == kept


@STRANGE
def test_what_is_no_folder_is_replaced(tmp_path, make) -> None:
    # else the value of this name would be computed in each run
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    folder.mkdir()
    make(folder / KEY, elsewhere)
    assert Shelf(folder).find(KEY, 3, SPEC) is None
    published(folder)
    assert Shelf(folder).find(KEY, 3, SPEC) is not None


@pytest.mark.parametrize("name", ["meta.json", "rows.bin", ""])
def test_what_another_process_removes_meanwhile_is_not_found(tmp_path, monkeypatch, name) -> None:
    # `layerwise cache rm` in another terminal, between any two looks at the folder
    published(tmp_path)
    look = shelf_module._can_be_trusted

    def looked_at(folder: Path, rows: int, spec: RowSpec) -> bool:
        if name:
            (folder / name).unlink()
            return look(folder, rows, spec)
        is_good = look(folder, rows, spec)
        shutil.rmtree(folder)
        return is_good

    monkeypatch.setattr(shelf_module, "_can_be_trusted", looked_at)
    assert Shelf(tmp_path).find(KEY, 3, SPEC) is None


@pytest.mark.parametrize("rows", ["many", [3], None, float("inf"), True])
def test_a_description_whose_rows_are_no_number_is_listed_as_damaged(tmp_path, rows) -> None:
    published(tmp_path)
    meta = tmp_path / KEY / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"rows": rows}))
    assert [(entry.rows, entry.what) for entry in entries(tmp_path)] == [(0, "damaged")]


def test_a_list_leaves_out_what_another_process_removes_meanwhile(tmp_path, monkeypatch) -> None:
    published(tmp_path)
    published(tmp_path, "b" * 40)
    read, gone = shelf_module._meta, tmp_path / KEY

    def read_late(folder: Path) -> object:
        shutil.rmtree(gone, ignore_errors=True)
        return read(folder)

    monkeypatch.setattr(shelf_module, "_meta", read_late)
    assert [entry.key for entry in entries(tmp_path)] == ["b" * 40]
    monkeypatch.undo()
    listed = entries(tmp_path)
    monkeypatch.setattr(shelf_module, "entries", lambda folder: listed)
    shutil.rmtree(tmp_path / ("b" * 40))
    assert remove(tmp_path) == listed


def test_a_disk_that_is_full_at_the_end_costs_the_name_and_not_the_values(tmp_path, monkeypatch) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shelf_module, "write_json", full)
    shelf = Shelf(tmp_path)
    column = shelf.create(KEY, 3, SPEC, "x")
    column.put(torch.arange(3), VALUES)
    shelf.publish_complete()
    assert torch.equal(column.get(torch.arange(3)), VALUES)
    assert Shelf(tmp_path).find(KEY, 3, SPEC) is None
    monkeypatch.undo()
    shelf.publish_complete()  # it is tried again after the next epoch
    assert Shelf(tmp_path).find(KEY, 3, SPEC) is not None


def test_two_who_fill_the_same_column(tmp_path) -> None:
    # the first to finish publishes, the second keeps working with its own rows, nothing is left over
    first, second = Shelf(tmp_path), Shelf(tmp_path)
    one, two = first.create(KEY, 3, SPEC, "x"), second.create(KEY, 3, SPEC, "x")
    one.put(torch.arange(3), VALUES)
    two.put(torch.arange(3), VALUES)
    first.publish_complete()
    second.publish_complete()
    assert [p.name for p in tmp_path.iterdir()] == [KEY]
    assert torch.equal(two.get(torch.arange(3)), VALUES)


def test_leftovers_of_a_killed_process_are_removed(tmp_path) -> None:
    # a process killed while it fills leaves a part; the next one to open the folder removes it, and only
    # it: a part whose owner lives stays
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from layerwise.cache.store.shelf import Shelf\n"
        "from layerwise.cache.store.column import RowSpec\n"
        "shelf = Shelf(Path(sys.argv[1]))\n"
        "column = shelf.create('b' * 40, 3, RowSpec((2,), torch.float32, torch.float32), 'x')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob(".part-*"))) == 1
    alive = Shelf(tmp_path)
    kept = alive.create(KEY, 3, SPEC, "x")
    assert len(list(tmp_path.glob(".part-*"))) == 1
    another = Shelf(tmp_path)
    other = another.create("c" * 40, 3, SPEC, "x")
    assert len(list(tmp_path.glob(".part-*"))) == 2
    del kept, other


@pytest.mark.parametrize("lasting", [True, False])
def test_a_column_that_nobody_reads_any_more_is_removed(lasting, tmp_path) -> None:
    # its values are stale: others are made in its place, once an epoch perhaps
    shelf = Shelf(tmp_path if lasting else None)
    column = shelf.create(KEY, 3, SPEC, "x")
    assert len(list(shelf.root.rglob("rows.bin"))) == 1
    del column
    assert not list(shelf.root.rglob("rows.bin"))
    shelf.close()


def test_an_unfinished_column_goes_with_its_shelf(tmp_path) -> None:
    # although it is held and could be filled: nothing of it will be published any more
    shelf = Shelf(tmp_path)
    held = shelf.create(KEY, 3, SPEC, "x")
    shelf.close()
    assert list(tmp_path.iterdir()) == []
    del held


@pytest.mark.parametrize(("age_s", "stays"), [(10, True), (7200, False)])
def test_a_folder_without_a_lock_is_removed_when_it_is_old(tmp_path, age_s, stays) -> None:
    # its owner was killed between making and locking it, or is about to lock it
    new = tmp_path / ".part-1"
    new.mkdir()
    os.utime(new, (time.time() - age_s,) * 2)
    remove(tmp_path)
    assert new.exists() == stays


def test_without_file_locks_the_columns_of_others_are_left_alone(tmp_path, monkeypatch) -> None:
    # on Windows nobody can tell whether their owner lives
    monkeypatch.setitem(sys.modules, "fcntl", None)
    shelf = Shelf(tmp_path)
    column = shelf.create(KEY, 3, SPEC, "x")
    remove(tmp_path)
    column.put(torch.arange(3), VALUES)
    shelf.publish_complete()
    assert [entry.key for entry in entries(tmp_path)] == [KEY]


def test_the_temporary_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch) -> None:
    # It may hold half of the disk. That of a process that lives stays, and so does what has no lock.
    monkeypatch.setattr(shelf_module.tempfile, "tempdir", str(tmp_path))
    living = Shelf(None)
    held = living.create("", 3, SPEC, "layer3")
    child = os.fork()
    if child == 0:
        killed = Shelf(None)
        column = killed.create("", 3, SPEC, "layer3")
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (tmp_path / "layerwise-part-other").mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    shelf = Shelf(None)
    column = shelf.create("", 3, SPEC, "layer3")
    assert set(tmp_path.iterdir()) == {living.root, shelf.root, tmp_path / "layerwise-part-other"}
    del held, column
    for one in (living, shelf):
        one.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "layerwise-part-other"]


def test_temporary_shelf_leaves_nothing() -> None:
    shelf = Shelf(None)
    shelf.create(KEY, 3, SPEC, "x")
    folder = shelf.root
    assert folder.is_dir()
    shelf.close()
    assert not folder.exists()


def test_the_command_that_lists_keys_can_be_pasted(tmp_path) -> None:
    published(tmp_path / "my cache")
    with pytest.raises(CacheError, match=r"layerwise cache ls '/.*/my cache'$"):
        remove(tmp_path / "my cache", ["zz"])


def test_list_and_remove(tmp_path) -> None:
    published(tmp_path)
    published(tmp_path, "b" * 40)
    (tmp_path / "notes.txt").write_text("not ours")
    assert {(e.key, e.rows, e.nbytes, e.what) for e in entries(tmp_path)} == {
        (KEY, 3, 24, "layer3"),
        ("b" * 40, 3, 24, "layer3"),
    }
    with pytest.raises(CacheError, match=r"no cached value .* begins with 'zz'"):
        remove(tmp_path, ["zz"])
    assert [e.key for e in remove(tmp_path, ["aaa"])] == [KEY]
    assert [e.key for e in remove(tmp_path)] == ["b" * 40]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("lasting", [True, False])
def test_a_forked_process_that_ends_leaves_the_files_of_the_one_that_fills_them(tmp_path, lasting) -> None:
    # The child drops its copies of the column and the shelf; the parent goes on and publishes.
    shelf = Shelf(tmp_path if lasting else None)
    column = shelf.create(KEY if lasting else "", 3, SPEC, "layer3")
    child = os.fork()
    if child == 0:
        del column
        shelf.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert shelf.root.exists()
    assert len(list(shelf.root.rglob("rows.bin"))) == 1
    column.put(torch.arange(3), VALUES)
    shelf.publish_complete()
    assert not lasting or Shelf(tmp_path).find(KEY, 3, SPEC) is not None
    shelf.close()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"what": "é", "rows": 3'])
def test_a_description_that_cannot_be_read_is_damaged(tmp_path, text) -> None:
    # One that is nested too deeply to be read is listed, refused and removed like one that is cut short.
    published(tmp_path)
    (tmp_path / KEY / "meta.json").write_text(text, encoding="utf-8")
    assert [entry.what for entry in entries(tmp_path)] == ["damaged"]
    assert Shelf(tmp_path).find(KEY, 3, SPEC) is None
    assert not (tmp_path / KEY).exists()


def test_names_outside_of_ascii_are_read_where_the_locale_knows_none(tmp_path) -> None:
    # A column of a module with such a name is found, and not taken for damaged.
    shelf = Shelf(tmp_path)
    column = shelf.create(KEY, 3, SPEC, "Größe")
    column.put(torch.arange(3), VALUES)
    shelf.publish_complete()
    code = "import sys; from pathlib import Path; from layerwise.cache.store.shelf import entries\n"
    code += "print(ascii(entries(Path(sys.argv[1]))[0].what))"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=plain, capture_output=True, text=True
    )
    assert told.stdout.strip() == ascii("Größe"), told.stderr
