"""Memory, files, progress lines and predictions: the small parts around the loop."""

import errno
import gc
import io
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from file_limit import file_limit
from layerwise import files
from layerwise.errors import RunError, TrainingError
from layerwise.training import history, kept_weights, memory, run_folder
from layerwise.training.guard import explained
from layerwise.training.memory import peak_memory
from layerwise.training.progress import Reporter, format_rates, format_seconds


def test_the_peak_of_memory_is_that_of_the_body() -> None:
    # 200 MB that are held for a moment are seen; without them the peak is lower.
    cpu = torch.device("cpu")
    gc.collect()  # of other tests' models, which would count
    with peak_memory(cpu) as before:
        torch.ones(1000).sum()
    with peak_memory(cpu) as peak:
        torch.ones(50_000_000).sum()
    assert peak.bytes - before.bytes > 150_000_000
    if peak.exact:  # Linux: the mark is set back
        with peak_memory(cpu) as after:
            torch.ones(1000).sum()
        assert peak.bytes - after.bytes > 100_000_000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    # A writer that fails half-way leaves the old content and no temporary file.
    path = tmp_path / "file"
    files.write_text(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_file(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    # As root it would be: /dev/null, for the whole machine. A link to one, like /dev/stdout, is none either.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(OSError, match=r"it is a device or a pipe, and not a file: .*pipe'"):
            files.write_text(path, "text")
    assert pipe.is_fifo()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_in_a_folder_that_is_not_there_is_told_by_the_folder(tmp_path: Path) -> None:
    # The error names the folder, and not the temporary file that nobody asked for.
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere'$"):
        files.write_text(tmp_path / "nowhere" / "plan.yaml", "text")


def test_a_written_file_keeps_its_link_and_its_permissions(tmp_path: Path) -> None:
    # A private file stays private, also while it is written, and a link still points to it.
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    modes = []

    def write(path: Path) -> None:
        path.write_text("new")
        modes.append(path.stat().st_mode & 0o777)

    files.write_file(link, write)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert [*modes, real.stat().st_mode & 0o777] == [0o600, 0o600]
    real.chmod(0o444)
    files.write_text(real, "newer")
    assert (real.read_text(), real.stat().st_mode & 0o777) == ("newer", 0o444)


def test_a_new_file_may_be_read_by_those_who_may_read_new_files(tmp_path: Path) -> None:
    # safetensors writes files for the owner alone; a run's weights are for whoever may read the run.
    before = os.umask(0o027)
    try:
        kept_weights.save_weights(torch.nn.Linear(2, 2), tmp_path / "model.safetensors")
        files.write_text(tmp_path / "text", "new")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640, 0o640]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not its temporary name, which is gone by then: on a read-only disk, say.
    def refuse(self: Path, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", self)  # as touch does

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        files.write_text(tmp_path / "history.jsonl", "text")
    assert caught.value.filename == str(tmp_path / "history.jsonl")


def test_a_file_that_a_full_disk_cuts_short_is_named(tmp_path: Path) -> None:
    # the system does not say which file it was
    def fill(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        files.write_file(tmp_path / "plan.yaml", fill)
    assert caught.value.filename == str(tmp_path / "plan.yaml")


def test_a_full_disk_is_told_with_the_room_on_it(tmp_path: Path) -> None:
    # once, by the folder's own name, also where a file in it was written whole
    def fill(folder: Path) -> None:
        files.write_file(folder / "a", cut_short)

    def cut_short(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = re.escape(f": '{tmp_path / 'new'}'")
    for write in (
        lambda: files.write_folder(tmp_path / "new", fill),
        lambda: files.write_file(tmp_path / "new", cut_short),
    ):
        with pytest.raises(OSError, match=rf"No space left on device \([\d,]+ MiB free there\){told}$"):
            write()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_that_safetensors_tells_is_an_error_of_the_system(tmp_path: Path) -> None:
    # a real limit of the system; safetensors' own error names no file
    def save(path: Path) -> None:
        save_file({"big": torch.zeros(300_000)}, path / "a" if path.is_dir() else path)

    with file_limit(400_000):
        for write in (files.write_file, files.write_folder):
            with pytest.raises(
                OSError, match=r"File too large \([\d,]+ MiB free there\): '.*weights'$"
            ) as caught:
                write(tmp_path / "weights", save)
            assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_files_of_a_new_folder_have_the_usual_permissions(tmp_path: Path) -> None:
    # Whatever the writer of each chose: safetensors the owner alone.
    def fill(folder: Path) -> None:
        (folder / "a").touch(mode=0o600)
        (folder / "b").write_text("b")
        (folder / "in").mkdir()

    before = os.umask(0o027)
    try:
        files.write_folder(tmp_path / "new", fill)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert modes == {"a": 0o640, "b": 0o640, "in": 0o750}


def test_a_folder_is_not_written_over_a_file(tmp_path: Path) -> None:
    # It was put away under a temporary name.
    (tmp_path / "mine").write_text("text")
    with pytest.raises(NotADirectoryError, match=f"there is a file, and no folder: '{tmp_path / 'mine'}'"):
        files.write_folder(tmp_path / "mine", lambda path: (path / "a").write_text("new"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mine", "text")]


@pytest.mark.parametrize("name", ["é" * 120 + ".html", "x" * 255, "." + "x" * 254])
def test_a_name_as_long_as_the_system_takes_is_written(tmp_path: Path, name: str) -> None:
    # The temporary name is not longer than the one that was asked for.
    files.write_text(tmp_path / name, "text")
    files.write_folder(tmp_path / "in" / name, lambda path: (path / "a").write_text("text"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", name])


def test_a_link_among_the_leftovers_is_removed_and_what_it_points_to_stays(tmp_path: Path) -> None:
    # Of a folder, too.
    (tmp_path / "mine").mkdir()
    (tmp_path / f"{files.TEMPORARY}a").symlink_to(tmp_path / "mine")
    assert files.remove_leftovers(tmp_path) == [f"{files.TEMPORARY}a"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_lines_of_a_history_end_where_json_ends_them(tmp_path: Path) -> None:
    # Names may hold what Unicode takes for the end of a line.
    entry = {"phase": "a\u2028b\x85c\x1cd", "loss": 1.0}
    history.History(tmp_path / "history.jsonl", [entry, entry])
    assert history.read_history(tmp_path / "history.jsonl") == [entry, entry]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The old folder is moved aside first: where the second rename fails, it comes back.
    folder = tmp_path / "run"
    files.write_folder(folder, lambda path: (path / "a").write_text("old"))
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        files.write_folder(folder, lambda path: (path / "a").write_text("new"))
    assert (folder / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    # and a new one leaves nothing
    calls.append(folder)
    del calls[1:]
    with pytest.raises(OSError, match="Input/output"):
        files.write_folder(tmp_path / "new", lambda path: (path / "a").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("moment", [1, 2])
def test_a_folder_is_put_in_place_though_another_writer_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, moment: int
) -> None:
    # The other one comes before our first rename, or between the two; ours is the last, and stays.
    folder, rename, calls = tmp_path / "run", Path.rename, []

    def fill(text: str) -> Callable[[Path], object]:
        return lambda path: [(path / name).write_text(text) for name in "ab"]

    def raced(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == moment:
            monkeypatch.setattr(Path, "rename", rename)
            files.write_folder(folder, fill("theirs"))
        return rename(self, target)

    if there:
        files.write_folder(folder, fill("old"))
    monkeypatch.setattr(Path, "rename", raced)
    files.write_folder(folder, fill("ours"))
    assert [(folder / name).read_text() for name in "ab"] == ["ours", "ours"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_vanishes_before_it_is_moved_aside_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another writer has it aside; what we put there will be replaced by theirs in turn.
    folder, rename = tmp_path / "run", Path.rename
    files.write_folder(folder, lambda path: (path / "a").write_text("old"))

    def raced(self: Path, target: Path) -> Path:
        if self == folder:
            shutil.rmtree(folder)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", raced)
    files.write_folder(folder, lambda path: (path / "a").write_text("new"))
    assert (folder / "a").read_text() == "new"


def test_many_writers_of_one_folder_leave_it_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def write(number: int) -> None:
        text = str(number)
        files.write_folder(folder, lambda path: [(path / name).write_text(text) for name in "ab"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(80)))
    assert (folder / "a").read_text() == (folder / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_json_files_hold_no_nan(tmp_path: Path) -> None:
    # NaN is no JSON; it is refused instead of written.
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_a_disk_that_fills_up_elsewhere_is_explained_too() -> None:
    # The history or the weights may be what does not fit any more.
    with pytest.raises(RunError, match=r"after step 7.*Make room"), explained(lambda: 7, out=None):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), explained(lambda: 7, out=None):
        raise FileNotFoundError(2, "a missing image is another matter")
    with pytest.raises(TrainingError, match="at step 8"), explained(lambda: 7, out=None):
        raise MemoryError


def entry(epoch: int) -> dict:
    return {
        "epoch": epoch,
        "phase": "head",
        "steps": 10,
        "train_loss": 0.5,
        "val_loss": 0.6,
        "accuracy": 0.75,
        "rates": {"stem": 0.0, "head": 1e-3},
    }


def test_progress_is_one_line_an_epoch_outside_of_a_terminal() -> None:
    # Loss, metric, rates and time left; nothing between epochs.
    text = io.StringIO()
    reporter = Reporter(enabled=True, total_steps=20, total_epochs=2, console=Console(file=text, width=200))
    with reporter:
        reporter.step(epoch=0, phase="head", step=1, loss=0.7, rates={"head": 1e-3})
        reporter.epoch(entry(0), monitor="accuracy", steps_left=10, seconds=5.0)
        reporter.epoch(entry(1), monitor="accuracy", steps_left=0, seconds=5.0)
    first, second = text.getvalue().splitlines()
    assert first == (
        "epoch 1/2  phase head  loss 0.5000  val_loss 0.6000  accuracy 0.7500  lr 1.0e-03  5.0 s  5 s left"
    )
    assert "left" not in second


def test_a_small_loss_is_not_shown_as_none() -> None:
    # Targets in a large unit (metres for micrometres) have losses of any size, and perfect fits tiny ones.
    text = io.StringIO()
    small = {**entry(0), "train_loss": 3.318e-5, "val_loss": 4e-9, "accuracy": 0.0}
    with Reporter(enabled=True, total_steps=1, total_epochs=1, console=Console(file=text)) as reporter:
        reporter.epoch(small, monitor="accuracy", steps_left=0, seconds=5.0)
    assert "  loss 3.3e-05  val_loss 4.0e-09  accuracy 0.0000  " in text.getvalue()


@pytest.mark.parametrize("width", [60, 80, 160])
def test_progress_is_a_bar_in_a_terminal(width: int) -> None:
    # The bar shows the step; loss and rates stand below it, and the line of an epoch above it.
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width)
    with Reporter(enabled=True, total_steps=20, total_epochs=2, console=console) as reporter:
        reporter.step(epoch=0, phase="head", step=7, loss=0.7, rates={"head": 1e-3, "body": 5e-4})
        reporter.epoch(entry(0), monitor="accuracy", steps_left=10, seconds=5.0)
        reporter._bar.refresh()  # type: ignore[union-attr]
    shown = text.getvalue()
    assert "7/20" in shown
    assert "━" in shown
    assert "loss 0.7000" in shown
    assert "5.0e-04..1.0e-03" in shown
    assert "accuracy 0.7500" in shown
    silent = io.StringIO()
    with Reporter(enabled=False, total_steps=1, total_epochs=1, console=Console(file=silent)) as reporter:
        reporter.say("nothing")
    assert silent.getvalue() == ""


def test_numbers_for_people() -> None:
    # Rates as one or as a range; times in the unit that fits.
    assert format_rates({"a": 0.0}) == "0"
    assert format_seconds(59.1) == "1 min 00 s"
    assert format_seconds(-1) == "0 s"


def test_without_proc_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on macOS: it is told as not exact, in bytes whatever the system's unit.
    class Missing:
        def __init__(self, path: str) -> None:
            self.path = path

        def write_text(self, text: str) -> None:
            raise FileNotFoundError(self.path)

        def read_text(self) -> str:
            raise FileNotFoundError(self.path)

    monkeypatch.setattr(memory, "Path", Missing)
    with peak_memory(torch.device("cpu")) as peak:
        pass
    assert not peak.exact
    assert 2**25 < peak.bytes < 2**40  # between 32 MB and a terabyte
    monkeypatch.setattr(memory.sys, "platform", "darwin")  # tells bytes, Linux kilobytes
    with peak_memory(torch.device("cpu")) as apple:
        pass
    assert apple.bytes == pytest.approx(peak.bytes / 1024, rel=0.2)


def test_packages_that_are_not_there_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    # The record of a run names those that took part.
    def version(package: str) -> str:
        if package == "timm":
            raise PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(run_folder, "version", version)
    found = run_folder.versions()
    assert "timm" not in found
    assert found["torch"] == "1.0"
