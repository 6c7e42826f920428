"""The sweep over models tells a cut that is exact from one that is refused."""

from __future__ import annotations

import random

import pytest
import torch
from benchmarks.cuts import Examined, examine
from torch import Tensor, nn


class Mixing(nn.Module):
    """Subtracts from each sample the mean of all: no sample can be computed by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Noisy(nn.Module):
    """Adds a random number of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        return x + random.random()


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
@pytest.mark.parametrize(
    ("first", "state", "why"),
    [
        ((nn.Linear(6, 6), nn.Tanh()), "exact", "2"),
        ((nn.Linear(6, 6), Mixing()), "exact", "0"),
        ((nn.Linear(6, 6), Noisy()), "exact", "0"),
        ((Noisy(), nn.Linear(6, 6)), "refused", "random"),
    ],
)
def test_what_became_of_a_model(first, state, why) -> None:
    found = Examined("mine", "layers", 0.75, "failed", batch=4)
    layers = nn.Sequential(*first, nn.Linear(6, 6), nn.Linear(6, 3))
    examine(found, lambda batch: (layers, list(torch.randn(2 * batch, 6))))
    assert found.state == state
    assert why in found.why
