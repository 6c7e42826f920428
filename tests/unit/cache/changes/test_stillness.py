"""Frozen weights that move while an epoch runs are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwise.cache.changes.stillness import Stillness


def encoders() -> nn.Module:
    model = nn.ModuleDict({
        "body": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
        "memory": nn.Linear(8, 400, bias=False),
        "norm": nn.BatchNorm1d(8).eval(),
        "queries": nn.Linear(8, 400, bias=False),
        "blank": nn.Linear(8, 8, device="meta"),
    })  # fmt: skip
    model["memory"].unused = nn.Parameter(torch.empty(0))
    model.requires_grad_(False)["queries"].requires_grad_(True)
    return model


def adapt(model: Any) -> None:
    model["norm"].train()(torch.randn(4, 8))
    model["norm"].eval()


MOVES = {
    "in place": lambda m: m["body"][0].weight.mul_(0.9),
    "data replaced": lambda m: setattr(m["body"][0].weight, "data", m["body"][0].weight.data * 0.9),
    "data of a part in place": lambda m: m["memory"].weight.data.mul_(0.9),
    "statistics": adapt,
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_frozen_weights_that_move_are_seen(name, wrapped) -> None:
    model = encoders()
    whole = nn.Sequential(nn.Sequential(model)) if wrapped else model
    still = Stillness([*whole.modules()])
    with torch.no_grad():
        model["queries"].weight.mul_(2)
    assert still.holds()
    with torch.no_grad():
        MOVES[name](model)
    assert not still.holds()


def test_statistics_of_batch_norms_that_train_may_move() -> None:
    model = encoders().train()
    still = Stillness([*model.modules()])
    model["norm"](torch.randn(4, 8))
    assert still.holds()


def test_weights_without_a_version() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().requires_grad_(False)
    still = Stillness([*model.modules()])
    assert still.holds()
    with torch.inference_mode():
        model[0].bias.fill_(2)
    assert not still.holds()
