"""The Tuner on tiny models: phases, optimiser state, checks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import Lamb, Lion, Lookahead
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor as HFAdafactor

import layerwise
from helpers import batches, changed, map_by_children, snapshot, tiny_cnn, tiny_mlp
from layerwise.errors import LayerwiseWarning, ModelError, PlanError
from layerwise.plans import recipes, strategies, unfreezing
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.settings import Norms, Schedule
from layerwise.tuning.gradient_norms import MEASURED_STEPS, RelativeGradientNorms
from layerwise.tuning.tuner import Tuner

STEPS = 3


def make(
    plan: Any, *, model: nn.Module | None = None, optimizer: Any = torch.optim.AdamW, **options: Any
) -> Tuner:
    """Return a Tuner on the tiny MLP (or `model`) with `plan`, which may be a strategy of its map."""
    model = tiny_mlp() if model is None else model
    layers = map_by_children(model)
    if callable(plan):
        plan = plan(layers)
    return Tuner(
        model, plan, optimizer, **{"lr": 0.01, "steps_per_epoch": STEPS, "layers": layers, **options}
    )


def train(
    tuner: Tuner,
    *,
    shape: tuple[int, ...] = (6,),
    classes: int = 3,
    stop: int | None = None,
    metric: Any = None,
) -> None:
    """Run the loop, each step on its own batch, until the plan is done or `stop` steps are taken."""
    model = tuner._model
    for epoch in tuner.epochs():
        for inputs, labels in batches(STEPS, shape, classes=classes, seed=epoch)[tuner.step_in_epoch :]:
            F.cross_entropy(model(inputs), labels).backward()
            tuner.step()
            if tuner.done or tuner.step_count == stop:
                break
        if stop is not None and tuner.step_count >= stop:
            return
        if metric is not None:
            tuner.end_epoch(metric(epoch))


def gradual(layers: Any, **options: Any) -> Plan:
    return unfreezing.gradual_unfreezing(layers, decay=0.5, **{"last_epochs": 1, "join_steps": 2, **options})


# ------------------------------------------------------------------ who learns


def test_exactly_the_groups_of_the_phase_move() -> None:
    """After the probe phase only the head has moved; after the plan everything has."""
    model = tiny_mlp()
    tuner = make(lambda layers: unfreezing.lp_ft(layers, epochs=2), model=model)
    before = snapshot(model)
    train(tuner, stop=STEPS - 1)
    assert changed(before, snapshot(model)) == {"head.weight", "head.bias"}
    train(tuner)
    assert changed(before, snapshot(model)) == set(before)
    assert tuner.done


def test_param_groups_hold_exactly_the_trainable_parameters() -> None:
    """In every phase the optimiser holds what requires gradients, in groups named after layer groups."""
    tuner = make(gradual)
    seen = []
    for _ in tuner.epochs():
        held = {id(p) for group in tuner.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in tuner._model.parameters() if p.requires_grad}
        seen.append([group["name"] for group in tuner.optimizer.param_groups])
        for inputs, labels in batches(STEPS, (6,), classes=3):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    assert seen[0] == ["head", "head (no decay)"]
    assert seen[1] == ["head", "b2", "b2 (no decay)", "head (no decay)"]
    assert seen[3][:2] == ["head", "b0"]


def test_frozen_modules_stay_still_whatever_train_mode_is_asked() -> None:
    """Batch-norm buffers of frozen groups do not move and their dropout is silent, after model.train()."""
    model = tiny_cnn()
    tuner = make(lambda layers: strategies.blocks(layers, ["layer2:"], epochs=1), model=model)
    model.train()
    before = snapshot(model)
    train(tuner, shape=(3, 8, 8), classes=4)
    moved = changed(before, snapshot(model))
    assert not {name for name in moved if name.startswith(("stem", "layer1"))}
    assert {name for name in moved if name.startswith("layer2")} >= {
        "layer2.0.weight",
        "layer2.1.running_mean",
    }


def test_norms_frozen_by_pattern_keep_their_statistics() -> None:
    """A plan that freezes batch-norm by name in groups that learn holds its running statistics too."""
    model = tiny_cnn()
    tuner = make(lambda layers: strategies.pattern(layers, freeze=["re:[.]1[.]"], epochs=1), model=model)
    assert tuner.norms.adapting == ()
    assert tuner.norms.fixed == ("stem.1", "layer1.1", "layer2.1")
    assert tuner.norms.pinned == 3
    before = snapshot(model.train())
    train(tuner, shape=(3, 8, 8), classes=4)
    moved = changed(before, snapshot(model))
    assert "stem.0.weight" in moved
    assert not {name for name in moved if ".1." in name}


def test_norms_that_should_move_and_are_in_eval_mode_are_told() -> None:
    """A loop that puts modes back one by one after eval() leaves a group that joins asleep, and is told."""
    model = tiny_cnn().train()
    tuner = make(lambda layers: gradual(layers), model=model)

    def steps() -> None:
        for _ in range(tuner.steps_per_epoch):
            model(torch.randn(4, 3, 8, 8)).sum().backward()
            tuner.step()

    epochs = tuner.epochs()
    next(epochs)
    steps()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module, mode in modes.items():
        module.training = mode
    next(epochs)
    told = r"statistics of 'layer2\.1' should move, but these are in eval mode\. Call model\.train\(\)"
    with pytest.warns(LayerwiseWarning, match=told):
        steps()
    model.train()
    next(epochs)
    steps()  # those of layer1.1 move as well, and nothing is told


def test_statistics_that_should_move_and_are_not_tracked_are_told() -> None:
    """Where tracking was switched off, a norm that learns keeps its old statistics for eval mode."""
    model = tiny_cnn().train()
    for path in ("stem.1", "layer2.1"):
        model.get_submodule(path).track_running_stats = False  # type: ignore[assignment]
    tuner = make(lambda layers: strategies.blocks(layers, ["layer2", "head"], epochs=1), model=model)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    told = r"statistics of 'layer2\.1' should move, but .*set track_running_stats to True"
    with pytest.warns(LayerwiseWarning, match=told):
        tuner.step()


def test_norm_policies_decide_over_the_affine_parameters() -> None:
    """Policy freeze takes norms out of learning groups; adapt adds those of frozen ones, at its rate."""
    norms = {f"{part}.1.{kind}" for part in ("stem", "layer1", "layer2") for kind in ("weight", "bias")}
    model = tiny_cnn()
    tuner = make(lambda layers: strategies.full(layers, norms="freeze", epochs=1), model=model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == norms
    before = snapshot(model.train())
    train(tuner, shape=(3, 8, 8), classes=4)
    assert not {name for name in changed(before, snapshot(model)) if ".1." in name}

    model = tiny_cnn()
    policy = Norms(policy="adapt", rate=0.5)
    tuner = make(lambda layers: strategies.linear_probe(layers, norms=policy, epochs=1), model=model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == norms | {
        "fc.weight",
        "fc.bias",
    }
    assert tuner.rates() == {"stem": 0.005, "layer1": 0.005, "layer2": 0.005, "fc": 0.01}
    assert tuner.trainable_names(0) == tuner.trainable_names()
    before = snapshot(model.train())
    train(tuner, shape=(3, 8, 8), classes=4)
    moved = changed(before, snapshot(model))
    assert norms <= moved
    assert "stem.1.running_mean" in moved
    assert "stem.0.weight" not in moved


def test_policies_that_find_no_norm_are_told_where_they_should_change_something() -> None:
    """To hold the statistics of no norm is done already; to adapt none is not what was asked for."""

    def step(norms: Any) -> None:
        tuner = make(lambda layers: strategies.linear_probe(layers, norms=norms, epochs=1))
        tuner._model.train()(torch.randn(4, 6)).sum().backward()
        tuner.step()

    step("freeze")
    for policy in ("adapt", "calibrate"):
        with pytest.warns(LayerwiseWarning, match=rf"'{policy}' changes nothing.*tune: Norms\(tune=True\)"):
            step(policy)


def test_overrides_get_their_own_rate() -> None:
    """A parameter with an override learns at its own multiple in a param group of its own."""
    model = tiny_mlp(blocks=1)
    layers = map_by_children(model)
    phase = Phase(
        name="a", rates={"b0": 1.0, "head": 1.0}, overrides={"b0.0.weight": 0.1, "head.bias": 0.0}, epochs=1
    )
    tuner = make(Plan(groups=layers.names, phases=(phase,)), model=model)
    rates = {group["name"]: group["lr"] for group in tuner.optimizer.param_groups}
    assert rates == {
        "b0 x0.1": pytest.approx(0.001),
        "b0 (no decay)": pytest.approx(0.01),
        "head": pytest.approx(0.01),
    }
    assert not model.head.bias.requires_grad


def test_trainable_names_of_other_phases_change_nothing() -> None:
    """Asking what a later phase trains leaves modes and requires_grad as they are, and is right later."""
    model = tiny_cnn().train()
    tuner = make(gradual, model=model)
    modes = {name: module.training for name, module in model.named_modules()}
    asked = [tuner.trainable_names(index) for index in range(len(tuner.plan.phases))]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert tuner.trainable_names() == asked[0] == {"fc.weight", "fc.bias"}
    train(tuner, shape=(3, 8, 8), classes=4)
    assert tuner.trainable_names() == asked[-1] == frozenset(name for name, _ in model.named_parameters())


# ------------------------------------------------------------------ optimisers


class Eager(torch.optim.Optimizer):
    """Adagrad as it was in older torch, and as others write it: all state is made at once."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    total = self.state[parameter]["sum"].addcmul_(parameter.grad, parameter.grad)
                    parameter.addcdiv_(parameter.grad, total.sqrt() + 1e-8, value=-group["lr"])


FACTORIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adamw amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adafactor": (torch.optim.Adafactor, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "state made at once": (Eager, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "factory": (lambda groups: torch.optim.NAdam(groups, lr=1.0), {}),
    "timm lion": (Lion, {}),
    "transformers adafactor": (HFAdafactor, {"relative_step": False, "warmup_init": False}),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_state_survives_phase_changes_bit_for_bit(name: str) -> None:
    """At each phase change the state of parameters that go on learning is untouched, tensor by tensor."""
    factory, options = FACTORIES[name]
    tuner = make(gradual, optimizer=factory, **options)
    for epoch in tuner.epochs():
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
        before = {id(p): copy.deepcopy(dict(state)) for p, state in tuner.optimizer.state.items()}
        kept = {id(p) for group in tuner.optimizer.param_groups for p in group["params"]}
        tuner.end_epoch()
        assert before or epoch == 0
        for p, state in tuner.optimizer.state.items():
            if id(p) in kept:
                assert state.keys() == before[id(p)].keys()
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[id(p)][key])), key


@pytest.mark.parametrize("name", FACTORIES)
def test_every_trainable_parameter_is_stepped(name: str) -> None:
    """With any optimiser every parameter that learns moves in the last phase, early and late joiners."""
    factory, options = FACTORIES[name]
    tuner = make(gradual, optimizer=factory, **options)
    last = len(tuner.plan.phases) - 1
    before: dict[str, torch.Tensor] = {}
    for epoch in tuner.epochs():
        if tuner.phase_index == last:
            before = snapshot(tuner._model)
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    assert changed(before, snapshot(tuner._model)) == set(before)


def test_refrozen_groups_release_state_and_gradients() -> None:
    """A group that is frozen again loses its moments and its gradients, and starts clean later."""
    model = tiny_mlp(blocks=1)
    layers = map_by_children(model)
    rows = [
        Phase(name="both", rates={"b0": 1.0, "head": 1.0}, steps=1),
        Phase(name="head", rates={"head": 1.0}, steps=1),
        Phase(name="again", rates={"b0": 1.0, "head": 1.0}, steps=1),
    ]
    tuner = make(Plan(groups=layers.names, phases=tuple(rows)), model=model)
    weight = model.b0[0].weight
    (inputs, labels), *_ = batches(1, (6,), classes=3)
    steps = []
    for _ in tuner.epochs():
        for _ in range(STEPS):
            F.cross_entropy(model(inputs), labels).backward()
            tuner.step()
            steps.append((weight.requires_grad, weight.grad is None, weight in tuner.optimizer.state))
            if tuner.done:
                break
    assert steps == [(False, True, False), (True, True, False), (True, True, True)]
    assert float(tuner.optimizer.state[weight]["step"]) == 1
    assert float(tuner.optimizer.state[model.head.weight]["step"]) == 3


def test_what_an_optimiser_reads_in_its_first_group_goes_on_when_groups_join() -> None:
    """Prodigy takes its estimate of the rate from the first group; a joiner before that would reset it."""

    class Growing(torch.optim.SGD):
        def __init__(self, groups: Any, lr: float) -> None:
            super().__init__(groups, lr=lr)
            self.defaults["d"] = 1
            for group in self.param_groups:
                group["d"] = 1

        def step(self, closure: Any = None) -> None:
            d = self.param_groups[0]["d"] + 1
            for group in self.param_groups:
                group["d"] = d

    tuner = make(gradual, optimizer=Growing)
    train(tuner, stop=2 * STEPS - 1)
    again = make(gradual, optimizer=Growing)
    again.load_state_dict(copy.deepcopy(tuner.state_dict()))
    for running in (tuner, again):
        train(running)
        assert {group["d"] for group in running.optimizer.param_groups} == {1 + running.total_steps}


def test_an_optimiser_around_another_starts_refrozen_groups_clean_too() -> None:
    """Lookahead's weights and the moments of what it wraps: none is left of a group that was frozen again."""
    model = tiny_mlp(blocks=1)
    both = {"b0": 1.0, "head": 1.0}
    rows = [
        Phase(name="both", rates=both, steps=1),
        Phase(name="head", rates={"head": 1.0}, steps=1),
        Phase(name="again", rates=both, steps=1),
    ]

    def lookahead(groups: Any, lr: float) -> Lookahead:
        return Lookahead(torch.optim.Adagrad(groups, lr=lr), k=1)

    tuner = make(
        Plan(groups=map_by_children(model).names, phases=tuple(rows)), model=model, optimizer=lookahead
    )
    inner = tuner.optimizer._base_optimizer
    weight = model.b0[0].weight
    (inputs, labels), *_ = batches(1, (6,), classes=3)
    seen = []
    for _ in range(3):
        F.cross_entropy(model(inputs), labels).backward()
        tuner.step()
        seen.append(sorted(inner.state[weight]) if weight in inner.state else [])
        assert len(tuner.state_dict()["optimizer"]["state"]) == len(inner.state)
    assert seen == [[], ["step", "sum"], ["lookahead_slow_buff", "step", "sum"]]
    assert float(inner.state[weight]["step"]) == 1
    assert float(inner.state[model.head.weight]["step"]) == 3


def test_what_an_optimiser_keeps_in_a_group_stays_where_its_multiplier_changes() -> None:
    """Lamb counts the steps of a group, by which it corrects the moments: as long as those it counts on."""
    rates = {"b0": 1.0, "b1": 1.0, "b2": 1.0, "head": 1.0}
    rows = [
        Phase(name="a", rates=rates, epochs=1),
        Phase(name="b", rates=rates, overrides={"b0.0.weight": 0.5}, epochs=1),
    ]
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows), optimizer=Lamb)
    train(tuner, stop=STEPS + 1)
    groups = {group["name"]: group for group in tuner.optimizer.param_groups}
    assert groups["b0 x0.5"]["lr"] == 0.005
    assert {int(group["step"]) for group in groups.values()} == {STEPS + 1}


def test_biases_join_norms_that_have_momentum_under_fused_sgd() -> None:
    """Torch's fused SGD takes the momentum of all of a param group or of none; joiners start as ever."""
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        model = nn.Sequential(nn.Linear(6, 6), body, nn.Linear(6, 3))
        tuner = make(
            lambda layers: unfreezing.lp_ft(layers, epochs=2, norms=Norms(tune=True)),
            model=model,
            optimizer=torch.optim.SGD,
            momentum=0.9,
            fused=fused,
        )
        train(tuner)
        weights.append(snapshot(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])


def test_weight_decay_applies_to_matrices_alone() -> None:
    """Matrices get the given decay, vectors none; without one matrices keep the optimiser's default."""
    for given, expected in ((0.3, 0.3), (None, 0.01)):
        tuner = make(strategies.full, weight_decay=given)
        for group in tuner.optimizer.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (expected if parameter.ndim >= 2 else 0.0)


def test_joiners_get_their_decay_too() -> None:
    """A param group that joins later has the same weight decay rule as the first ones."""
    tuner = make(gradual, weight_decay=0.3)
    train(tuner)
    decays = {
        (p.ndim >= 2, group["weight_decay"])
        for group in tuner.optimizer.param_groups
        for p in group["params"]
    }
    assert decays == {(True, 0.3), (False, 0.0)}


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (torch.optim.LBFGS, "LBFGS takes one param group"),
        (
            lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]),
            "LBFGS takes one param group",
        ),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "an optimiser instance"),
        ("adam", "expected a class"),
    ],
)
def test_unusable_optimisers_are_refused(factory: Any, told: str) -> None:
    """LBFGS, an instance and a string each get a clear error."""
    with pytest.raises(PlanError, match=told):
        make(strategies.full, optimizer=factory)


def test_decay_without_such_an_option_is_refused() -> None:
    """weight_decay for an optimiser that has none is an error, not a silent nothing."""

    class Plain(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

    with pytest.raises(PlanError, match="has no such option"):
        make(strategies.full, optimizer=Plain, weight_decay=0.1)


def test_tensor_rates_are_filled_in_place() -> None:
    """A capturable optimiser's tensor rate stays the same tensor while the schedule moves it."""
    tuner = make(lambda layers: strategies.full(layers, epochs=1, schedule="linear"))
    for group in tuner.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    tensors = [group["lr"] for group in tuner.optimizer.param_groups]
    train(tuner)
    assert all(group["lr"] is tensor for group, tensor in zip(tuner.optimizer.param_groups, tensors))
    assert float(tensors[0]) == pytest.approx(0.01 / STEPS)


# ------------------------------------------------------------------ phases and lengths


def test_phases_by_steps_change_in_the_middle_of_an_epoch() -> None:
    """A plan by steps changes phase at its step, ends at its last one, and says so to a loop that goes on."""
    tuner = make(lambda layers: gradual(layers, steps_per_group=2, last_steps=4, last_epochs=None))
    assert (tuner.total_steps, tuner.total_epochs) == (10, 4)
    phases = []

    def loop() -> None:
        for _ in tuner.epochs():
            for inputs, labels in batches(STEPS, (6,), classes=3):
                phases.append(tuner.phase_index)
                F.cross_entropy(tuner._model(inputs), labels).backward()
                tuner.step()

    with pytest.warns(LayerwiseWarning, match="the plan ended at step 10"):
        loop()
    assert phases[:10] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert (tuner.step_count, tuner.epoch, tuner.done) == (10, 4, True)


def test_a_loop_that_goes_on_is_told_which_norms_still_move() -> None:
    """tuner.step() cannot undo a batch: the norms that learn have moved by it, and the warning names them."""
    model = tiny_cnn()
    tuner = make(lambda layers: strategies.full(layers, steps=1), model=model)
    tuner.begin_epoch()
    seen = []
    for inputs, labels in batches(2, (3, 8, 8), classes=3):
        F.cross_entropy(model(inputs), labels).backward()
        if tuner.done:
            with pytest.warns(
                LayerwiseWarning, match=r"statistics of 3 norms that learn \(stem.1, .*\) all the"
            ):
                tuner.step()
        else:
            tuner.step()
        seen.append(snapshot(model))
    assert {name.rpartition(".")[2] for name in changed(*seen)} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }


def test_totals_hold_at_every_step() -> None:
    """total_steps and total_epochs are the same at every step of a run in which no phase ends early."""
    tuner = make(lambda layers: gradual(layers, steps_per_group=2, last_steps=4, last_epochs=None))
    seen = set()
    for _ in tuner.epochs():
        for inputs, labels in batches(STEPS, (6,), classes=3):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
            seen.add((tuner.total_steps, tuner.total_epochs))
            if tuner.done:
                break
    assert seen == {(10, 4)}


def test_epochs_after_a_phase_by_steps_end_by_steps() -> None:
    """A phase in epochs that begins inside an epoch takes as many steps as its epochs have."""
    model = tiny_mlp(blocks=1)
    rows = (
        Phase(name="a", rates={"head": 1.0}, steps=2),
        Phase(name="b", rates={"b0": 1.0, "head": 1.0}, epochs=1),
    )
    tuner = make(Plan(groups=("b0", "head"), phases=rows), model=model)
    assert (tuner.total_steps, tuner.total_epochs) == (2 + STEPS, 2)
    train(tuner)
    assert (tuner.step_count, tuner.epoch) == (2 + STEPS, 2)


def test_phase_ends_when_validation_stalls() -> None:
    """With patience 1 a phase ends after one epoch without improvement, and not before its first two."""
    tuner = make(lambda layers: gradual(layers, patience_epochs=1, epochs_per_group=5))
    phases = []

    def metric(epoch: int) -> float:
        phases.append(tuner.phase_index)
        return 0.5

    train(tuner, metric=metric)
    assert phases == [0, 0, 1, 1, 2, 2, 3]
    assert tuner.total_epochs == tuner.epoch == 7


@pytest.mark.parametrize("metric", [np.float64(0.5), torch.tensor(0.5)])
def test_a_metric_of_numpy_or_torch_is_kept_as_a_number(metric: Any) -> None:
    """The state is data that weights_only=True loads, whatever the loop computes its metric with."""
    plateau = Schedule(shape="plateau")
    tuner = make(lambda layers: gradual(layers, patience_epochs=1, epochs_per_group=5, schedule=plateau))
    train(tuner, stop=STEPS)
    tuner.end_epoch(metric)
    assert [type(tuner.state_dict()[name]["best"]) for name in ("stall", "plateau")] == [float, float]


def test_validation_before_the_first_step_of_a_phase_is_not_its_own() -> None:
    """After a phase in steps that filled an epoch, a phase in epochs counts from the next one."""
    first = Phase(name="steps", rates={"head": 1.0}, steps=STEPS)
    waits = Phase(
        name="epochs",
        rates={"head": 1.0},
        epochs=4,
        patience_epochs=2,
        schedule=Schedule(shape="plateau", patience_epochs=1, factor=0.5),
    )
    tuner = make(Plan(groups=["b0", "b1", "b2", "head"], phases=[first, waits]))
    values, rates, ended = iter([0.5, 0.1, 0.1, 0.1]), [], []

    def metric(epoch: int) -> float:
        rates.append(tuner.rates()["head"])
        ended.append(tuner.phase_index)
        return next(values)

    train(tuner, metric=metric)
    assert (tuner.epoch, tuner.step_count) == (4, 4 * STEPS)
    assert ended == [1, 1, 1, 1]
    assert rates == [0.01] * 4


def test_a_phase_in_epochs_after_full_epochs_in_steps_ends_with_an_epoch() -> None:
    """It begins with an epoch, and so ends with one when the loader gives fewer batches than were told."""
    phases = [Phase(name="a", rates={"head": 1.0}, steps=STEPS), Phase(name="b", rates={"b2": 1.0}, epochs=1)]
    tuner = make(Plan(groups=["b0", "b1", "b2", "head"], phases=phases))
    for inputs, labels in batches(STEPS + 2, (6,), classes=3):
        F.cross_entropy(tuner._model(inputs), labels).backward()
        tuner.step()
        if tuner.step_count == STEPS:
            tuner.end_epoch()
    with pytest.warns(LayerwiseWarning, match="had 2 optimiser steps"):
        tuner.end_epoch()
    assert tuner.done
    assert (tuner.epoch, tuner.step_count) == (2, STEPS + 2)


def test_plateau_lowers_the_rate_and_keeps_ratios() -> None:
    """The plateau schedule multiplies all rates by its factor each time validation stalls."""
    schedule = Schedule(shape="plateau", patience_epochs=1, factor=0.5, floor=0.2)
    tuner = make(lambda layers: strategies.discriminative(layers, decay=0.5, epochs=8, schedule=schedule))
    heads = []

    def metric(epoch: int) -> float:
        heads.append(tuner.rates()["head"])
        assert tuner.rates()["b2"] == pytest.approx(0.5 * heads[-1])
        return float("nan") if epoch == 0 else 0.3

    train(tuner, metric=metric)
    assert heads == pytest.approx([0.01] * 4 + [0.005] * 2 + [0.0025] * 2)


def test_a_plateau_of_the_run_goes_on_behind_a_phase_with_another_schedule() -> None:
    """Its stalls and its best value are kept, in a saved state too."""
    plateau = Schedule(shape="plateau", patience_epochs=0, factor=0.5, span="run")
    schedules = [plateau, Schedule(shape="plateau", patience_epochs=0, factor=0.1), plateau]
    phases = [
        Phase(name=f"{number}", rates={"head": 1.0}, epochs=2, schedule=schedule)
        for number, schedule in enumerate(schedules)
    ]
    plan = Plan(groups=["b0", "b1", "b2", "head"], phases=phases)
    tuner = make(plan)
    heads = []

    def metric(epoch: int) -> float:
        heads.append(tuner.rates()["head"])
        return [0.5, 0.3, 0.4, 0.3, 0.4, 0.4][epoch]

    train(tuner, metric=metric)
    assert heads == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005, 0.0025])
    again = make(plan)
    again.load_state_dict(tuner.state_dict())
    for part in ("progress", "run_plateau"):
        assert again.state_dict()[part] == tuner.state_dict()[part]


def test_stall_without_a_metric_warns_once() -> None:
    """A plan that waits for validation and gets no metric runs to its limit, and says why."""
    tuner = make(lambda layers: gradual(layers, patience_epochs=1, epochs_per_group=2))
    with pytest.warns(LayerwiseWarning, match="got no metric") as caught:
        train(tuner)
    assert len(caught) == 1
    assert tuner.epoch == 7


def test_joining_groups_warm_up_and_the_others_keep_their_ratio() -> None:
    """A joiner's rate rises over join_steps; the ratio of the groups already there never changes."""
    tuner = make(lambda layers: gradual(layers, join_steps=2))
    seen = []
    for epoch in tuner.epochs():
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            seen.append(tuner.rates())
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    assert [rates["b2"] / rates["head"] for rates in seen[STEPS:]] == pytest.approx(
        [0.5 / 3, 1.0 / 3] + [0.5] * (3 * STEPS - 2)
    )


def test_reinit_starts_weights_anew_without_touching_the_random_state() -> None:
    """reinit changes exactly the named groups when the phase begins, from the Tuner's seed alone."""
    weights = []
    for _ in range(2):
        model = tiny_mlp()
        before = snapshot(model)
        tuner = make(lambda layers: recipes.reinit_last(layers, k=1, epochs=1), model=model, seed=7)
        assert not changed(before, snapshot(model))
        state = torch.get_rng_state()
        next(tuner.epochs())
        assert torch.equal(torch.get_rng_state(), state)
        assert changed(before, snapshot(model)) == {"b2.0.weight", "b2.0.bias", "head.weight", "head.bias"}
        weights.append(snapshot(model))
        torch.rand(3)
    assert not changed(*weights)


def test_lisa_draws_groups_and_frees_the_others() -> None:
    """So many trunk groups learn at a time, drawn anew on time; stem and head always do."""
    model = tiny_mlp(blocks=6)
    tuner = make(lambda layers: recipes.lisa(layers, groups=2, every_steps=2, epochs=6), model=model)
    drawn = []
    for epoch in tuner.epochs():
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            F.cross_entropy(model(inputs), labels).backward()
            names = [name for name, rate in tuner.rates().items() if rate]
            assert names[0] == "b0"
            assert names[-1] == "head"
            drawn.append(tuple(names[1:-1]))
            tuner.step()
            assert set(tuner.optimizer.state) <= {p for p in model.parameters() if p.requires_grad}
    assert {len(groups) for groups in drawn} == {2}
    assert all(first == second for first, second in zip(drawn[::2], drawn[1::2]))
    assert len(set(drawn)) > 2
    assert tuner.trainable_names(0) == {name for name, _ in model.named_parameters()}


def test_lisa_draws_groups_that_learn_by_overrides_alone() -> None:
    """A trunk group of which single parameters learn is drawn in turn, and counts as one that is."""
    phase = Phase(
        name="draw",
        rates={"b1": 1.0, "head": 1.0},
        overrides={"b2.0.bias": 2.0},
        steps=12,
        sample_groups=1,
        sample_every_steps=1,
    )
    tuner = make(Plan(groups=["b0", "b1", "b2", "head"], phases=[phase]))
    (summary,) = tuner.plan.explain(tuner.layers, steps_per_epoch=STEPS).phases
    drawn = set()
    for epoch in tuner.epochs():
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            if tuner.done:
                break
            drawn.add(tuner.trainable_names())
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    head = {"head.weight", "head.bias"}
    assert drawn == {frozenset(head | {"b1.0.weight", "b1.0.bias"}), frozenset(head | {"b2.0.bias"})}
    assert summary.trainable == max(
        sum(tuner._learners.parameters[n].numel() for n in names) for names in drawn
    )


def test_trainable_names_hold_norms_that_learn_while_lisa_lets_their_group_rest() -> None:
    """A norm that its group's overrides leave out learns by the norm policy where the group is not drawn."""
    body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model = nn.Sequential(nn.Linear(6, 6), body, nn.Linear(6, 6), nn.Linear(6, 3))
    phase = Phase(
        name="draw",
        rates={"2": 1.0, "3": 1.0},
        overrides={"1.0.weight": 1.0},
        epochs=1,
        norms=Norms(policy="adapt"),
        sample_groups=1,
        sample_every_steps=1,
    )
    tuner = make(lambda layers: Plan(groups=layers.names, phases=[phase]), model=model)
    seen = set()
    for seed in range(8):
        tuner = make(tuner.plan, model=model, seed=seed)
        assert tuner.trainable_names() <= tuner.trainable_names(0)
        seen.add("1.1.weight" in tuner.trainable_names())
    assert seen == {True, False}


def test_auto_rgn_follows_the_measured_gradients() -> None:
    """Rates are shares of the largest |gradient| / |weights|, as computed by hand on the first step."""
    model = tiny_mlp(blocks=1)
    tuner = make(lambda layers: recipes.auto_rgn(layers, epochs=2), model=model, optimizer=torch.optim.SGD)
    (inputs, labels), *_ = batches(1, (6,), classes=3)
    next(tuner.epochs())
    F.cross_entropy(model(inputs), labels).backward()

    def rgn(part: nn.Module) -> float:
        flat = torch.cat([p.detach().flatten() for p in part.parameters()])
        grad = torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
        return float(grad.norm() / flat.norm())

    by_hand = {"b0": rgn(model.b0), "head": rgn(model.head)}
    tuner.step()
    largest = max(by_hand.values())
    assert tuner.rates() == pytest.approx(
        {name: 0.01 * value / largest for name, value in by_hand.items()}, rel=1e-5
    )


def test_l2_sp_pulls_to_the_pretrained_weights_apart_from_the_moments() -> None:
    """One step with L2-SP differs by -rate * strength * (w - w0) from one without; the moments are equal."""
    (inputs, labels), *_ = batches(1, (6,), classes=3)

    def run(strength: float) -> tuple[nn.Sequential, Tuner]:
        model = tiny_mlp(blocks=1)
        tuner = make(
            lambda layers: strategies.full(layers, epochs=1, l2_sp=strength), model=model, weight_decay=0.0
        )
        epochs = tuner.epochs()
        next(epochs)
        with torch.no_grad():
            model.b0[0].weight += 1.0  # now 1 away from the reference
            model.head.weight += 1.0
        F.cross_entropy(model(inputs), labels).backward()
        tuner.step()
        return model, tuner

    (plain, plain_tuner), (pulled, pulled_tuner) = run(0.0), run(0.5)
    difference = plain.b0[0].weight - pulled.b0[0].weight
    assert torch.allclose(difference, torch.full_like(difference, 0.01 * 0.5), atol=1e-6)
    assert torch.equal(plain.head.weight, pulled.head.weight)
    for one, other in zip(plain_tuner.optimizer.state.values(), pulled_tuner.optimizer.state.values()):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    assert set(pulled_tuner.state_dict()["references"]) == {"b0.0.weight", "b0.0.bias"}


def test_l2_sp_copies_nothing_that_is_frozen() -> None:
    """References are taken when a parameter is first unfrozen, and never for what stays frozen."""
    tuner = make(lambda layers: gradual(layers, l2_sp=0.1))
    held = []
    for epoch in tuner.epochs():
        held.append({name.split(".")[0] for name in tuner.state_dict()["references"]})
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    assert held == [set(), {"b2"}, {"b1", "b2"}, {"b0", "b1", "b2"}]


# ------------------------------------------------------------------ checks


def test_a_parameter_without_gradient_is_named_once() -> None:
    """What should learn but gets no gradient on the first step of a phase is warned of, by name, once."""

    class Idle(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(inputs)

    model = Idle()
    model.add_module("unused", nn.Linear(6, 6))
    model.add_module("head", nn.Linear(6, 3))
    tuner = make(lambda layers: unfreezing.lp_ft(layers, epochs=2), model=model)
    with pytest.warns(LayerwiseWarning, match=r"2 parameters .* 'unused.weight', 'unused.bias'") as caught:
        train(tuner)
    assert len(caught) == 1


def test_no_gradient_at_all_is_an_error() -> None:
    """step() without backward() says what to call."""
    tuner = make(strategies.full)
    next(tuner.epochs())
    with pytest.raises(ModelError, match=r"loss.backward\(\) before tuner.step"):
        tuner.step()


def test_meddling_with_requires_grad_is_noticed() -> None:
    """Somebody else's unfreezing behind the Tuner's back is told on the first step."""
    tuner = make(strategies.linear_probe)
    model = tuner._model
    next(tuner.epochs())
    model.b0[0].weight.requires_grad = True  # type: ignore[union-attr,index]
    (inputs, labels), *_ = batches(1, (6,), classes=3)
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(ModelError, match=r"trainable but not held: 'b0.0.weight'"):
        tuner.step()


@pytest.mark.parametrize("name", ["head", "b0"])
def test_a_module_replaced_after_the_tuner_was_made_is_an_error(name: str) -> None:
    """What the optimiser holds of it would never learn, and the new one neither."""
    tuner = make(strategies.full)
    model = tuner._model
    new = copy.deepcopy(getattr(model, name))
    setattr(model, name, new)
    ((inputs, labels),) = batches(1, (6,), classes=3)
    F.cross_entropy(model(inputs), labels).backward()
    told = rf"phase 'train': .*'{name}\..*not of the model any more.*then make the layer map and the Tuner"
    with pytest.raises(ModelError, match=told):
        tuner.step()


def test_an_epoch_without_steps_is_an_error() -> None:
    """A loop that forgets tuner.step() does not run for ever."""
    tuner = make(strategies.full)
    with pytest.raises(PlanError, match="ended without an optimiser step"):
        for _ in tuner.epochs():
            pass


def test_another_number_of_steps_warns_and_keeps_epochs() -> None:
    """A loader that is shorter than steps_per_epoch is told of, and phases still last whole epochs."""
    tuner = make(lambda layers: gradual(layers), steps_per_epoch=5)
    with pytest.warns(LayerwiseWarning, match="had 3 optimiser steps"):
        train(tuner)
    assert (tuner.epoch, tuner.step_count) == (4, 4 * STEPS)


def test_an_epoch_that_was_saved_whole_is_not_trained_twice_in_silence() -> None:
    """A loop that saves in its last line, without end_epoch(), gets the same epoch again: told at once."""

    def go_on(saved: Tuner) -> int:
        tuner = make(strategies.full)
        tuner.load_state_dict(saved.state_dict())
        epoch = next(tuner.epochs())
        F.cross_entropy(tuner._model(torch.zeros(2, 6)), torch.zeros(2).long()).backward()
        tuner.step()
        return epoch

    tuner = make(strategies.full)
    train(tuner, stop=STEPS)
    with pytest.warns(
        LayerwiseWarning, match=r"epoch 0 had all its 3 steps.*end_epoch\(\) before state_dict"
    ):
        assert go_on(tuner) == 0
    tuner.end_epoch()
    assert go_on(tuner) == 1  # and no warning


def test_steps_after_the_end_are_an_error() -> None:
    """A finished Tuner does not train on in another loop."""
    tuner = make(lambda layers: strategies.full(layers, epochs=1))
    train(tuner)
    with pytest.raises(PlanError, match="is done"):
        tuner.step()


@pytest.mark.parametrize(("lr", "steps"), [(-1.0, 3), (float("nan"), 3), (0.1, 0), (0.1, 2.5)])
def test_bad_numbers_are_refused(lr: float, steps: int) -> None:
    """Rates and step counts out of range are told with their value."""
    with pytest.raises(PlanError, match=r"expected a (whole )?number"):
        make(strategies.full, lr=lr, steps_per_epoch=steps)


def test_a_plan_for_another_model_is_refused() -> None:
    """The error lists what only the plan and what only the model has."""
    plan = strategies.full(map_by_children(tiny_cnn()))
    with pytest.raises(
        PlanError, match=r"only the plan has: stem, layer1, layer2, fc\n.*only the model has: b0"
    ):
        make(plan)


def test_a_map_that_is_out_of_date_is_refused() -> None:
    """A head replaced by one with other parameter names after the map was made is noticed."""
    model = tiny_mlp()
    layers = map_by_children(model)
    model.head = nn.Sequential(nn.Linear(6, 2))
    with pytest.raises(
        ModelError, match=r"only the map has 'head.weight', 'head.bias'; only the model has 'head.0"
    ):
        Tuner(model, strategies.full(layers), torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)


# ------------------------------------------------------------------ resume

PLANS: dict[str, Any] = {
    "gradual": lambda layers: gradual(layers, l2_sp=0.1, schedule=Schedule(shape="cosine", span="run")),
    "by steps": lambda layers: gradual(layers, steps_per_group=4, last_steps=5, last_epochs=None),
    "ulmfit": lambda layers: unfreezing.ulmfit(layers, last_epochs=1),
    "lisa": lambda layers: recipes.lisa(layers, groups=1, every_steps=2, epochs=4, l2_sp=0.1),
    "auto_rgn": lambda layers: recipes.auto_rgn(layers, epochs=4, schedule="linear"),
    "reinit": lambda layers: recipes.reinit_last(layers, k=1, epochs=4),
    "stall": lambda layers: gradual(
        layers, patience_epochs=1, epochs_per_group=3, schedule=Schedule(shape="plateau", patience_epochs=0)
    ),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor, Eager])
def test_interrupted_runs_end_bit_for_bit_like_whole_ones(name: str, optimizer: Any, tmp_path: Any) -> None:
    """Saved and loaded anew after every single step, a run ends in the same weights, rates and state."""

    def metric(epoch: int) -> float:
        return [0.1, 0.3, 0.2, 0.4, 0.1][epoch % 5]

    def fresh() -> tuple[nn.Module, Tuner]:
        model = tiny_mlp()
        return model, make(PLANS[name], model=model, optimizer=optimizer, seed=3)

    whole_model, whole = fresh()
    start = snapshot(whole_model)
    train(whole, metric=metric)
    assert changed(start, snapshot(whole_model)) == set(start)

    model, tuner = fresh()
    file = tmp_path / "state.pt"
    interruptions = 0
    while not tuner.done:
        train(tuner, metric=metric, stop=tuner.step_count + 1)
        if tuner._open and tuner.step_in_epoch == STEPS:
            tuner.end_epoch(metric(tuner.epoch))
        torch.save({"model": model.state_dict(), "tuner": tuner.state_dict()}, file)
        saved = torch.load(file, weights_only=True)
        model, tuner = fresh()
        if interruptions % 2:  # the order of the two does not matter
            tuner.load_state_dict(saved["tuner"])
            model.load_state_dict(saved["model"])
        else:
            model.load_state_dict(saved["model"])
            tuner.load_state_dict(saved["tuner"])
        interruptions += 1
    if tuner._open:
        tuner.end_epoch()
    assert interruptions >= 12
    assert not changed(snapshot(whole_model), snapshot(model))
    assert tuner.rates() == whole.rates()
    assert (tuner.epoch, tuner.step_count) == (whole.epoch, whole.step_count)
    mine, theirs = tuner.optimizer.state_dict(), whole.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, state in mine["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs["state"][number][key]))


def test_the_format_of_a_saved_state_stays() -> None:
    """States that are on disks go on: also the first ones, with one count for the plateaus of both spans."""
    plateau = Schedule(shape="plateau", patience_epochs=0, factor=0.5)

    def fresh() -> Tuner:
        return make(lambda layers: gradual(layers, epochs_per_group=4, patience_epochs=3, schedule=plateau))

    tuner = fresh()
    train(tuner, stop=10, metric=lambda epoch: 0.3 - 0.1 * epoch)
    counts: dict[str, Any] = {
        "progress": {
            "phase": 0, "epoch": 3, "step": 10, "step_in_phase": 10, "step_in_epoch": 1, "epochs_in_phase": 3,
            "whole_epochs": True, "stalls": 2, "run_stalls": 0, "joined": {}, "drawn": None, "begun": True,
            "done": False,
        },
        "open": True,
        "stall": {"best": 0.3, "bad_epochs": 2},
        "plateau": {"best": 0.3, "bad_epochs": 0},
        "run_plateau": {"best": None, "bad_epochs": 0},
        "rgn": {"weights": {}, "sums": {}, "counts": {}, "steps": 0},
        "names": ["head", "head (no decay)"],
    }  # fmt: skip
    run = {"version": 1, "lr": 0.01, "steps_per_epoch": STEPS, "seed": 0, "optimizer_class": "AdamW"}
    run |= {"weight_decay": None, "plan": tuner.plan.to_dict()}
    state = tuner.state_dict()
    rest = {name: state.pop(name) for name in ("generator", "references", "optimizer")}
    assert state == run | counts
    del counts["run_plateau"], counts["progress"]["run_stalls"]
    again = fresh()
    again.load_state_dict(run | counts | rest)
    assert again.rates() == tuner.rates()
    assert again.rates()["head"] == 0.01 * 0.5**2
    train(again, stop=12)
    again.end_epoch(0.0)
    assert again.phase_index == 1


def test_state_of_another_run_is_refused() -> None:
    """A state of another plan or rate is told apart by what differs; nothing is loaded."""
    state = make(strategies.full).state_dict()
    with pytest.raises(PlanError, match=r"the plan is another one; lr was 0\.01, now 0\.5"):
        make(strategies.linear_probe, lr=0.5).load_state_dict(state)
    with pytest.raises(PlanError, match="version 99"):
        make(strategies.full).load_state_dict({**state, "version": 99})


def test_a_quiet_run_raises_no_warning() -> None:
    """The ordinary loop on the ordinary plan warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make(gradual))


def test_constants_of_a_model_stay_frozen() -> None:
    """A table of sines is no weight; where a whole group was found frozen, the plan decides."""
    model = tiny_mlp()
    model.b1[0].bias.requires_grad = False
    model.b2.requires_grad_(False)
    everything = {name for name, _ in model.named_parameters()}
    assert everything - make(strategies.full, model=model).trainable_names() == {"b1.0.bias"}
    again = make(lambda layers: unfreezing.lp_ft(layers, epochs=2), model=model)
    assert everything - again.trainable_names(1) == {"b1.0.bias"}
    model.b1[0].bias.requires_grad = True
    assert make(strategies.full, model=model).trainable_names() == everything


def test_a_plan_after_another_trains_what_that_one_froze() -> None:
    """What a Tuner froze, single parameters included, is no wish of the user's."""
    model = tiny_mlp()
    make(lambda layers: strategies.pattern(layers, freeze=["*.bias"]), model=model)
    assert make(strategies.full, model=model).trainable_names() == {n for n, _ in model.named_parameters()}


def test_overrides_know_a_shared_parameter_by_all_its_names() -> None:
    """The name that the plan gives may be the second one."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    phase = Phase(name="a", rates={"0": 1.0, "2": 1.0, "3": 1.0}, overrides={"2.weight": 0.0}, epochs=1)
    tuner = make(lambda layers: Plan(groups=layers.names, phases=(phase,)), model=model)
    assert "0.weight" not in tuner.trainable_names()
    assert {"0.bias", "2.bias", "3.weight"} <= tuner.trainable_names()


def test_a_phase_in_which_the_norm_policy_leaves_nothing_is_refused_at_once() -> None:
    """Also where it is a later one, hours away."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    rows = [
        Phase(name="head", rates={"2": 1.0}, epochs=1),
        Phase(name="norms", rates={"1": 1.0}, norms=Norms(policy="freeze"), epochs=1),
    ]
    with pytest.raises(PlanError, match="phase 'norms' trains nothing in this model"):
        make(lambda layers: Plan(groups=layers.names, phases=rows), model=model)


def test_norms_that_were_replaced_are_found_at_the_first_step() -> None:
    """Converted to SyncBatchNorm after the Tuner was made, their statistics would drift."""
    model = tiny_cnn()
    tuner = make(strategies.linear_probe, model=model)
    next(tuner.epochs())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.eval()
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
    with pytest.raises(ModelError, match=r"the statistics of .* should be held and are not"):
        tuner.step()


@pytest.mark.parametrize("measured", [False, True])
def test_statistics_that_nobody_measured_are_told(measured: bool) -> None:
    """The policy `calibrate` needs data, which a Tuner does not have."""
    model = tiny_cnn()
    tuner = make(lambda layers: strategies.linear_probe(layers, norms="calibrate"), model=model)
    images = torch.randn(4, 3, 8, 8)
    if measured:
        layerwise.calibrate_batchnorm(model, [images])
    next(tuner.epochs())
    F.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tuner.step()
    assert any("nobody measured the statistics" in str(one.message) for one in told) is not measured


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), "0.1", True])
def test_a_weight_decay_that_is_none_is_refused(weight_decay: Any) -> None:
    """A negative one lets weights grow; NaN makes all of them NaN."""
    with pytest.raises(PlanError, match="weight_decay is"):
        make(strategies.linear_probe, weight_decay=weight_decay)


def test_a_plan_must_be_a_plan() -> None:
    """The name of a file is not read."""
    with pytest.raises(PlanError, match=r"plan is 'plan.yaml', a str; expected a layerwise.Plan"):
        make("plan.yaml")


@pytest.mark.parametrize(
    "call",
    [
        lambda model, plan: Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=model),
        lambda model, plan: plan.explain(model),
        lambda model, plan: map_by_children(model).diff(model),
        lambda model, plan: layerwise.param_groups(model, plan, lr=0.1, layers=model),
        lambda model, plan: layerwise.audit(model, layers=model),
        lambda model, plan: layerwise.signature(model, [torch.zeros(4, 2)], layers=model),
    ],
)
def test_a_model_in_the_place_of_its_layer_map_is_told_in_one_line(call: Any) -> None:
    """Wherever a map can be given, in the words of layerwise and not of Python."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with pytest.raises(PlanError, match=r"layers is a Sequential; expected .* layerwise.layer_map\(") as told:
        call(model, strategies.full(map_by_children(model)))
    assert len(str(told.value)) < 250


def test_a_model_in_the_place_of_the_plan_is_told_in_one_line() -> None:
    """The arguments the other way round."""
    model, plan = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))), make(strategies.full).plan
    with pytest.raises(PlanError, match=r"a Sequential; expected a layerwise.Plan") as told:
        Tuner(plan, model, torch.optim.AdamW, lr=0.01, steps_per_epoch=STEPS)  # type: ignore[arg-type]
    assert len(str(told.value)) < 250


@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"seed": 7}, {"optimizer": torch.optim.SGD}])
def test_a_state_is_not_gone_on_with_under_other_settings(change: dict[str, Any]) -> None:
    """They would be ignored, or fail at the first step."""
    saved = make(strategies.linear_probe, weight_decay=0.1).state_dict()
    with pytest.raises(PlanError, match="state is of another run"):
        make(strategies.linear_probe, **{"weight_decay": 0.1, **change}).load_state_dict(saved)


@pytest.mark.parametrize("phase", [{"l2_sp": 1.0}, {"adapt_rates": "auto_rgn"}])
def test_a_step_that_a_loss_scaler_skips_changes_nothing(phase: dict[str, Any]) -> None:
    """Its gradients are infinite: nothing is pulled by them, and they measure nothing."""
    rates = {"b0": 0.5, "b1": 1.0, "b2": 1.0, "head": 1.0}
    model = tiny_mlp()
    row = Phase(name="a", rates=rates, epochs=1, **phase)
    tuner = make(lambda layers: Plan(groups=layers.names, phases=(row,)), model=model)
    next(tuner.epochs())
    scaler = torch.amp.GradScaler("cpu")
    for scale in (1.0, float("inf")):
        inputs, labels = batches(1, (6,), classes=3, seed=1)[0]
        (scaler.scale(F.cross_entropy(model(inputs), labels)) * scale).backward()
        before, known = snapshot(model), dict(tuner._rgn.weights)
        tuner.step(scaler=scaler)
        assert bool(changed(before, snapshot(model))) is (scale == 1.0)
    assert tuner._rgn.weights == known


@pytest.mark.parametrize("mode", ["maximum", "MAX", None])
def test_a_mode_that_is_none_is_refused(mode: Any) -> None:
    """It would count as min."""
    tuner = make(lambda layers: strategies.linear_probe(layers, schedule=Schedule(shape="plateau")))
    train(tuner, stop=STEPS)
    with pytest.raises(PlanError, match="expected 'max'"):
        tuner.end_epoch(0.5, mode=mode)


def test_a_group_that_joins_by_overrides_alone_warms_up() -> None:
    """As the plan's explanation says."""
    rows = [
        Phase(name="a", rates={"head": 1.0}, epochs=1),
        Phase(name="b", rates={"head": 1.0}, overrides={"b1.0.weight": 1.0}, epochs=1, join_steps=2),
    ]
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows))
    train(tuner, stop=STEPS)
    tuner.end_epoch()
    assert 0 < tuner.rates()["b1"] < tuner.rates()["head"]


def test_an_epoch_is_begun_and_ended_in_turn() -> None:
    """For loops of other people: what is out of turn is told, with what should come first."""
    tuner = make(lambda layers: strategies.full(layers, epochs=1))
    with pytest.raises(PlanError, match=r"ends an epoch that tuner.epochs\(\) or begin_epoch\(\) started"):
        tuner.end_epoch()
    train(tuner)
    with pytest.raises(PlanError, match="is done; make a new Tuner"):
        tuner.begin_epoch()


def test_options_that_the_user_set_on_a_group_stay_when_it_changes() -> None:
    """A parameter joins in the second phase, and the group is made anew with the option."""
    rates = {"stem": 1.0, "fc": 1.0}
    rows = [
        Phase(name="a", rates=rates, overrides={"stem.0.bias": 0.0}, epochs=1),
        Phase(name="b", rates=rates, epochs=1),
    ]
    options = {"model": tiny_cnn(), "optimizer": torch.optim.SGD, "momentum": 0.9}
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows), **options)
    sizes = [len(group["params"]) for group in tuner.optimizer.param_groups]
    for group in tuner.optimizer.param_groups:
        group["momentum"] = 0.5
    train(tuner, shape=(3, 8, 8), classes=4, stop=STEPS + 1)
    assert [len(group["params"]) for group in tuner.optimizer.param_groups] != sizes
    assert {group["momentum"] for group in tuner.optimizer.param_groups} == {0.5}


def test_an_optimiser_without_decay_gets_none() -> None:
    """Groups of later phases too: no key that it does not know."""
    with pytest.warns(LayerwiseWarning, match="Rprop reads"):
        tuner = make(gradual, optimizer=torch.optim.Rprop)
    train(tuner)
    assert len(tuner.optimizer.param_groups) > 2
    assert not any("weight_decay" in group for group in tuner.optimizer.param_groups)


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (torch.optim.Rprop, "Rprop reads the rate of a parameter at its first step alone"),
        (
            lambda groups: HFAdafactor(groups, relative_step=True),
            r"Adafactor reads no rate.*relative_step=False",
        ),
    ],
)
def test_an_optimiser_that_does_not_follow_the_rates_is_told_once(optimizer: Any, told: str) -> None:
    """And rightly: a tenth of the rate from each parameter's second step on changes nothing."""
    ends = []
    for factor in (1.0, 0.1):
        with pytest.warns(LayerwiseWarning, match=told) as found:
            tuner = make(gradual, optimizer=optimizer)
        assert len(found) == 1
        give = tuner._rates.give

        def given(optimizer: Any, *args: Any, give: Any = give, factor: float = factor) -> None:
            give(optimizer, *args)
            for group in optimizer.param_groups:
                if all(parameter in optimizer.state for parameter in group["params"]):
                    group["lr"] *= factor

        tuner._rates.give = given  # type: ignore[method-assign]
        train(tuner)
        ends.append(snapshot(tuner._model))
    assert not changed(*ends)


def test_a_state_of_a_model_with_other_parameters_is_refused() -> None:
    """The names of the param groups tell: biases are a group of their own."""
    plain = tiny_mlp()
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
    state = make(strategies.full, weight_decay=0.1).state_dict()
    with pytest.raises(PlanError, match=r"b0 \(no decay\).*, this one b0, b1.*Rebuild the model as it was"):
        make(strategies.full, weight_decay=0.1, model=plain).load_state_dict(state)


def test_l2_sp_does_not_pull_a_group_back_that_starts_anew_later() -> None:
    """Weights that it had before it started anew are no pretrained weights of what it is now."""
    rows = [
        Phase(name="a", rates={"b1": 1.0, "b2": 1.0}, epochs=1, l2_sp=0.1),
        Phase(name="b", rates={"b1": 1.0, "b2": 1.0}, epochs=1, l2_sp=0.1, reinit=["b2"]),
        Phase(name="c", rates={"b1": 1.0, "b2": 1.0}, epochs=1, l2_sp=0.1),
    ]
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows))
    pulled = []
    for epoch in tuner.epochs():
        pulled.append({name.split(".")[0] for name in tuner._l2_sp.references})
        for inputs, labels in batches(STEPS, (6,), classes=3, seed=epoch):
            F.cross_entropy(tuner._model(inputs), labels).backward()
            tuner.step()
    assert pulled == [{"b1", "b2"}, {"b1"}, {"b1"}]


def test_l2_sp_forgets_what_no_later_phase_pulls() -> None:
    """The copies are memory that nothing reads any more."""
    rows = [
        Phase(name="a", rates={"b1": 1.0, "head": 1.0}, epochs=1, l2_sp=0.1),
        Phase(name="b", rates={"b1": 1.0, "head": 1.0}, epochs=1),
    ]
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows))
    train(tuner, stop=STEPS - 1)
    assert set(tuner._l2_sp.references) == {"b1.0.weight", "b1.0.bias"}
    tuner = make(lambda layers: Plan(groups=layers.names, phases=rows))
    train(tuner)
    assert tuner._l2_sp.references == {}


def test_relative_gradient_norms_of_complex_weights_count_both_parts() -> None:
    """As those of a Fourier layer: the imaginary part of weight and gradient is not dropped."""
    real, spectral = nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor([3 + 4j, 0]))
    real.grad, spectral.grad = torch.full((4,), 0.5), torch.tensor([0, 6 + 8j])
    measured = RelativeGradientNorms()
    assert measured.measure({"real": [real], "spectral": [spectral]})
    assert measured.weights == {"real": 0.25, "spectral": 1.0}


def test_relative_gradient_norms_are_measured_on_the_first_steps_of_an_epoch() -> None:
    """Later gradients change nothing; a group without a gradient has the share 0."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    norms = RelativeGradientNorms()
    one.grad = torch.ones(2)
    for _ in range(MEASURED_STEPS):
        assert norms.measure({"one": [one], "two": [two]})
    assert norms.weights == {"one": 1.0, "two": 0.0}
    two.grad = 5 * torch.ones(2)
    assert not norms.measure({"one": [one], "two": [two]})
    assert norms.weights == {"one": 1.0, "two": 0.0}
    norms.start_epoch()
    assert norms.measure({"one": [one], "two": [two]})
    assert norms.weights == {"one": pytest.approx(0.2), "two": 1.0}


def test_relative_gradient_norms_are_averages_over_the_steps_of_each_group() -> None:
    """A group that LISA draws for a part of the steps is not slowed down; left out, it keeps its share."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    norms = RelativeGradientNorms()
    one.grad, two.grad = torch.ones(2), 2 * torch.ones(2)
    norms.measure({"one": [one]})
    again = RelativeGradientNorms.from_dict(norms.to_dict())
    for measured in (norms, again):
        measured.measure({"one": [one], "two": [two]})
        assert measured.weights == {"one": 0.5, "two": 1.0}
        measured.start_epoch()
        measured.measure({"two": [two]})
        assert measured.weights == {"one": 0.5, "two": 1.0}


def test_groups_that_join_together_are_saved_in_the_order_of_the_map() -> None:
    # Not in that of a set, which another process has otherwise: checkpoints of equal runs are equal files.
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    layers = layerwise.layer_map(model, torch.zeros(2, 4), granularity="layers")
    plan = unfreezing.lp_ft(layers, probe_epochs=1, epochs=2)
    tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
    for _ in tuner.epochs():
        model(torch.ones(2, 4)).sum().backward()
        tuner.step()
    joined = [*tuner.state_dict()["progress"]["joined"]]
    assert joined == [name for name in layers.names if name in joined]
    assert len(joined) == 8
