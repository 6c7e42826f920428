"""The Tuner's state inside the optimiser's: also where Accelerate has wrapped the optimiser."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import layerwise
from layerwise.integrations.resume import KEY, save_with_optimizer


def tuner_of(net: nn.Module, *, prepared: bool) -> layerwise.Tuner:
    layers = layerwise.layer_map(net, torch.zeros(2, 4))
    plan = layerwise.gradual_unfreezing(layers, epochs=4)
    tuner = layerwise.Tuner(net, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=1, layers=layers)
    if prepared:
        tuner.optimizer = Accelerator(cpu=True).prepare(tuner.optimizer)
    save_with_optimizer(tuner)
    return tuner


@pytest.mark.parametrize("prepared", [False, True])
def test_the_state_of_the_optimiser_brings_the_phase_back(prepared) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tuner = tuner_of(net, prepared=prepared)
    for _ in range(3):
        net(torch.ones(2, 4)).sum().backward()
        tuner.step()
        tuner.end_epoch()
    save_with_optimizer(tuner)  # a second callback for the same Tuner adds nothing
    state = tuner.optimizer.state_dict()
    assert KEY in state
    assert (
        len(getattr(tuner.optimizer, "optimizer", tuner.optimizer)._optimizer_load_state_dict_pre_hooks) == 1
    )
    other = tuner_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), prepared=prepared)
    assert other.phase_index == 0
    other.optimizer.load_state_dict(state)
    assert (other.phase_index, other.rates()) == (tuner.phase_index, tuner.rates())
    assert tuner.phase_index > 0
