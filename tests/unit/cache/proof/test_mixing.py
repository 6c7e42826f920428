"""What mixes samples for some inputs is not cached, though the first batch does not show it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import freeze_prefix

SIZE = 16


class Body(nn.Module):
    """A linear layer, and what `act` makes of its input or result."""

    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.experts = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


class Net(nn.Module):
    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head = Body(act), nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def fill_missing(module: Any, x: Tensor) -> Tensor:
    return module.linear(torch.where(x.isnan(), x.nanmean(0), x))


def fill_full_experts(module: Any, x: Tensor) -> Tensor:
    chosen = nn.functional.one_hot(module.experts(x).argmax(1), 4)
    place = (chosen.cumsum(0) * chosen).sum(1)
    return module.linear(x) * (place <= max(len(x) // 2, 2))[:, None]


def scale_down(module: Any, x: Tensor) -> Tensor:
    return module.linear(x / x.abs().max().clamp(min=20))


def plain(module: Any, x: Tensor) -> Tensor:
    return module.linear(x)


def fill_alone(module: Any, x: Tensor) -> Tensor:
    return module.linear(torch.where(x.isnan(), x.nanmean(1, keepdim=True).nan_to_num(), x))


def refuse_missing(module: Any, x: Tensor) -> Tensor:
    with _disable_current_modes():  # a recording does not see that a value of the batch is looked at
        if type(x) is Tensor and x.isnan().any():
            raise ValueError("a value is missing")
    return module.linear(x)


def centre_unless_missing(module: Any, x: Tensor) -> Tensor:
    h = refuse_missing(module, x)
    return h - h.mean(0)


def described(act) -> str:
    """Return what a cache tells after an epoch of a model with this frozen part."""
    torch.manual_seed(0)
    model = Net(act)
    freeze_prefix(model, "head")
    loader = DataLoader(TensorDataset(torch.randn(12, SIZE), torch.arange(12) % 4), batch_size=4)
    cache = layerwise.PrefixCache(model, loader, storage="memory")
    for x, y in cache.batches():
        nn.functional.cross_entropy(model(x), y).backward()
    return cache.describe()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (fill_missing, "off: .* beside copies of itself"),
        (fill_full_experts, "memory, cut at body.experts, body.linear .* mixes the samples"),
        (scale_down, "off: .* beside copies of itself"),
        (plain, "memory, cut at body"),
        (fill_alone, "memory, cut at body"),
        (refuse_missing, "memory, cut at"),
        (centre_unless_missing, "memory, cut at body.linear .* mixes the samples"),
    ],
)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_mixing_for_some_inputs(act, says) -> None:
    text = described(act)
    assert re.search(says, text), text


_GIVEN: list[Tensor] = []


@torch.library.custom_op("layerwise_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """Stand for compiled code that a NaN or a large number may crash, as torchvision's deform_conv2d."""
    _GIVEN.append(x.clone())
    return x * 2


doubled.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda module, x: doubled(module.linear(x)), "memory, cut at body"),
        (lambda module, x: doubled(fill_full_experts(module, x)), "memory, cut at body.experts, body.linear"),
    ],
)
def test_compiled_code_of_others_gets_no_strange_numbers(act, says) -> None:
    """Only samples of the data reach it; copies of them still show what mixes."""
    _GIVEN.clear()
    text = described(act)
    assert re.search(says, text), text
    assert _GIVEN
    assert all(bool((given.abs() < 100).all()) for given in _GIVEN)
