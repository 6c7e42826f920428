"""`layerwise fit` as a process: interrupted, killed, resumed; exit codes; a help that is quick."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forked import Forked, layerwise
from image_folders import make_images

COMMAND = str(Path(sys.executable).parent / "layerwise")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "photos")


def fit(images: Path, out: Path) -> list[object]:
    return [
        "fit", "--model", "timm:test_efficientnet", "--no-pretrained", "--input-size", 64,
        "--data", images, "--strategy", "gradual_unfreezing", "--granularity", "stages", "--epochs", 12,
        "--lr", "1e-2", "--batch-size", 4, "--checkpoint-every-steps", 2, "--out", out,
    ]  # fmt: skip


def test_interrupted_killed_and_resumed_by_the_command_line(images: Path, tmp_path: Path) -> None:
    # Ctrl-C ends with 130 and says how to go on; SIGKILL ends anywhere; --resume ends in the same bits.
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = Forked(layerwise, *fit(images, whole))
    process = Forked(layerwise, *fit(images, broken))
    process.wait_for("epoch 2/")
    process.interrupt()
    done = process.finish()
    assert done.returncode == 130, done.stderr
    assert done.stdout == ""
    assert f"layerwise fit --resume {broken}" in done.stderr
    assert "Traceback" not in done.stderr

    process = Forked(layerwise, "fit", "--resume", broken)
    process.wait_for("epoch 6/")
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    assert len((broken / "history.jsonl").read_text().splitlines()) < 12

    done = Forked(layerwise, "fit", "--resume", broken).finish()
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr
    assert "validation balanced_accuracy" in done.stdout
    done = undisturbed.finish()
    assert done.returncode == 0, done.stderr
    for name in ("history.jsonl", "model.safetensors", "plan.yaml"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_exit_codes_and_tracebacks(tmp_path: Path) -> None:
    # 2 for usage, 1 for failure with one message; --debug lets the traceback through.
    assert finish(start("fit", "--epochs", "x"))[0] == 2
    code, out, err = finish(start("predict", tmp_path, "x.png"))
    assert (code, out) == (1, "")
    assert err.startswith("RunError: ")
    assert "Traceback" not in err
    code, _, err = finish(start("--debug", "predict", tmp_path, "x.png"))
    assert code != 0
    assert "Traceback" in err


def test_help_is_quick() -> None:
    # Under a second on an idle machine: processor time is measured, as other processes share this one.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, _ = finish(start("--help"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0
    assert all(name in out for name in ("fit", "predict", "demo", "inspect", "plan"))
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, layerwise.cli.main; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False"
