"""Devices without float64, and the random numbers of any device, in training."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from apple import AppleTensor, on_apple
from layerwise.training import evaluate as evaluating
from layerwise.training import processes
from layerwise.training.data import open_batches
from layerwise.training.processes import to_device
from layerwise.training.randomness import get_random_state, set_random_state
from layerwise.training.text_tasks import Regression

CPU = torch.device("cpu")


def test_a_batch_goes_to_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # A loader makes float64 of Python's numbers.
    batch = {"x": torch.zeros(2), "labels": torch.zeros(2, dtype=torch.float64), "ids": torch.arange(2)}
    assert to_device(batch, CPU)["labels"].dtype == torch.float64
    monkeypatch.setattr(processes, "widest_float", lambda device: torch.float32)
    sent = to_device(batch, CPU)
    assert {name: value.dtype for name, value in sent.items()} == {
        "x": torch.float32,
        "labels": torch.float32,
        "ids": torch.int64,
    }


def test_metrics_stay_on_the_cpu_where_the_device_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # Same scores; the metrics see tensors of the CPU.
    seen: list[tuple[type, torch.dtype]] = []

    class There(nn.Linear):
        def forward(self, x):
            return on_apple(super().forward(x))

    class Watched(Regression):
        def update(self, metrics, output, batch) -> None:
            seen.append((type(output), batch[1].dtype))
            super().update(metrics, output, batch)

    data = TensorDataset(torch.randn(12, 3), torch.randn(12, dtype=torch.float64))
    task = Watched(("y",))
    batches = open_batches(data, train=False, batch_size=4, name="data", collate=task.collate)
    model = There(3, 1)
    plain = evaluating.evaluate(model, batches, task, device=CPU)
    for module in (evaluating, processes):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    elsewhere = evaluating.evaluate(model, batches, task, device=torch.device("cpu", 0))  # another than "cpu"
    assert elsewhere.values == pytest.approx(plain.values)
    assert seen == [(AppleTensor, torch.float64)] * 3 + [(torch.Tensor, torch.float32)] * 3


@pytest.mark.parametrize("several", [True, False])
def test_a_checkpoint_has_the_random_state_of_any_accelerator(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA and Intel's GPUs are several, Apple's is one and has other functions.
    states = [torch.arange(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)][: 2 if several else 1]
    put: list[object] = []
    module = (
        SimpleNamespace(get_rng_state_all=lambda: states, set_rng_state_all=put.append)
        if several
        else SimpleNamespace(get_rng_state=lambda: states[0], set_rng_state=put.append)
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    state = get_random_state()
    assert state["cuda"] == states
    set_random_state(state)
    assert put == [states if several else states[0]]
    for other in ([], [torch.zeros(5, dtype=torch.uint8)]):  # of a machine without one, or with another
        set_random_state({**state, "cuda": other})
    assert len(put) == 1
