"""Calls of chosen modules are answered for one pass, and the modules are as they were after it."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from layerwise.cache.cutting.cut import CallId
from layerwise.cache.replay.intercepting import Forward, Intercepted


class Doubled(Intercepted):
    """Gives twice what the modules give."""

    def answer(self, call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(*args, **kwargs) * (2 + call.nth)


class Interrupted(nn.Module):
    """The user presses Ctrl-C when it is looked at."""

    @property
    def _call_impl(self) -> Any:
        raise KeyboardInterrupt


def test_calls_are_counted_and_the_modules_are_as_they_were() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    plain, before = layer(x), dict(vars(layer))
    with Doubled({layer: "layer"}) as doubled:
        assert torch.equal(layer(x), plain * 2)
        assert torch.equal(layer(x), plain * 3)
    assert doubled.counts == {layer: 2}
    assert vars(layer) == before
    assert torch.equal(layer(x), plain)


def test_one_within_another() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    plain = layer(x)
    with Doubled({layer: "outer"}):
        with Doubled({layer: "inner"}):
            assert torch.equal(layer(x), plain * 4)
        assert torch.equal(layer(x), plain * 3)
    assert torch.equal(layer(x), plain)


def test_an_interrupt_at_the_beginning_leaves_nothing() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(KeyboardInterrupt), Doubled({layer: "layer", Interrupted(): "next"}):
        pytest.fail("it has begun")
    assert "_call_impl" not in vars(layer)


def test_what_it_holds_goes_when_it_ends() -> None:
    # values of a batch, by no garbage collection: a cycle would keep some hundred MB for a while
    class Holding(Doubled):
        def __init__(self, layer: nn.Module, value: Tensor) -> None:
            super().__init__({layer: "layer"})
            self.value = value

    layer, value = nn.Linear(4, 4), torch.randn(2, 4)
    kept = ref(value)
    gc.disable()
    try:
        with Holding(layer, value):
            layer(value)
        del value
        assert kept() is None
    finally:
        gc.enable()
