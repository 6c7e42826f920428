"""`Learners` on tiny models: who learns in a phase, and what asking leaves as it was."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from helpers import map_by_children, tiny_cnn, tiny_mlp
from layerwise.plans import strategies, unfreezing
from layerwise.plans.plan import Plan
from layerwise.tuning.learners import Learners


def make(model: nn.Module, plan_of=unfreezing.gradual_unfreezing) -> tuple[Learners, Plan]:
    """Return the learners of a model, and their plan."""
    layers = map_by_children(model)
    plan = plan_of(layers)
    return Learners(model, plan, layers), plan


def modes(model: nn.Module) -> list[bool]:
    """Return of each module whether it trains, and of each parameter whether it learns."""
    return [m.training for m in model.train().modules()] + [p.requires_grad for p in model.parameters()]


def test_each_phase_makes_those_learn_that_it_names() -> None:
    model = tiny_mlp()
    learners, plan = make(model)
    for number in range(len(plan.phases)):
        specs = learners.set(number, None)
        held = {id(parameter) for spec in specs for parameter in spec.parameters}
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        assert learning == learners.names_now() == learners.names_in(number)
        assert held == {id(learners.parameters[name]) for name in learning}
    assert len(learning) == len(learners.parameters)


def test_asking_for_another_phase_leaves_the_model_as_it_is() -> None:
    model = tiny_cnn()
    learners, plan = make(model)
    learners.set(0, None)
    before = modes(model)
    assert not all(module.training for module in model.modules() if isinstance(module, _BatchNorm))
    learners.names_in(len(plan.phases) - 1)
    assert modes(model) == before


def test_what_stops_to_learn_loses_its_gradient() -> None:
    model = tiny_mlp()
    learners, plan = make(model)
    learners.set(len(plan.phases) - 1, None)
    model(torch.ones(2, 6)).sum().backward()
    learners.set(0, None)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_phases_is_put_back_also_where_the_block_raises() -> None:
    model = tiny_mlp()
    learners, _ = make(model)
    learners.set(0, None)
    before = learners.names_now()
    with contextlib.suppress(KeyError), learners.all_phases():
        within = learners.names_now()
        raise KeyError
    assert within == frozenset(learners.parameters)
    assert learners.names_now() == before


def test_a_phase_that_draws_nothing_lets_all_of_its_groups_learn() -> None:
    learners, _ = make(tiny_mlp(), strategies.full)
    assert learners.draw(0, torch.Generator()) is None
