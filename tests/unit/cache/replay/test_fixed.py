"""What skipped calls give for every batch alike is taken over from phase to phase, where it is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cache_loops import both, images


class Table(nn.Module):
    """Gives features, and a table that an attribute scales."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.scale = nn.Linear(192, 8), nn.Parameter(torch.randn(8)), 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.table * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mix, self.head = Table(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features, table = self.body(x.flatten(1))
        return self.head(self.mix(features + table).tanh())


def test_a_table_that_a_later_phase_needs_and_another_one_changes() -> None:
    def before_epoch(model: Any, epoch: int) -> None:
        model.mix.requires_grad_(epoch >= 2)
        model.body.scale = 2.0 if epoch >= 4 else 1.0

    outcome = both(Net, images, "head", before_epoch=before_epoch, epochs=6)
    (supply,) = outcome.cache._supplies
    phases = supply.feeds[0].phases.values()
    assert [len(phase.cut.constants) for phase in phases] == [0, 1, 1]
    assert [phase.reason for phase in phases] == [""] * 3
