"""A network is freed when the last name of it is gone, not when Python collects cycles some time later.

In a loop over many models, or many trials, networks would pile up in memory until then.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.helpers import TinyCNN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from layerwise.layers.recording import record
from layerwise.tuning.modes import unpin


class Undecided(TinyCNN):
    """Branches on numbers that fake tensors do not have, so that it is recorded on real samples."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images if images.sum() > 0 else -images)


def images(count: int = 8) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 8, 8), torch.arange(count) % 4)


def recorded(model: nn.Module) -> None:
    record(model, (torch.ones(2, 3, 8, 8),))


def mapped(model: nn.Module) -> None:
    layerwise.layer_map(model, torch.ones(2, 3, 8, 8))


def cached(model: nn.Module) -> None:
    layers = layerwise.layer_map(model, torch.ones(2, 3, 8, 8))
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=1, last_epochs=1)
    loader = DataLoader(images(), batch_size=4)
    tuner = layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, storage="memory")
    for _ in tuner.epochs():
        model.train()
        for x, y in cache.batches():
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
    assert cache.decision is not None


def refused(model: nn.Module) -> None:
    cache = layerwise.PrefixCache(model.train(), DataLoader(images(), batch_size=4), storage="auto")
    for x, _ in cache.batches():
        model(x)
    assert "off" in cache.describe()


def fitted(model: nn.Module) -> None:
    layers = layerwise.layer_map(model, torch.ones(2, 3, 8, 8))
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=1, last_epochs=1)
    layerwise.fit(model, images(16), images(), plan=plan, lr=0.1, layers=layers, progress=False)


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", [recorded, mapped, cached, refused, fitted])
@pytest.mark.parametrize("kind", [TinyCNN, Undecided])
def test_a_network_is_freed_at_once(
    use: Callable[[nn.Module], None], kind: type[nn.Module], no_collection: None
) -> None:
    use(kind())  # what is imported on the way may leave cycles once
    model = kind()
    seen = [weakref.ref(module) for module in model.modules()]
    use(model)
    unpin(model.modules())  # a pin is a part of its module, which it keeps as a method does
    del model
    assert not any(ref() is not None for ref in seen)
