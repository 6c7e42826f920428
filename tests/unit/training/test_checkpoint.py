"""A checkpoint is whole or it is not there, and one that was changed is never believed."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from file_limit import file_limit
from layerwise import files
from layerwise.errors import RunError
from layerwise.training import checkpoint
from layerwise.training.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from layerwise.training.randomness import get_random_state


def state(value: float) -> dict:
    return {
        "weights": {"a": torch.full((50,), value)},
        "random": get_random_state(),
        "history": [{"loss": value}],
    }


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    # Tensors, random states and plain data survive a round trip bit for bit.
    before = state(0.1)
    load = load_checkpoint(save_checkpoint(tmp_path, 7, before))
    assert torch.equal(load["weights"]["a"], before["weights"]["a"])
    assert load["history"] == before["history"]
    assert load["random"]["python"] == before["random"]["python"]
    assert torch.equal(load["random"]["numpy"][1], before["random"]["numpy"][1])


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    # `keep` checkpoints stay, the newest.
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]


def test_a_damaged_later_checkpoint_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    # A run that went back to the checkpoint before keeps the new ones, and not the one that was damaged.
    save_checkpoint(tmp_path, 4, state(4.0), keep=2)
    damaged = save_checkpoint(tmp_path, 8, state(8.0), keep=2)
    (damaged / "state.pt").write_bytes(b"")
    for step in (5, 6):
        path = save_checkpoint(tmp_path, step, state(step), keep=1)
        assert list_checkpoints(tmp_path) == [path]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 6


@pytest.mark.parametrize("name", ["step-old", "step-00000002 (copy)", "step-"])
def test_a_folder_of_another_name_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    # A copy that somebody made is neither read nor removed, and takes no checkpoint's place.
    save_checkpoint(tmp_path, 1, state(1.0))
    shutil.copytree(save_checkpoint(tmp_path, 2, state(2.0)), tmp_path / name)
    save_checkpoint(tmp_path, 3, state(3.0), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / name / "state.pt").is_file()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    # What lies there is named, and it is not gone on without checkpoints.
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunError, match=r"checkpoint of step 1 could not be written to .*checkpoints"):
        save_checkpoint(tmp_path / "checkpoints", 1, state(1.0))


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    # Writing a step twice leaves one whole checkpoint, the second.
    save_checkpoint(tmp_path, 3, state(1.0))
    save_checkpoint(tmp_path, 3, state(2.0))
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.state["history"] == [{"loss": 2.0}]
    assert not list(tmp_path.glob(f"{files.TEMPORARY}*"))


@pytest.mark.parametrize(
    "damage", ["truncate", "alter", "remove", "manifest", "format", "list", "null", "deep", "no hash"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    # Whatever happened to the last checkpoint, it is told, and the run goes on from the one before.
    save_checkpoint(tmp_path, 1, state(1.0))
    path = save_checkpoint(tmp_path, 2, state(2.0))
    file, manifest = path / "state.pt", path / "manifest.json"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "alter":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "deep":
        manifest.write_text("[" * 100_000)
    else:
        altered = {"format": {"format": 99}, "list": {"sha256": []}, "null": {"sha256": None}}
        altered["no hash"] = {"sha256": {}}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **altered[damage]}))
    with pytest.raises(RunError, match="step-00000002"):
        load_checkpoint(path)
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 1
    assert latest.state["history"] == [{"loss": 1.0}]
    assert len(latest.skipped) == 1
    assert "step-00000002" in latest.skipped[0]


def test_no_checkpoint_and_only_damaged_ones_are_told_apart(tmp_path: Path) -> None:
    # None where nothing was written; an error that names each where all are damaged.
    assert load_latest(tmp_path / "none") is None
    assert load_latest(tmp_path) is None
    (save_checkpoint(tmp_path, 1, state(1.0)) / "state.pt").write_bytes(b"")
    with pytest.raises(RunError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    # A folder under its temporary name is no checkpoint.
    save_checkpoint(tmp_path, 1, state(1.0))
    leftover = tmp_path / f"{files.TEMPORARY}abc-step-00000002"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(b"half")
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 1
    assert not leftover.exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    # weights_only loading: a pickle with a callable raises instead of calling it.
    path = save_checkpoint(tmp_path, 1, state(1.0))
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"weights": Evil()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = files.sha256(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match="cannot be read"):
        load_checkpoint(path)
    assert not ran.exists()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    # A real write limit of the system: the message names step and folder, nothing half-written stays.
    save_checkpoint(tmp_path, 1, state(1.0))
    big = {**state(2.0), "big": torch.zeros(300_000)}
    with (
        file_limit(400_000),
        pytest.raises(RunError, match=r"checkpoint of step 2 could not be written.*step-00000001") as caught,
    ):
        save_checkpoint(tmp_path, 2, big)
    assert "only a part of its file could be written" in str(caught.value)
    assert "enforce fail" not in str(caught.value)  # torch's own words for it
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.step == 1


def test_a_failing_flush_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some systems report a full disk only when the file is flushed.
    save_checkpoint(tmp_path, 1, state(1.0))

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_checkpoint(tmp_path, 2, state(2.0))
    monkeypatch.undo()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
