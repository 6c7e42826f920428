"""What `explain` counts as trainable is what a Tuner trains, whatever the norm policy."""

import pytest
import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.layers.mapping import layer_map
from layerwise.plans.explain import explain
from layerwise.plans.plan import Plan
from layerwise.plans.recipes import lisa
from layerwise.plans.settings import Norms
from layerwise.plans.strategies import full, linear_probe, pattern, top_k
from layerwise.plans.unfreezing import gradual_unfreezing
from layerwise.tuning.matching import constants_of
from layerwise.tuning.tuner import Tuner

POLICIES = (
    Norms(),
    Norms(tune=True),
    Norms(tune=True, rate=0),
    Norms(policy="freeze"),
    Norms(policy="freeze", tune=True, rate=0.1),
    Norms(policy="calibrate"),
    Norms(policy="adapt", rate=0.5),
    Norms(policy="adapt", rate=0),
)
STRATEGIES = (
    full,
    linear_probe,
    gradual_unfreezing,
    lambda layers, **options: top_k(layers, k=2, **options),
    lambda layers, **options: lisa(layers, groups=1, every_steps=1, **options),
    lambda layers, **options: pattern(layers, train=["bias"], **options),
    lambda layers, **options: pattern(layers, freeze=["bias"], **options),
)


def net() -> nn.Sequential:
    """Norms of each kind, in groups of their own and with other layers."""

    def block(width: int, norm: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, width), norm, nn.ReLU(), nn.Linear(width, 4))

    return nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        block(5, nn.BatchNorm1d(5)),
        block(6, nn.LayerNorm(6)),
        block(7, nn.BatchNorm1d(7, track_running_stats=False)),
        nn.Linear(4, 2),
    )


def by_group(layers: LayerMap) -> list[Norms]:
    """Return policies of two groups with batch-norms and of one with a LayerNorm, others for the rest."""
    assert layers.norms is not None
    of = {
        kind: [g.name for g in layers if any(layers.norms.get(name) == kind for name in g.parameters)]
        for kind in ("running", "plain")
    }
    (first, second), (tuned,) = of["running"], of["plain"]
    adapt = Norms(policy="adapt", rate=0.3)
    return [
        Norms(policy="freeze", groups={first: adapt, second: "follow", tuned: Norms(tune=True)}),
        Norms(policy="adapt", tune=True, groups={first: "freeze", second: "calibrate", tuned: "follow"}),
        Norms(policy="freeze_until", until=second, groups={first: adapt, second: "freeze"}),
    ]


def trained(model: nn.Module, plan: Plan, layers: LayerMap) -> list[int]:
    """Return how many scalars a Tuner lets learn at a time, by phase."""
    tuner = Tuner(model, plan, torch.optim.AdamW, lr=0.1, steps_per_epoch=2, layers=layers)
    found: list[int] = []
    for _ in tuner.epochs():
        found += [0] * (tuner.phase_index + 1 - len(found))
        for _ in range(2):
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found[tuner.phase_index] = max(found[tuner.phase_index], count)
            model(torch.randn(16, 4)).sum().backward()
            tuner.step()
    return found


@pytest.mark.filterwarnings("ignore:phase .* has the norm policy 'calibrate'")
@pytest.mark.parametrize("granularity", ["blocks", "layers"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_explain_counts_what_a_tuner_trains(strategy, granularity: str) -> None:
    model = net()
    layers = layer_map(model, torch.randn(2, 4), granularity=granularity)
    seen = set()
    until = Norms(policy="freeze_until", until=layers.names[2], rate=0.2)
    for norms in (*POLICIES, until, *by_group(layers)):
        plan = strategy(layers, epochs=24, norms=norms)
        told = [phase.trainable for phase in plan.explain(layers, steps_per_epoch=2).phases]
        assert told == trained(net(), plan, layers), norms
        seen.add(tuple(told))
    assert len(seen) > 1


@pytest.mark.filterwarnings("ignore:phase .* the norm policy ")
@pytest.mark.parametrize("granularity", ["blocks", "layers"])
@pytest.mark.parametrize("shared", ["weight", "bias"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LayerNorm])
def test_norms_of_two_groups_that_share_a_parameter(kind, shared: str, granularity: str) -> None:
    # each parameter goes with its own group, though the second norm stands in both
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(4, 4), kind(4), nn.ReLU(), nn.Linear(4, 4), kind(4), nn.Linear(4, 2))
        setattr(model[4], shared, getattr(model[1], shared))
        return model

    layers = layer_map(tied(), torch.randn(2, 4), granularity=granularity)
    own = next(group.name for group in layers for name in group.parameters if name.startswith("4."))
    tune = Norms(tune=True)
    for norms in (
        Norms(policy="freeze_until", until=own),
        Norms(policy="freeze", groups={own: "adapt"}),
        Norms(groups={own: tune}),
        tune,
    ):
        for strategy in (linear_probe, STRATEGIES[-1]):
            plan = strategy(layers, epochs=1, norms=norms)
            (told,) = plan.explain(layers, steps_per_epoch=2).phases
            assert [told.trainable] == trained(tied(), plan, layers), norms


def test_a_group_whose_rates_reach_constants_alone_is_frozen_and_its_norms_are_tuned() -> None:
    model = net()
    model[3][0].weight.requires_grad = False
    layers = layer_map(model, torch.randn(2, 4), granularity="blocks")
    name = next(group.name for group in layers if "3.0.weight" in group.parameters)
    others = {one: 0.0 for one in layers[name].parameters if one != "3.0.weight"}
    phase = {"name": "a", "rates": {name: 1.0, "5": 1.0}, "overrides": others, "epochs": 1}
    plan = Plan(granularity="blocks", groups=layers.names, phases=[phase | {"norms": Norms(tune=True)}])
    (told,) = explain(plan, layers, lr=None, steps_per_epoch=2, held=constants_of(model, layers)).phases
    tuned, head = 2 * 6 + 2 * 7, 4 * 2 + 2
    assert [told.trainable] == trained(model, plan, layers) == [tuned + head]


def test_the_row_of_a_group_tells_of_norms_that_learn_beside_its_overrides() -> None:
    model = net()
    layers = layer_map(model, torch.randn(2, 4), granularity="blocks")
    phase = {"name": "a", "rates": {}, "overrides": {"2.0.weight": 0.2}, "epochs": 1}
    phase["norms"] = Norms(policy="adapt", rate=0.5)
    plan = Plan(granularity="blocks", groups=layers.names, phases=[phase])
    tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    (row,) = plan.explain(layers, lr=0.1, steps_per_epoch=2).phases[0].groups
    learning = [p for p in model[2].parameters() if p.requires_grad]
    assert (row.name, row.parameters) == ("2", sum(p.numel() for p in learning))
    assert row.start == tuner.rates()["2"]
