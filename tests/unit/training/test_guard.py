"""What stops a run: weights and data that are not finite, Ctrl-C; and what is said of it."""

import math
import os
import signal
import subprocess
import sys
import threading
from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerwise.errors import ModelError, RunError, TrainingError
from layerwise.training.dryrun import dry_run
from layerwise.training.fit import fit
from layerwise.training.guard import Interrupt, check_weights, explained, finite_loss
from layerwise.training.options import Precision
from layerwise.training.result import Result
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan


def run(model: Tiny, **options: object) -> Result:
    layers = tiny_layers(model)
    return fit(model, tiny_data(), plan=tiny_plan(), layers=layers, cache="off", progress=False, **options)


@pytest.mark.parametrize("name", ["head.weight", "stem.0.weight"])
def test_a_model_that_is_not_finite_is_told_before_a_run_is_begun(name: str, tmp_path: Path) -> None:
    # Of the frozen part too: no diverged training is blamed, and the folder is free for the next try.
    model = Tiny()
    model.get_parameter(name).data.view(-1)[0] = math.nan
    with pytest.raises(TrainingError, match=f"{name!r} of the model.*before any training.*weights that were"):
        run(model, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "batch",
    [
        (torch.tensor([math.inf]), torch.tensor([1])),
        {"inputs": [torch.tensor([math.nan])], "labels": torch.tensor([1])},
        UserDict(inputs=torch.tensor([math.nan])),  # what transformers' collators give is one
    ],
)
def test_data_are_blamed_for_a_loss_where_they_are_not_finite(batch: object) -> None:
    # Wherever in the batch they are; else the message is about the learning rate.
    at = {"step": 4, "epoch": 0, "index": 4, "out": None}
    with pytest.raises(TrainingError, match=r"became nan at step 5 .*The batch itself holds values"):
        finite_loss(torch.tensor(math.nan), batch, **at)
    with pytest.raises(TrainingError, match="The batch is finite, so training diverged: lower lr"):
        finite_loss(torch.tensor(math.nan), {"inputs": torch.ones(1)}, **at)


def test_a_weight_that_is_not_finite_is_named_with_its_step(tmp_path: Path) -> None:
    # Where there is no checkpoint to go back to, that is said.
    model = Tiny()
    check_weights(model, step=3, out=tmp_path)
    model.head.bias.data[0] = math.inf
    with pytest.raises(TrainingError, match=r"'head.bias' .* after step 3. Lower lr.*has no checkpoint yet"):
        check_weights(model, step=3, out=tmp_path)


@pytest.mark.parametrize("call", [fit, dry_run])
def test_a_model_without_values_is_refused(call: Callable[..., object]) -> None:
    # torch tells that it cannot be moved, and not which tensors have none.
    model, layers = Tiny(), tiny_layers(Tiny())
    model.body.to("meta")
    with pytest.raises(ModelError, match=r"7 tensors .*body.0.weight, .*meta.*assign=True"):
        call(model, tiny_data(), plan=tiny_plan(), layers=layers)


@pytest.mark.parametrize(
    ("precision", "clip_norm", "weights", "losses", "memory"),
    [
        (
            "fp32",
            None,
            "set clip_norm=1.0.",
            "or add warm-up to the plan's schedule.",
            "or precision='bf16',",
        ),
        ("bf16", 5.0, "set clip_norm below 5.", "or use precision='fp32'.", "or a plan that trains less,"),
    ],
)
def test_what_is_in_use_is_not_proposed(
    precision: Precision, clip_norm: float | None, weights: str, losses: str, memory: str
) -> None:
    # fp32 to one that trains in it, nor the norm that gradients are clipped to already
    at = {"step": 4, "epoch": 0, "index": 4, "out": None, "precision": precision, "clip_norm": clip_norm}
    with pytest.raises(TrainingError) as of_loss:
        finite_loss(torch.tensor(math.nan), {"inputs": torch.ones(1)}, **at)
    assert losses in str(of_loss.value)
    assert weights.removesuffix(".") + "," in str(of_loss.value)
    model = Tiny()
    model.head.bias.data[0] = math.inf
    with pytest.raises(TrainingError) as of_weights:
        check_weights(model, step=3, out=None, clip_norm=clip_norm)
    assert weights in str(of_weights.value)
    with pytest.raises(TrainingError) as of_memory, explained(lambda: 7, out=None, precision=precision):
        raise MemoryError
    assert memory in str(of_memory.value)


def test_only_the_errors_that_are_known_are_explained() -> None:
    # A ValueError of the user's own code passes as it is.
    with pytest.raises(ValueError, match="mine"), explained(lambda: 7, out=None):
        raise ValueError("mine")
    with pytest.raises(RunError, match="told already"), explained(lambda: 7, out=None):
        raise RunError("told already")


@pytest.mark.parametrize(
    "told",
    [
        "DataLoader worker (pid 7) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
    ],
)
def test_a_process_that_loads_samples_and_is_gone_is_explained(told: str, tmp_path: Path) -> None:
    # In torch's own words; other errors of loaders pass.
    with (
        pytest.raises(
            TrainingError, match=r"ended after step 7: DataLoader.*fewer workers.*no checkpoint yet"
        ),
        explained(lambda: 7, out=tmp_path),
    ):
        raise RuntimeError(told)
    with pytest.raises(RuntimeError, match="mine"), explained(lambda: 7, out=tmp_path):
        raise RuntimeError("DataLoader mine")


KILLED = """
import os, signal, sys
import torch
from layerwise.errors import TrainingError
from layerwise.training.fit import fit
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan

class Killing(torch.utils.data.Dataset):
    maker = os.getpid()
    def __len__(self):
        return 50
    def __getitem__(self, index):
        if index == 20 and os.getpid() != self.maker:
            os.kill(os.getpid(), signal.SIGKILL)
        return tiny_data()[index]

model = Tiny()
try:
    fit(model, Killing(), plan=tiny_plan(), layers=tiny_layers(model), workers=1, cache="off", progress=False)
except TrainingError as error:
    print(error)
sys.stdout.flush()
os._exit(0)  # torch goes on raising where it hears of the process
"""


def test_a_killed_process_that_loads_samples_is_heard_of() -> None:
    # A real one, in a program of its own: the message is torch's, and it may change.
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    told = subprocess.run(
        [sys.executable, "-c", KILLED], env=path, capture_output=True, text=True, timeout=120
    )
    assert "a process that loads samples ended after step" in told.stdout, told.stderr


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    # The first waits for the end of the step; afterwards Ctrl-C does what it did before.
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="go on so"):
            interrupt.raise_if_requested("go on so")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_outside_of_the_main_thread_is_the_same_run() -> None:
    # Python lets no other thread handle signals; Ctrl-C is left to the main one.
    found: list[Result] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(run(Tiny(), batch_size=16)))
    thread.start()
    thread.join()
    assert found[0].history == run(Tiny(), batch_size=16).history
    assert signal.getsignal(signal.SIGINT) is before
