"""Named param groups for a loop without a Tuner."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from helpers import map_by_children, tiny_cnn, tiny_mlp
from layerwise.errors import ModelError, PlanError
from layerwise.plans.plan import Plan
from layerwise.plans.strategies import discriminative, linear_probe
from layerwise.plans.unfreezing import lp_ft
from layerwise.tuning.param_groups import param_groups
from layerwise.tuning.tuner import Tuner


def test_every_parameter_is_in_exactly_one_group() -> None:
    """With a layer map all parameters are in, each once, under names that tell group and decay."""
    model = tiny_cnn()
    groups = param_groups(model, map_by_children(model), lr=0.1, weight_decay=0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert [group["name"] for group in groups[:2]] == ["stem", "stem (no decay)"]
    assert len({group["name"] for group in groups}) == len(groups)
    for group in groups:
        assert group["weight_decay"] == (0.3 if all(p.ndim >= 2 for p in group["params"]) else 0.0)
    assert torch.optim.SGD(groups, lr=1.0).param_groups[0]["lr"] == 0.1


def test_a_plan_gives_the_rates_of_a_phase() -> None:
    """Rates are lr times the phase's multipliers; frozen groups are left out."""
    model = tiny_mlp(blocks=2)
    layers = map_by_children(model)
    groups = param_groups(model, discriminative(layers, decay=0.5, frozen=1), lr=0.1, layers=layers)
    assert {group["layer_group"]: group["lr"] for group in groups} == {"b1": 0.05, "head": 0.1}
    assert "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0.0
    second = param_groups(model, lp_ft(layers), lr=0.1, layers=layers, phase=1)
    assert {group["layer_group"] for group in second} == {"b0", "b1", "head"}


def test_rates_that_differ_by_little_stay_apart() -> None:
    """Multipliers that read the same in six digits have param groups of their own names and rates."""
    model = tiny_cnn()
    layers = map_by_children(model)
    rates = {"stem.0.bias": 0.1234567, "stem.1.bias": 0.12345671}
    phase = {"name": "a", "rates": {"stem": 1.0}, "overrides": rates, "epochs": 1}
    plan = Plan(groups=layers.names, phases=[phase])
    tuner = Tuner(model, plan, torch.optim.SGD, lr=1.0, steps_per_epoch=1, layers=layers)
    groups = tuner.optimizer.param_groups
    assert len({group["name"] for group in groups}) == len(groups) == 4
    assert {group["lr"] for group in groups} == {1.0, *rates.values()}


def test_what_the_model_exempts_from_decay_does_not_decay() -> None:
    """Names in the model's no_weight_decay() (timm's position tables) are spared."""

    class Table(nn.Sequential):
        def no_weight_decay(self) -> set[str]:
            return {"b0.weight"}

    model = Table()
    model.add_module("b0", nn.Linear(3, 3))
    model.add_module("head", nn.Linear(3, 2))
    groups = param_groups(model, map_by_children(model), lr=0.1, weight_decay=0.3)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "b0 (no decay)": 0.0, "head": 0.3, "head (no decay)": 0.0
    }  # fmt: skip


def test_a_phase_that_is_not_there_is_an_error() -> None:
    """The number of phases is told."""
    model = tiny_mlp()
    layers = map_by_children(model)
    with pytest.raises(PlanError, match="no phase number 1; it has 1"):
        param_groups(model, linear_probe(layers), lr=0.1, layers=layers, phase=1)


def test_the_map_of_another_model_is_told() -> None:
    """Both sides' names, as by the Tuner: a parameter in no group would not learn, without a word."""
    layers = map_by_children(tiny_mlp(blocks=1))
    with pytest.raises(ModelError, match=r"only the map has 'b0\.0\.weight'.*; only the model has nothing"):
        param_groups(nn.Sequential(OrderedDict(head=nn.Linear(6, 3))), layers, lr=0.1)
    with pytest.raises(ModelError, match=r"only the map has nothing; only the model has 'b1\.0\.weight'"):
        param_groups(tiny_mlp(blocks=2), layers, lr=0.1)


def test_the_name_of_a_strategy_is_no_plan() -> None:
    """The error says how a plan is made of it, as the Tuner's does."""
    with pytest.raises(PlanError, match=r"plan is 'full', a str; expected a layerwise\.Plan"):
        param_groups(tiny_mlp(), "full", lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"lr": -0.1}, {"lr": None}, {"lr": 0.1, "weight_decay": -1}])
def test_numbers_that_no_run_can_have_are_told(numbers) -> None:
    """As a Tuner tells them: a negative rate climbs the loss, and no error would say so."""
    model = tiny_mlp()
    with pytest.raises(PlanError, match=r"(lr|weight_decay) is .*; expected a number"):
        param_groups(model, map_by_children(model), **numbers)


def test_the_map_is_made_where_it_is_not_given() -> None:
    """A plan alone is enough; the model is mapped at the plan's granularity."""
    from layerwise.layers.mapping import layer_map

    model = tiny_cnn()
    images = torch.randn(1, 3, 8, 8)
    plan = linear_probe(layer_map(model, images, granularity="stages"))
    (weights, biases) = param_groups(model, plan, lr=0.1, example_input=images)
    assert weights["params"][0] is model.fc.weight
    assert biases["params"][0] is model.fc.bias
