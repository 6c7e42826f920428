"""Frozen weights are compared with what they were when values were stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from cache_loops import both, freeze_prefix, images, train
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


class Tabled(nn.Linear):
    """Hands on a table of weights of its own beside its output."""

    def __init__(self) -> None:
        super().__init__(192, 4)
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x.flatten(1)), self.table * 2


class Adding(nn.Linear):
    """Adds them."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(given[0] + given[1])


def test_a_table_whose_weights_change_is_computed_anew_and_the_rest_stays() -> None:
    def change(model: nn.Module, epoch: int) -> None:
        if epoch == 2:
            model.get_submodule("0").table.data.add_(1)  # type: ignore[operator, union-attr]

    cached = both(lambda: nn.Sequential(Tabled(), Adding(4, 4)), images, "1", before_epoch=change, epochs=4)
    assert "memory, cut at" in cached.text
    assert cached.loads[3] == 0


def test_a_closed_cache_gives_its_memory_back() -> None:
    cache = train(TinyCNN, images(), "layer2", "fc", cached=True).cache
    assert len(cache.stock._held) == 2
    cache.close()
    assert len(cache.stock._held) == 0
