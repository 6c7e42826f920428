"""Tensors are compared to the bit, or but for rounding, whatever they hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cache_loops import both, images
from layerwise.cache.comparing import is_near, same_bits


def test_same_bits() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, torch.tensor([1.0, 2.0]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))


VALUES = {
    "real": [1.0, -2.0, 3.0],
    "complex": [1 + 2j, -2 + 0j, 3j],
    "masked": [1.0, -math.inf, 3.0],
    "missing": [1.0, math.nan, 3.0],
    "nothing finite": [math.nan, math.inf],
    "none": [],
}


@pytest.mark.parametrize("name", VALUES)
def test_the_same_but_for_rounding(name) -> None:
    x = torch.tensor(VALUES[name])
    assert is_near(x, x.clone())
    assert is_near(x, x * (1 + 1e-6))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1.0, 2.0], [1.0, 2.01]),
        ([1 + 2j], [1 + 2.01j]),
        ([1.0, math.inf], [1.0, -math.inf]),
        ([1.0, math.nan], [1.0, math.inf]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([0.0], [1e-9]),
        ([1, 10**6], [1, 10**6 + 1]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_more_than_rounding(one, other) -> None:
    assert not is_near(torch.tensor(one), torch.tensor(other))


class Spectrum(nn.Module):
    """Gives complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.linear(x.flatten(1)))


class Head(nn.Module):
    """Reads the same complex numbers twice, so that they are what is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.real) * self.linear(x.imag)


def test_complex_values_are_stored() -> None:
    cached = both(lambda: nn.Sequential(Spectrum(), Head()), images, "1")
    assert "cut at 0 " in cached.text
    assert cached.loads[1:] == [0, 0]
