"""Frozen weights are compared with what they were when values were stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from cache_loops import both, freeze_prefix, images
from helpers import TinyCNN
from layerwise.cache import frozen


class Lengths(Dataset[tuple[Tensor, Tensor]]):
    """Texts of five lengths, two of each."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.arange(1, index // 2 + 4) % 7, torch.tensor(index % 4)

    def __len__(self) -> int:
        return 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def test_weights_are_summed_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []

    def counted(tensors: list[Tensor]) -> object:
        sums.append(len(tensors))
        return joint_state(tensors)

    joint_state = frozen.joint_state
    monkeypatch.setattr(frozen, "joint_state", counted)
    torch.manual_seed(0)
    model = Net()
    freeze_prefix(model, "head")
    cache = layerwise.PrefixCache(model, DataLoader(Lengths(), 2), storage="memory")
    told = []
    for epoch in range(4):
        if epoch == 3:
            model.body.bias.data.add_(1)
        sums.clear()
        for number, (x, y) in enumerate(cache.batches()):
            output, ids = model(x), torch.stack([cache.loader.dataset[2 * number + k][0] for k in (0, 1)])
            assert torch.equal(output, model.head(model.body(model.embed(ids)).mean(1)))
            nn.functional.cross_entropy(output, y).backward()
        told.append((len(sums), cache._supplies[0].replays))
    assert told[1:3] == [(1, 5), (1, 5)]
    assert told[3][1] == 0  # all shapes were looked at anew


def test_a_frozen_module_is_taken_out() -> None:
    # its weights are no more: what was computed with them is stale
    def take_out(model: nn.Module, epoch: int) -> None:
        if epoch == 2:
            model.get_submodule("stem")[1] = nn.Identity()

    cached = both(TinyCNN, images, "layer2", "fc", before_epoch=take_out, epochs=4)
    assert "memory, cut at" in cached.text
