"""The state of a model: another number where something else is computed, the same where it is back."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from layerwise.cache.changes import modelstate
from layerwise.cache.changes.modelstate import ModelState


def test_layers_whose_mode_is_not_looked_at_have_none() -> None:
    for layer in modelstate._MODELESS:
        for base in layer.__mro__[: layer.__mro__.index(nn.Module)]:
            assert "self.training" not in inspect.getsource(base), layer


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_the_mode_of_a_layer_counts_where_a_hook_may_read_it(kind) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    handle = getattr(model[0], f"register_{kind}_hook")(
        lambda module, args, *output: ((output or args)[0] * (2 if module.training else 1),)
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


class Scaled(nn.Module):
    """Has a setting, and may do something else in train mode."""

    scale = 1.0


@pytest.mark.parametrize("name", ["training", "scale"])
def test_a_module_that_came_later_is_looked_at(name) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    state = ModelState(model)
    model[1] = Scaled()
    first = state.last
    state.refresh()
    before = state.last  # batches are made for it before the model is called
    assert before != first
    setattr(model[1], name, 0)
    assert state.number() != before


def test_weights_that_moved_between_epochs_do_not_move_in_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    state = ModelState(model)
    model[0].weight.mul_(2)
    state.refresh()
    moves = state.moves
    assert state.look_at_weights() == moves
    model[0].weight.mul_(2)
    assert state.look_at_weights() == state.look_at_weights() == moves + 1


def test_weights_that_were_frozen_between_epochs_are_looked_at() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    state = ModelState(model)
    model[0].requires_grad_(False)
    state.refresh()
    model[0].weight.mul_(2)
    assert state.look_at_weights() == 1


def test_a_state_comes_back_with_the_content_of_a_buffer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_buffer("table", torch.arange(100.0))
    state = ModelState(model)
    before = state.number()
    model.table.add_(1)
    assert state.number() != before
    model.table.sub_(1)
    assert state.number() == before
