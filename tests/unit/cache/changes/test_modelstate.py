"""The state of a model: another number where something else is computed, the same where it is back."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from layerwise.cache.changes import modelstate
from layerwise.cache.changes.modelstate import ModelState


def test_layers_whose_mode_is_not_looked_at_have_none() -> None:
    for layer in modelstate._MODELESS:
        for base in layer.__mro__[: layer.__mro__.index(nn.Module)]:
            assert "self.training" not in inspect.getsource(base), layer


def test_the_mode_of_a_layer_counts_where_a_hook_may_read_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    handle = model[0].register_forward_pre_hook(
        lambda module, args: (args[0] * (2 if module.training else 1),)
    )
    state = ModelState(model)
    before = state.number()
    model[0].eval()
    assert state.number() != before
    model[0].train()
    assert state.number() == before
    handle.remove()
    state.refresh()
    plain = state.number()
    model.eval()
    assert state.number() == plain  # no hook, no dropout, no batch-norm


def test_a_state_comes_back_with_the_content_of_a_buffer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_buffer("table", torch.arange(100.0))
    state = ModelState(model)
    before = state.number()
    model.table.add_(1)
    assert state.number() != before
    model.table.sub_(1)
    assert state.number() == before
