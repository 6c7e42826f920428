"""Models that write their forward in unusual ways are trained exactly, or not cached for a named reason."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import assert_same, train
from unlisted_models import CASES, Net


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The prefix cache is off", "ignore:flex_attention called without")
def test_exact_or_refused_with_a_reason(name) -> None:
    # two shuffled epochs with a smaller last batch: same losses, weights, buffers and random state
    case = CASES[name]
    samples = case.samples()
    plain = train(case.make, samples, *case.learning, cached=False, step=case.loss, epochs=2)
    cached = train(case.make, samples, *case.learning, cached=True, step=case.loss, epochs=2)
    assert_same(plain, cached)
    assert re.search(case.expected, cached.text), cached.text
    torch.manual_seed(0)
    start = case.make().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in cached.weights.items())


def test_a_batch_of_two_is_not_proved_by_a_batch_of_one() -> None:
    # a frozen module runs after a batch-norm that learns, which cannot train on a single sample
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.late = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x).mean((2, 3))
            return self.head(self.norm(x) + self.late(x))

    samples = CASES["u-net"].samples()
    plain = train(Late, samples, "norm", "head", cached=False, batch=2, epochs=2)
    cached = train(Late, samples, "norm", "head", cached=True, batch=2, epochs=2)
    assert_same(plain, cached)
    assert "late (" in cached.text


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_layers_that_have_no_shape_yet() -> None:
    # they take it from the loop's first batch; from then on the model is cached
    def weights(cached: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 8).requires_grad_(False), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(2)
        )
        loader = DataLoader(TensorDataset(torch.randn(12, 6), torch.arange(12) % 2), 4)
        cache = layerwise.PrefixCache(model, loader, storage="memory")
        for _ in range(3):
            for x, y in cache.batches() if cached else loader:
                loss = nn.functional.cross_entropy(model(x), y)
                learning = [p for p in model.parameters() if p.requires_grad]
                for p, gradient in zip(learning, torch.autograd.grad(loss, learning)):
                    p.data -= gradient
        assert not cached or "memory, cut at" in cache.describe()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(cached=True), weights(cached=False))
