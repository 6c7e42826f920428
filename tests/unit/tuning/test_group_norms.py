"""Norm policies of single groups: their norms do what their entry says, others what the phase says."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerwise
from helpers import changed, map_by_children, snapshot, tiny_cnn
from layerwise.errors import LayerwiseWarning, PlanError
from layerwise.layers.mapping import layer_map
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Norms
from layerwise.tuning.norms import apply_norms, release_norms
from layerwise.tuning.tuner import Tuner

AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def affine(*norms: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{name}" for norm in norms for name in AFFINE)


def tuner_of(
    model: nn.Module, *phases: dict[str, Any], layers: Any = None, optimizer: Any = torch.optim.SGD
) -> Tuner:
    """Return a Tuner over phases of one step each, at base rate 0.1."""
    layers = map_by_children(model) if layers is None else layers
    rows = [{"name": f"p{number}", "steps": 1, **phase} for number, phase in enumerate(phases)]
    plan = Plan(granularity=layers.granularity, groups=layers.names, phases=rows)
    return Tuner(model, plan, optimizer, lr=0.1, steps_per_epoch=1, layers=layers)


def step(tuner: Tuner, model: nn.Module, *, size: int = 8) -> set[str]:
    """Take one step on random images in train mode; return the names of all tensors that it changed."""
    model.train()
    before = snapshot(model)
    F.cross_entropy(model(torch.randn(4, 3, size, size) + 1), torch.tensor([0, 1, 2, 0])).backward()
    tuner.step()
    return changed(before, snapshot(model))


def moving(moved: set[str]) -> set[str]:
    """Return the norms whose statistics are among the tensors `moved`, all of them."""
    norms = {name.rpartition(".")[0] for name in moved if name.endswith(STATISTICS)}
    assert moved >= {f"{norm}.{name}" for norm in norms for name in STATISTICS}
    return norms


def rates(tuner: Tuner, model: nn.Module) -> dict[str, float]:
    """Return the rates of the affine parameters of norms that the optimiser holds."""
    held = {id(p): group["lr"] for group in tuner.optimizer.param_groups for p in group["params"]}
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return {
        name: pytest.approx(held[id(model.get_parameter(name))])
        for name in affine(*norms)
        if id(model.get_parameter(name)) in held
    }


# ------------------------------------------------------------------------------------------- a small network


@pytest.mark.parametrize(
    ("norms", "statistics", "trainable", "frozen"),
    [
        (Norms(groups={"layer2": "freeze"}), [], [], ["layer2"]),
        (Norms(policy="freeze", groups={"layer2": "follow"}), ["layer2"], [], []),
        (Norms(policy="freeze", groups={"stem": "follow"}), [], [], ["layer2"]),
        (Norms(policy="freeze", groups={"layer1": "adapt"}), ["layer1"], ["layer1"], ["layer2"]),
        (Norms(policy="adapt", groups={"stem": "freeze"}), ["layer1", "layer2"], ["layer1"], []),
        (Norms(groups={"stem": {"policy": "adapt", "rate": 0}}), ["stem", "layer2"], [], []),
        (Norms(policy="freeze", groups={"layer2": "calibrate"}), [], [], []),
        (
            Norms(policy="freeze_until", until="layer1", groups={"layer2": "freeze", "stem": "adapt"}),
            ["stem", "layer1"],
            ["stem", "layer1"],
            ["layer2"],
        ),
    ],
)
def test_each_group_follows_its_own_policy(norms, statistics, trainable, frozen) -> None:
    """With stem and layer1 frozen, layer2 and the head learning: what moves, and what learns."""
    model = tiny_cnn()
    record = apply_norms(model, map_by_children(model), {"stem", "layer1"}, norms)
    before = snapshot(model)
    model.train()(torch.randn(8, 3, 8, 8))
    assert moving(changed(before, snapshot(model))) == {f"{name}.1" for name in statistics}
    assert record.adapting == tuple(f"{name}.1" for name in statistics)
    assert set(record.adapting) | set(record.fixed) == {"stem.1", "layer1.1", "layer2.1"}
    assert record.trainable == affine(*(f"{name}.1" for name in trainable))
    assert record.frozen == affine(*(f"{name}.1" for name in frozen))
    assert record.policies == {f"{name}.1": norms.of(name).policy for name in ("stem", "layer1", "layer2")}
    assert not model.layer1[3].training  # dropout of a frozen group is silent whatever its norms do


def test_the_record_tells_the_rate_of_each_norm_and_what_to_measure() -> None:
    """Of each group its own."""
    model = tiny_cnn()
    norms = Norms(
        policy="adapt", rate=0.5, groups={"layer1": {"policy": "adapt", "rate": 0.1}, "layer2": "calibrate"}
    )
    record = apply_norms(model, map_by_children(model), ("stem", "layer1", "layer2"), norms)
    assert record.rates == dict.fromkeys(affine("stem.1"), 0.5) | dict.fromkeys(affine("layer1.1"), 0.1)
    assert record.trainable == tuple(record.rates)
    assert (record.policy, record.calibrating, record.calibrate) == ("adapt", ("layer2.1",), True)
    assert not apply_norms(model, map_by_children(model), (), Norms(groups={"stem": "adapt"})).calibrate


def test_momentum_is_that_of_the_group_and_the_next_call_takes_it_back() -> None:
    """A norm of another group keeps its own."""
    model = tiny_cnn()
    layers = map_by_children(model)
    groups = {"layer1": {"policy": "adapt", "momentum": 0.5}}
    apply_norms(model, layers, {"stem"}, Norms(policy="adapt", momentum=0.25, groups=groups))
    assert [model.stem[1].momentum, model.layer1[1].momentum] == [0.25, 0.5]
    apply_norms(model, layers, {"stem"}, Norms(groups=groups))
    assert [model.stem[1].momentum, model.layer1[1].momentum] == [0.1, 0.5]
    release_norms(model)
    assert [model.stem[1].momentum, model.layer1[1].momentum] == [0.1, 0.1]


@pytest.mark.parametrize("policy", [{"policy": "adapt"}, {"policy": "freeze_until", "until": "layer1"}])
def test_norms_that_adapt_learn_at_a_rate_of_their_own_where_their_group_learns_too(policy) -> None:
    """If asked; at the group's otherwise. A parameter singled out by the plan keeps its multiplier."""
    model = tiny_cnn()
    plan_rates = {"stem": 1.0, "layer1": 0.25, "fc": 1.0}
    single = {"stem.1.bias": 0.0, "layer1.1.bias": 0.75}
    phase = {"rates": plan_rates, "overrides": single, "norms": policy}
    asked = {**phase, "norms": {**policy, "rate": 0.5}}
    tuner = tuner_of(model, phase, asked)
    everywhere = policy["policy"] == "adapt"
    stem = {"stem.1.weight": 0.1} if everywhere else {}
    layer2 = dict.fromkeys(affine("layer2.1"), 0.1)
    assert rates(tuner, model) == stem | {"layer1.1.weight": 0.025, "layer1.1.bias": 0.075} | layer2
    step(tuner, model)
    stem, layer2 = dict.fromkeys(stem, 0.05), dict.fromkeys(layer2, 0.05)
    assert rates(tuner, model) == stem | {"layer1.1.weight": 0.05, "layer1.1.bias": 0.075} | layer2
    held = {id(p): group["lr"] for group in tuner.optimizer.param_groups for p in group["params"]}
    assert held[id(model.layer1[0].weight)] == pytest.approx(0.025)
    moved = step(tuner, model)
    assert ("stem.1.weight" in moved, "stem.1.bias" in moved) == (everywhere, False)


def test_norms_may_adapt_and_hold_their_affine_parameters() -> None:
    """At rate 0, in groups that learn as in frozen ones."""
    model = tiny_cnn()
    tuner = tuner_of(model, {"rates": {"layer2": 1.0, "fc": 1.0}, "norms": {"policy": "adapt", "rate": 0}})
    moved = step(tuner, model)
    assert moving(moved) == {"stem.1", "layer1.1", "layer2.1"}
    assert "layer2.0.weight" in moved
    assert moved.isdisjoint(affine("stem.1", "layer1.1", "layer2.1"))


def test_norms_without_statistics_are_tuned_by_group() -> None:
    """`tune` and its rate are those of the group of a LayerNorm or GroupNorm."""
    model = tiny_cnn()
    for block in (model.stem, model.layer1, model.layer2):
        block[1] = nn.GroupNorm(2, 4)
    layers = map_by_children(model)
    groups = {"stem": Norms(), "layer1": Norms(tune=True, rate=0.2)}
    record = apply_norms(model, layers, ("stem", "layer1", "layer2"), Norms(tune=True, groups=groups))
    assert record.rates == dict.fromkeys(affine("layer1.1"), 0.2) | dict.fromkeys(affine("layer2.1"), 1.0)
    tuner = tuner_of(model, {"rates": {"fc": 1.0}, "norms": {"groups": {"layer1": groups["layer1"]}}})
    moved = step(tuner, model)
    assert moved == {"fc.weight", "fc.bias", *affine("layer1.1")}


def test_a_norm_of_two_groups_goes_with_the_first_of_them() -> None:
    """Input to output, in whichever order they are named."""
    model = tiny_cnn()
    model.layer2[1] = model.layer1[1]
    layers = map_by_children(model)
    both = {"layer1": "adapt", "layer2": "freeze"}
    for first, policy in (("adapt", "freeze"), ("freeze", "adapt")):
        for order in (("layer1", "layer2"), ("layer2", "layer1")):
            both = {name: {"layer1": first, "layer2": policy}[name] for name in order}
            record = apply_norms(model, layers, {"layer1", "layer2"}, Norms(groups=both))
            assert record.policies["layer1.1"] == first
            assert ("layer1.1" in record.adapting) is (first == "adapt")


def test_statistics_of_a_norm_with_a_weight_of_another_groups_norm_go_with_the_first_of_them() -> None:
    """Its bias stands in a later group than its weight, and goes with that."""
    body = [part for _ in range(3) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())]
    model = nn.Sequential(*body, nn.Linear(4, 4))
    model[7].weight = model[4].weight
    layers = layer_map(model, torch.randn(2, 4), granularity="layers")
    frozen = layers.names[:-1]
    record = apply_norms(model, layers, frozen, Norms(policy="freeze", groups={"4": "adapt", "0": "follow"}))
    assert record.policies == {"1": "freeze", "4": "adapt", "7": "adapt"}
    assert record.adapting == ("4", "7")
    assert set(record.rates) == {"4.weight", "4.bias"}
    assert not apply_norms(model, layers, frozen, Norms()).adapting


def test_an_unknown_group_is_refused_and_nothing_changes() -> None:
    """Before a mode is set."""
    model = tiny_cnn()
    layers = map_by_children(model)
    record = apply_norms(model, layers, {"stem"}, Norms())
    with pytest.raises(PlanError, match="group 'layer3' is not in this layer map"):
        apply_norms(model, layers, (), Norms(groups={"layer3": "freeze"}))
    assert apply_norms(model, layers, {"stem"}, Norms()) == record


def test_groups_of_the_phases_own_policy_change_nothing() -> None:
    """An entry that says what the phase says is none."""
    model, twin = tiny_cnn(), tiny_cnn()
    layers = map_by_children(model)
    said = Norms(policy="adapt", rate=0.5, groups={"layer1": Norms(policy="adapt", rate=0.5)})
    one = apply_norms(model, layers, {"stem", "layer1"}, said)
    two = apply_norms(twin, layers, {"stem", "layer1"}, Norms(policy="adapt", rate=0.5))
    assert one == two


# ------------------------------------------------------------------------------------------- under a Tuner


def test_a_phase_change_takes_each_group_from_one_policy_to_another() -> None:
    """Modes, statistics, what learns and at which rate; groups that are not named follow the phase."""
    model = tiny_cnn()
    frozen = {"rates": {"fc": 1.0}}
    tuner = tuner_of(
        model,
        {**frozen, "norms": {"policy": "freeze", "groups": {"layer1": {"policy": "adapt", "rate": 0.5}}}},
        {**frozen, "norms": {"policy": "freeze", "groups": {"layer2": {"policy": "adapt", "rate": 0.2}}}},
        {**frozen, "norms": {"policy": "adapt", "groups": {"layer2": "freeze"}}},
        {"rates": {"layer2": 1.0, "fc": 1.0}, "norms": {"policy": "freeze", "groups": {"layer2": "follow"}}},
        {"rates": {"layer2": 1.0, "fc": 1.0}, "norms": "freeze"},
    )
    told = [
        ({"layer1.1"}, dict.fromkeys(affine("layer1.1"), 0.05)),
        ({"layer2.1"}, dict.fromkeys(affine("layer2.1"), 0.02)),
        ({"stem.1", "layer1.1"}, dict.fromkeys(affine("stem.1", "layer1.1"), 0.1)),
        ({"layer2.1"}, dict.fromkeys(affine("layer2.1"), 0.1)),
        (set(), {}),
    ]
    for number, (statistics, learning) in enumerate(told):
        assert tuner.phase_index == number
        assert rates(tuner, model) == learning
        model.train()
        awake = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
        assert awake == statistics
        moved = step(tuner, model)
        assert moving(moved) == statistics
        norms = {name for name in moved if ".1." in name and name.endswith(AFFINE)}
        assert norms == set(learning)
    assert tuner.done


def test_torchvisions_resnet_adapts_one_stage_and_freezes_another() -> None:
    """In layer3 norms move and learn though it is frozen, in layer4 they follow; elsewhere nothing does."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3)
    layers = layer_map(model, torch.randn(2, 3, 64, 64), granularity="stages")
    norms = {
        "policy": "freeze",
        "groups": {"layer3": {"policy": "adapt", "momentum": 0.05, "rate": 0.5}, "layer4": "follow"},
    }
    phase = {"rates": {"layer4": 0.1, "fc": 1.0}, "norms": norms}
    tuner = tuner_of(model, phase, layers=layers)
    of_stage = {
        stage: {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d) and name.startswith(stage)
        }
        for stage in ("layer3", "layer4")
    }
    assert list(map(len, of_stage.values())) == [5, 5]
    assert {model.get_submodule(name).momentum for name in of_stage["layer3"]} == {0.05}
    assert {model.get_submodule(name).momentum for name in of_stage["layer4"]} == {0.1}
    expected = dict.fromkeys(affine(*of_stage["layer3"]), 0.05) | dict.fromkeys(
        affine(*of_stage["layer4"]), 0.01
    )
    assert rates(tuner, model) == expected
    moved = step(tuner, model, size=64)
    assert moving(moved) == of_stage["layer3"] | of_stage["layer4"]
    assert {name for name in moved if name.startswith("layer3") and name.endswith(AFFINE)} == set(
        affine(*of_stage["layer3"])
    )
    assert not {name for name in moved if name.startswith(("conv1", "bn1", "layer1", "layer2"))}
    told = tuner.plan.explain(layers).phases[0]
    assert told.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_norms_frozen_by_name_are_held_in_groups_that_follow_and_only_there() -> None:
    """As under one policy for all: where the group's policy is to adapt, its norms adapt."""
    model = tiny_cnn()
    everywhere = dict.fromkeys(("stem", "layer1", "layer2", "fc"), 1.0)
    overrides = dict.fromkeys(affine("stem.1", "layer1.1"), 0.0)
    tuner = tuner_of(
        model, {"rates": everywhere, "overrides": overrides, "norms": {"groups": {"layer1": "adapt"}}}
    )
    moved = step(tuner, model)
    assert moving(moved) == {"layer1.1", "layer2.1"}
    assert not moved & set(overrides)


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    """From its state in the second phase on, in another model."""
    phases = [
        {"rates": {"fc": 1.0}, "norms": {"policy": "freeze", "groups": {"layer1": "adapt"}}},
        {
            "rates": {"fc": 1.0},
            "norms": {"groups": {"layer2": {"policy": "adapt", "momentum": 0.3, "rate": 0.2}}},
            "steps": 2,
        },
    ]
    model = tiny_cnn()
    tuner = tuner_of(model, *phases, optimizer=torch.optim.AdamW)
    step(tuner, model)
    step(tuner, model)
    state, weights = copy.deepcopy(tuner.state_dict()), snapshot(model)
    other = tiny_cnn(seed=1)
    again = tuner_of(other, *phases, optimizer=torch.optim.AdamW)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.norms == tuner.norms
    for one, two in ((tuner, model), (again, other)):
        torch.manual_seed(3)
        step(one, two)
    assert not changed(snapshot(model), snapshot(other))
    different = copy.deepcopy(phases)
    different[1]["norms"]["groups"]["layer2"]["rate"] = 0.3
    with pytest.raises(PlanError, match="the plan is another one"):
        tuner_of(tiny_cnn(), *different, optimizer=torch.optim.AdamW).load_state_dict(state)


@pytest.mark.parametrize("policy", ["adapt", "calibrate"])
def test_a_policy_of_a_group_without_norms_is_told(policy: str) -> None:
    """It changes nothing; to freeze no norm is done already."""
    model = tiny_cnn()
    norms = {"policy": "freeze", "groups": {"fc": policy, "stem": "freeze"}}
    tuner = tuner_of(model, {"rates": {"fc": 1.0}, "norms": norms})
    with pytest.warns(LayerwiseWarning, match="norm policy of 'fc' changes nothing: no norm with running"):
        step(tuner, model)
    quiet = tuner_of(tiny_cnn(), {"rates": {"fc": 1.0}, "norms": {"groups": {"fc": "freeze"}}})
    step(quiet, quiet._model)


def test_statistics_that_nobody_measured_are_told_of_the_groups_that_calibrate() -> None:
    """Those of other norms do not count; the names to give to `calibrate_batchnorm` are at hand."""
    model = tiny_cnn()
    norms = {"policy": "freeze", "groups": {"layer1": {"policy": "calibrate", "samples": 4}}}
    tuner = tuner_of(model, *[{"rates": {"fc": 1.0}, "norms": norms}] * 2)
    images = [torch.randn(8, 3, 8, 8) + 2]
    layerwise.calibrate_batchnorm(model, images, names=["stem.1"])
    with pytest.warns(LayerwiseWarning, match="nobody measured .* names=tuner.norms.calibrating"):
        step(tuner, model)
    before = snapshot(model)
    how = tuner.phase.norms.calibration
    assert how is not None
    layerwise.calibrate_batchnorm(model, images, samples=how.samples, names=tuner.norms.calibrating)
    assert moving(changed(before, snapshot(model))) == {"layer1.1"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(tuner, model)


def test_a_plan_whose_policies_let_nothing_learn_tells_them_all() -> None:
    """Rates reach norms alone and an entry holds them."""
    model = tiny_cnn()
    norms = {"policy": "freeze", "groups": {"layer1": {"policy": "freeze", "tune": True, "rate": 0.5}}}
    phase = {"rates": {}, "overrides": {"stem.1.weight": 1.0}, "norms": norms}
    told = (
        r"norm policy 'freeze' \(rate 1, tune False\), 'freeze' in 'layer1' \(rate 0.5, tune True\) lets none"
    )
    with pytest.raises(PlanError, match=told):
        tuner_of(model, phase)
