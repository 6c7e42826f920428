"""The audit: each fault is built plainly and found under its code; the same set-up done right is silent."""

import ast
import copy
import io
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from transformers.optimization import Adafactor

from helpers import map_by_children
from layerwise.errors import DataError, ModelError
from layerwise.plans.settings import Norms
from layerwise.plans.strategies import full, linear_probe
from layerwise.tuning.audit import audit
from layerwise.tuning.audit_schedulers import KEEP_BY_GROUP, raises_on_new_group
from layerwise.tuning.freezing import unfreeze
from layerwise.tuning.lr_scheduler import LayerwiseLR
from layerwise.tuning.modes import pin_eval
from layerwise.tuning.norms import freeze_batchnorm
from layerwise.tuning.tuner import Tuner


@dataclass
class Output:
    """What some models return."""

    logits: torch.Tensor


@dataclass(slots=True)
class Slotted:
    logits: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.mid = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.mid(self.stem(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def frozen(net, *names):
    """Freeze children properly: no gradients, no modes."""
    for name in names:
        child = net.get_submodule(name)
        child.requires_grad_(False)
        pin_eval(child.modules())
    return net


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


def no_decay_groups(net, lr=0.1, **options):
    groups = [{"params": [p], "lr": lr, "name": n} for n, p in net.named_parameters() if p.requires_grad]
    return AdamW(groups, weight_decay=0.0, **options)


def data(batch_size=16):
    return DataLoader(TensorDataset(torch.randn(32, 3), torch.zeros(32)), batch_size)


def test_a_sound_set_up_has_no_findings(net):
    frozen(net, "stem")
    report = audit(net, no_decay_groups(net), layers=map_by_children(net), loader=data())
    assert report.findings == ()
    assert str(report).startswith("audit: no findings\n")
    assert str(audit(net)) == "audit: no findings"  # no empty table
    console = Console(file=io.StringIO())
    console.print(report)
    assert "what and why" not in console.file.getvalue()  # no empty table
    report.raise_for_errors()
    assert audit(Net(), loader=data()).findings == ()


# --------------------------------------------------------------------------------------------------- modes


def test_a_frozen_norm_that_would_train(net):
    net.stem.requires_grad_(False)
    for model in (net, net.eval()):  # an eval mode of the whole model does not last
        report = audit(model)
        assert report.codes == {"frozen-norm-trains", "dropout-in-frozen-part"}
        assert report[0].module == "stem.1"
        assert report[0].severity == "error"
    freeze_batchnorm(net)
    assert audit(net).codes == {"dropout-in-frozen-part"}


def test_eval_by_hand_is_undone_by_the_next_train(net):
    net.stem.requires_grad_(False)
    net.train()
    net.stem.eval()
    report = audit(net)
    assert report.codes == {"frozen-norm-eval-undone", "dropout-in-frozen-part"}
    assert not net.stem[1].training  # looking changed nothing


def test_a_train_method_that_takes_care_itself_is_respected(net):
    class Careful(Net):
        def train(self, mode=True):
            super().train(mode)
            self.stem.eval()
            return self

    net = Careful()
    net.stem.requires_grad_(False)
    assert audit(net.train()).findings == ()


def test_a_pin_that_was_gone_round(net):
    frozen(net, "stem")
    net.stem[1].training = True
    assert "pin-bypassed" in audit(net).codes


def test_a_frozen_norm_without_tracking_normalises_by_the_batch(net):
    net.stem.requires_grad_(False)
    net.stem[1].track_running_stats = False
    assert "frozen-norm-uses-batch" in audit(net).codes


def test_a_norm_that_learns_without_tracking_keeps_its_old_statistics(net):
    # What Lightning's freeze(train_bn=False) leaves behind: train and eval mode part as the net learns.
    net.stem[1].track_running_stats = False
    found = {f.code: f.modules for f in audit(net)}
    assert found == {"norm-keeps-old-statistics": ("stem.1",)}
    net.stem[1] = nn.BatchNorm1d(4, track_running_stats=False)  # built so, it has none
    assert audit(net).findings == ()


def test_a_norm_that_learns_between_frozen_layers(net):
    net.stem.requires_grad_(False)
    net.stem[1].requires_grad_(True)
    for layers in (None, map_by_children(net)):
        report = audit(net, layers=layers)
        assert [f.module for f in report if f.code == "norm-trains-in-frozen-part"] == ["stem.1"]


@pytest.mark.parametrize("affine", [True, False])
def test_norms_that_a_plan_lets_adapt_are_no_fault(affine):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine), nn.ReLU(), nn.Linear(4, 2))
    layers, loader = map_by_children(net), DataLoader(torch.randn(32, 4), batch_size=16)
    plan = linear_probe(layers, epochs=1, norms="adapt")
    tuner = Tuner(net, plan, SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    for mode in (True, False):
        report = audit(net.train(mode), tuner.optimizer, layers=layers, loader=loader)
        assert report.codes <= {"head-below-backbone"}, str(report)


def test_a_frozen_norm_without_statistics(net):
    net.stem[1] = nn.BatchNorm1d(4, track_running_stats=False)
    frozen(net, "stem")
    assert audit(net).codes == {"norm-without-statistics"}


def test_dropout_between_frozen_layers_of_a_sequential():
    # as in the classifiers of VGG and AlexNet when all but the last layer is frozen; the dropout of the
    # layer that learns is its own
    net = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)
    )
    net[:4].requires_grad_(False)
    (found,) = audit(net)
    assert (found.code, found.modules) == ("dropout-in-frozen-part", ("2",))
    net[0].requires_grad_(True)
    assert not audit(net).findings


@pytest.mark.parametrize("layers", [False, True])
def test_dropout_in_a_frozen_part_of_every_kind(net, layers):
    class Functional(nn.Module):  # as attention layers do
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.attention_dropout = 0.1

        def forward(self, x):
            return nn.functional.dropout(self.lin(x), self.attention_dropout, self.training)

    net.mid = nn.Sequential(Functional(), nn.LSTM(4, 4, num_layers=2, dropout=0.2), nn.Dropout(0.0))
    net.mid.requires_grad_(False)
    net.stem.requires_grad_(False)
    report = audit(net, layers=map_by_children(net) if layers else None)
    (found,) = [f for f in report if f.code == "dropout-in-frozen-part"]
    assert set(found.modules) == {"stem.2", "mid.0", "mid.1"}


def test_small_batches_are_named_with_the_layers(net):
    report = audit(net, loader=data(batch_size=4))
    assert report.codes == {"small-batch-norm"}
    assert report[0].modules == ("stem.1", "mid.1")
    assert audit(net, batch_size=9).findings == ()
    frozen(net, "stem", "mid")
    assert audit(net, batch_size=2).findings == ()


@pytest.mark.parametrize(
    ("loader", "size"),
    [
        ([torch.randn(4, 3)], 4),
        (DataLoader(torch.randn(8, 3), batch_sampler=[[0, 1, 2], [3, 4, 5]]), 3),
        (DataLoader(torch.randn(6, 3), batch_size=32), 6),
    ],
)
def test_the_size_of_a_batch_is_that_of_the_one_that_is_run(net, loader, size):
    # A list of batches and a loader with a batch sampler tell no size; few samples make smaller batches.
    (found,) = [f for f in audit(net, loader=loader) if f.code == "small-batch-norm"]
    assert f"batches of {size} " in found.why
    assert "small-batch-norm" not in audit(net, loader=loader, batch_size=32).codes


# -------------------------------------------------------------------------------------------- the optimiser


def test_nothing_trains(net):
    frozen(net, "stem", "mid", "fc")
    assert audit(net).codes == {"nothing-trains"}


def test_trainable_parameters_outside_of_the_optimiser(net):
    optimizer = SGD(net.fc.parameters(), lr=0.1)
    report = audit(net, optimizer)
    (found,) = [f for f in report if f.code == "trainable-not-in-optimizer"]
    assert len(found.modules) == 8
    assert (
        audit(net, [optimizer, SGD([*net.stem.parameters(), *net.mid.parameters()], lr=0.1)]).findings == ()
    )
    with pytest.raises(ModelError, match="trainable-not-in-optimizer"):
        report.raise_for_errors()


def test_a_parameter_in_two_groups(net):
    report = audit(net, [SGD(net.parameters(), lr=0.1), SGD(net.fc.parameters(), lr=0.1)])
    (found,) = report
    assert (found.code, found.modules) == ("in-two-param-groups", ("fc.weight", "fc.bias"))


def test_a_head_replaced_after_the_optimiser_was_built(net):
    optimizer = SGD(net.parameters(), lr=0.1)
    net.fc = nn.Linear(4, 5)
    assert audit(net, optimizer).codes == {"optimizer-holds-strangers", "trainable-not-in-optimizer"}


def test_frozen_parameters_in_the_optimiser_from_harmless_to_moving(net):
    def codes(optimizer):
        return {f.code: f.severity for f in audit(net, optimizer) if f.code.startswith("frozen-")}

    plain = SGD(net.parameters(), lr=0.1)
    adam = AdamW(net.parameters(), lr=0.1)
    net(torch.randn(8, 3)).sum().backward()
    frozen(net, "stem")
    assert codes(plain) == {"frozen-with-gradient": "error"}
    before = net.stem[0].weight.clone()
    adam.step()
    assert not torch.equal(before, net.stem[0].weight)  # what the finding says is true
    net.zero_grad()
    assert codes(plain) == {"frozen-in-optimizer": "info"}
    assert codes(adam) == {"frozen-with-state": "warning"}
    assert codes(AdamW(net.parameters())) == {"frozen-with-decay": "warning"}
    assert codes(AdamW(trainable(net))) == {}


def test_a_rate_of_zero_is_not_freezing_but_a_warm_up_from_zero_is_fine(net):
    optimizer = SGD([{"params": net.stem.parameters(), "lr": 0.0}, {"params": net.mid.parameters()}], lr=0.1)
    optimizer.add_param_group({"params": list(net.fc.parameters())})
    (found,) = [f for f in audit(net, optimizer) if f.code == "rate-zero-is-not-frozen"]
    assert set(found.modules) == {n for n, _ in net.named_parameters() if n.startswith("stem")}
    warm = SGD(net.parameters(), lr=0.1)
    lr_scheduler.LambdaLR(warm, lambda step: step / 10)
    assert warm.param_groups[0]["lr"] == 0
    assert audit(net, warm).findings == ()


def test_an_optimiser_that_makes_its_rates_itself_is_no_fault(net):
    # transformers' Adafactor with relative steps, which are its default, has lr None
    frozen(net, "stem")
    report = audit(net, Adafactor(net.parameters()), layers=map_by_children(net))
    assert report.codes == {"frozen-in-optimizer"}
    assert [(row.name, row.lr, row.trainable > 0) for row in report.rates] == [
        ("stem", None, False), ("mid", None, True), ("fc", None, True)
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=100)
    console.print(report)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert [row[:3] for row in rows if row and row[0] in ("stem", "mid")] == [
        ["stem", "-", "-"], ["mid", "its", "own"]
    ]  # fmt: skip


def test_decay_on_norms_and_biases(net):
    report = audit(net, AdamW(net.parameters(), weight_decay=0.1))
    found = {f.code: f.modules for f in report}
    assert found["decay-on-norms"] == ("stem.1.weight", "stem.1.bias", "mid.1.weight", "mid.1.bias")
    assert found["decay-on-biases"] == ("stem.0.bias", "mid.0.bias", "fc.bias")


def test_lr_scales_that_nobody_reads(net):
    def groups(scales):
        return [
            {"params": list(child.parameters()), "lr_scale": scale}
            for child, scale in zip(net.children(), scales)
        ]

    assert audit(net, SGD(groups([0.25, 0.5, 1.0]), lr=0.1)).codes == {"lr-scale-ignored"}
    assert audit(net, SGD(groups([1.0, 1.0, 1.0]), lr=0.1)).codes == {"layer-decay-without-effect"}
    applied = SGD([{**g, "lr": 0.1 * g["lr_scale"]} for g in groups([0.25, 0.5, 1.0])], lr=0.1)
    assert audit(net, applied).findings == ()


def test_timms_schedulers_that_read_the_scales_keep_the_ratio(net):
    """They leave ``initial_lr`` as it is and multiply the scale into ``lr``: no ratio is broken by that."""
    groups = [
        {"params": list(child.parameters()), "lr_scale": scale}
        for child, scale in zip(net.children(), (0.25, 0.5, 1.0))
    ]
    optimizer = SGD(groups, lr=0.1)
    schedule = CosineLRScheduler(optimizer, 10, warmup_t=2, warmup_lr_init=1e-3)
    for epoch in (0, 1, 5):
        schedule.step(epoch)
        assert audit(net, optimizer, layers=map_by_children(net)).findings == ()
    optimizer.param_groups[0]["lr"] *= 2
    assert audit(net, optimizer, layers=map_by_children(net)).codes == {"ratio-broken"}


def test_a_group_that_joins_under_layerwises_scheduler_is_sound(net):
    """It is scaled before its first step, and may warm up: neither is a broken ratio."""
    frozen(net, "stem", "mid")
    optimizer = SGD(net.fc.parameters(), lr=0.1)
    schedule = LayerwiseLR(optimizer, "linear", total_steps=9, join_steps=3)
    for step in range(5):
        if step == 2:
            unfreeze(net, "mid")
            optimizer.add_param_group({"params": list(net.mid.parameters()), "lr": 0.05})
        layers = map_by_children(net)
        assert audit(net, optimizer, scheduler=schedule, layers=layers).findings == ()
        optimizer.step()
        schedule.step()


def two_groups(net, late_lr):
    """Train the head under a schedule, then let the middle join at an absolute rate."""
    frozen(net, "stem", "mid")
    optimizer = SGD(net.fc.parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    net.mid.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.mid.parameters()), "lr": late_lr})
    return optimizer, schedule


def test_a_late_group_off_the_schedule(net):
    optimizer, schedule = two_groups(net, late_lr=0.1 / 2.6)
    report = audit(net, optimizer, scheduler=schedule, layers=map_by_children(net))
    assert {"late-group-off-schedule", "head-slower-than-backbone"} <= report.codes


def test_a_floor_in_absolute_terms_breaks_the_ratio(net):
    def schedule(optimizer, eta_min):
        made = lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=eta_min)
        for _ in range(9):
            optimizer.step()
            made.step()

    def optimizer():
        groups = [{"params": c.parameters(), "lr": lr} for c, lr in zip(net.children(), (0.01, 0.03, 0.1))]
        return SGD(groups)

    broken, whole = optimizer(), optimizer()
    schedule(broken, 0.01)
    schedule(whole, 0.0)
    assert "ratio-broken" in audit(net, broken).codes
    assert audit(net, whole, layers=map_by_children(net)).findings == ()


def test_a_head_slower_than_the_backbone(net):
    groups = [{"params": c.parameters(), "lr": lr} for c, lr in zip(net.children(), (0.1, 0.1, 0.01))]
    for layers in (map_by_children(net), None):  # without a map one is made here
        report = audit(net, SGD(groups), layers=layers)
        (found,) = [f for f in report if f.code == "head-slower-than-backbone"]
        assert found.module == "fc"
        assert report.rates[-1].lr == (0.01, 0.01)


def test_a_model_that_cannot_be_recorded_is_audited_with_a_note():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, something, else_):
            raise NotImplementedError

    net = Odd()
    groups = [{"params": net.a.parameters(), "lr": 0.1}, {"params": net.b.parameters(), "lr": 0.01}]
    report = audit(net, SGD(groups))
    assert report.findings == ()
    assert "could not be recorded" in report.notes[0]


@pytest.mark.parametrize(
    ("exponents", "found"), [((4, 3, 2, 1, 0), False), ((5, 4, 3, 2, 0), True), ((3, 2, 1, 0, 0), True)]
)
def test_an_off_by_one_in_layer_decay(exponents, found):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))
    groups = [{"params": c.parameters(), "lr": 0.1 * 0.8**e} for c, e in zip(net, exponents)]
    report = audit(net, SGD(groups), layers=map_by_children(net))
    assert [f.modules for f in report if f.code == "uneven-layer-decay"] == ([("3", "4")] if found else [])


def test_a_head_with_its_own_rate_and_a_frozen_group_are_no_uneven_decay():
    """Neither is a step skipped or taken twice: new heads often learn ten times as fast as what is below."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    layers = map_by_children(net)
    rates = [0.1 * 0.8 ** (5 - n) for n in range(6)]
    groups = [{"params": child.parameters(), "lr": rate} for child, rate in zip(net, rates)]
    assert audit(net, SGD([*groups[:5], {**groups[5], "lr": 1.0}]), layers=layers).findings == ()
    frozen(net, "2")
    groups = [{"params": list(child.parameters()), "lr": rate} for child, rate in zip(net, rates)]
    assert audit(net, SGD(groups[:2] + groups[3:]), layers=layers).findings == ()


def test_rates_of_optimisers_of_two_kinds_are_not_compared(net):
    """As in the recipe of Muon: matrices at 0.02, the head and all vectors by AdamW at 3e-4."""
    matrices = [net.stem[0].weight, net.mid[0].weight]
    others = [p for p in net.parameters() if all(p is not matrix for matrix in matrices)]
    pair = [SGD(matrices, lr=0.02), AdamW(others, lr=3e-4, weight_decay=0.0)]
    assert audit(net, pair, layers=map_by_children(net)).findings == ()
    pair = [AdamW(matrices, lr=0.02), AdamW(others, lr=3e-4, weight_decay=0.0)]
    assert audit(net, pair, layers=map_by_children(net)).codes == {"head-slower-than-backbone"}


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1, 10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(o, 7)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LambdaLR(o, lambda e: 0.5)]),
}


@pytest.fixture(params=["installed torch", "older torch"])
def version(request, monkeypatch):
    """Schedulers as they are, and as in torch 2.6, which does not compare the numbers of groups."""
    raises_on_new_group.cache_clear()
    if request.param == "older torch":
        lenient = lambda *given, strict=False: zip(*given)  # noqa: E731
        monkeypatch.setattr(lr_scheduler, "zip", lenient, raising=False)
    yield request.param
    raises_on_new_group.cache_clear()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_said_of_each_scheduler_is_what_torch_does(net, name, version):
    # foretold while the middle is still frozen, certain once it has joined, and true when it steps
    frozen(net, "stem", "mid")
    optimizer = SGD(net.fc.parameters(), lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[name](optimizer)
    metric = (1.0,) if name == "ReduceLROnPlateau" else ()
    foretold = "scheduler-cannot-grow" in audit(net, optimizer, scheduler=schedule).codes
    optimizer.step()
    schedule.step(*metric)
    net.mid.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.mid.parameters()), "lr": 0.01})
    certain = "scheduler-will-crash" in audit(net, optimizer, scheduler=schedule).codes
    crashes = False
    try:
        for _ in range(4):
            optimizer.step()
            schedule.step(*metric)
    except (ValueError, KeyError, IndexError):
        crashes = True
    assert foretold == certain == crashes
    assert not (
        crashes and version == "older torch" and name == "LambdaLR"
    )  # else it is not what it stands for


@pytest.mark.parametrize("steps", [1, 3])
def test_a_sequence_raises_at_its_milestones_and_not_after_the_last(net, steps, version):
    # a group that joins is met at the milestone of step 3; once that is over nothing is said
    frozen(net, "stem", "mid")
    optimizer = SGD(net.fc.parameters(), lr=0.1, momentum=0.9)
    schedule = SCHEDULERS["SequentialLR"](optimizer)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    foretold = "scheduler-cannot-grow" in audit(net, optimizer, scheduler=schedule).codes
    net.mid.requires_grad_(True)
    optimizer.add_param_group({"params": list(net.mid.parameters()), "lr": 0.01})
    told = [found.why for found in audit(net, optimizer, scheduler=schedule) if "will-crash" in found.code]
    crashes = False
    try:
        for _ in range(4):
            optimizer.step()
            schedule.step()
    except (ValueError, KeyError, IndexError):
        crashes = True
    assert foretold == bool(told) == crashes
    assert crashes == (steps == 1 and raises_on_new_group(lr_scheduler.SequentialLR))
    assert not (crashes and version == "older torch")
    assert all("one of the next steps raises" in why for why in told)


def test_every_scheduler_of_torch_is_in_the_table_above():
    known = {
        name
        for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert known - {"LRScheduler"} == set(SCHEDULERS)
    assert {kind.__name__ for kind in KEEP_BY_GROUP} <= known


def test_parameters_that_never_stepped(net):
    def codes(optimizer):
        net.fc(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return [(f.severity, f.code, len(f.modules)) for f in audit(net, optimizer)]

    assert codes(Adam(net.parameters(), lr=0.01)) == [("warning", "never-stepped", 8)]
    # a whole group may have joined a moment ago
    groups = [{"params": list(child.parameters())} for child in net.children()]
    assert codes(Adam(groups, lr=0.01)) == [("info", "group-never-stepped", 8)]


def test_plain_sgd_beside_another_optimiser_is_not_taken_for_one_that_never_stepped(net):
    """A step of SGD without momentum leaves no state; with momentum its absence tells."""

    def codes(**options):
        others = [*net.mid.parameters(), *net.fc.parameters()]
        optimizers = [SGD(net.stem.parameters(), lr=0.01, **options), Adam(others)]
        net(torch.randn(4, 3)).sum().backward()
        optimizers[1].step()
        net.zero_grad()
        return audit(net, optimizers).codes

    assert codes() == set()
    assert codes(momentum=0.9) == {"group-never-stepped"}


def test_an_optimiser_that_keeps_all_its_state_in_one_place_is_no_warning(net):
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.randn(16, 3)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    assert audit(net, optimizer).findings == ()


def test_parameters_that_join_norms_of_a_tuner_are_no_warning(net):
    """Where norms adapt in frozen groups, the rest of a group joins a param group that has stepped."""
    layers = map_by_children(net)
    adapt = Norms(policy="adapt")
    probe, rest = linear_probe(layers, epochs=1, norms=adapt), full(layers, epochs=1, norms=adapt)
    later = rest.phases[0].model_copy(update={"name": "later"})
    plan = probe.model_copy(update={"phases": (*probe.phases, later)})
    tuner = Tuner(net, plan, AdamW, lr=0.01, steps_per_epoch=1, layers=layers)
    found = []
    for _ in tuner.epochs():
        found.append({(f.severity, f.code) for f in audit(net, tuner.optimizer, layers=layers)})
        net(torch.randn(16, 3)).sum().backward()
        tuner.step()
    assert ("warning", "never-stepped") not in found[1]
    assert ("info", "group-never-stepped") in found[1]


# ------------------------------------------------------------------------------------- ties, wrappers, graphs


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 5)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.body(self.embed(x)))


def test_tied_weights_split_by_freezing():
    net = Tied()
    assert audit(net).findings == ()
    net.embed.requires_grad_(False)
    for layers in (None, map_by_children(net)):
        (found,) = audit(net, layers=layers)
        assert (found.code, set(found.modules)) == ("tied-weight-frozen", {"embed.weight", "out.weight"})
    net.requires_grad_(False)
    net.embed.requires_grad_(True)
    assert audit(net).codes == {"tied-weight-learns"}


def test_a_tie_that_came_apart():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    net = transformers.GPT2LMHeadModel(config)
    assert "tie-broken" not in audit(net).codes
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    (found,) = [f for f in audit(net) if f.code == "tie-broken"]
    assert set(found.modules) == {"transformer.wte", "lm_head"}


def test_ddp_built_before_unfreezing(net, tmp_path):
    frozen(net, "stem")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert audit(wrapped).findings == ()
        net.stem.requires_grad_(True)
        (found,) = audit(wrapped)
        assert found.code == "ddp-built-for-other-parameters"
        assert "6 parameters that required them" in found.why
        assert audit(wrapped, loader=data()).codes == {"ddp-built-for-other-parameters"}
        frozen(net, "stem", "mid")
        assert audit(wrapped).codes == {"ddp-waits-for-frozen-parameters"}
        net.requires_grad_(True)
        wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
        frozen(net, "stem", "mid")
        assert audit(wrapped).findings == ()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("version", "severity"), [("2.9.1", "warning"), ("2.14.1+cu130", "info")])
def test_compiled_before_unfreezing_is_graver_where_torch_is_blind(net, monkeypatch, version, severity):
    monkeypatch.setattr(torch, "__version__", version)
    compiled = torch.compile(net, backend="eager")
    assert audit(compiled).findings == ()
    frozen(net, "stem")
    (found,) = audit(compiled)
    assert (found.code, found.severity) == ("compiled-before-unfreezing", severity)
    net.mid.compile(backend="eager")
    assert audit(net)[0].modules == ("mid",)


# ------------------------------------------------------------------------------------------- with one batch


def test_drift_is_measured_on_a_batch(net):
    # a buffer that no rule knows: an average that a frozen module of the user's own keeps
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += x.mean().detach() if self.training else 0
            return self.lin(x)

    net.mid = Average()
    net.mid.requires_grad_(False)
    (found,) = audit(net, loader=data())
    assert (found.code, found.module) == ("frozen-statistics-drift", "mid.seen")
    pin_eval(net.mid.modules())
    assert audit(net, loader=data()).findings == ()


def test_a_loader_without_a_batch_is_told(net):
    # of fewer samples than a batch, with drop_last; nothing is said of a calibration
    empty = DataLoader(TensorDataset(torch.zeros(3, 3)), batch_size=4, drop_last=True)
    with pytest.raises(DataError, match=r"gives no batch; expected one at least.*drop_last"):
        audit(net, loader=empty)


@pytest.mark.parametrize("table", [torch.eye(4).to_sparse(), torch.full((4,), torch.nan)])
def test_frozen_buffers_of_any_form_that_stay_are_no_finding(net, table):
    # an adjacency matrix; a value that is not known: NaN is not equal to itself
    net.mid.register_buffer("table", table)
    frozen(net, "mid")
    assert audit(net, loader=data()).findings == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_over_a_frozen_prefix(net, reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return self.fc(checkpoint(self.mid, self.stem(x), use_reentrant=reentrant))

    net = frozen(Checkpointed(), "stem")
    assert audit(net, loader=data()).codes == ({"reentrant-checkpointing"} if reentrant else set())


def test_a_forward_that_keeps_its_frozen_part_in_eval_mode_is_right():
    # train() does not show it, a pass does; where it leaves something out, that is found.
    class Careful(Net):
        def forward(self, x):
            self.stem.eval()
            return super().forward(x)

    net = Careful()
    net.stem.requires_grad_(False)
    for loader in (None, data()):
        assert not list(audit(net, loader=loader))
        assert net.stem[1].training
        assert not net._forward_hooks
    net.mid.requires_grad_(False)
    for loader in (None, data()):
        found = {one.code: one.modules for one in audit(net, loader=loader)}
        assert found["frozen-norm-trains"] == ("mid.1",)


def test_what_forward_does_to_modes_is_unknown_where_no_input_can_be_made_up():
    class Pair(Net):
        def forward(self, x, y):
            self.stem.eval()
            return super().forward(x) + y

    net = Pair()
    net.stem.requires_grad_(False)
    assert audit(net).codes == {"frozen-norm-trains", "dropout-in-frozen-part"}
    assert net.stem[1].training


def test_where_no_gradient_arrives(net):
    class Detached(Net):
        def forward(self, x):
            return self.fc(self.mid(self.stem(x).detach()))

    (found,) = audit(Detached(), loader=data())
    assert found.code == "no-gradient"
    assert all(name.startswith("stem") for name in found.modules)


def test_an_audit_leaves_no_trace(net):
    frozen(net, "stem")
    net.mid.eval()
    optimizer = AdamW(net.parameters(), lr=0.1)
    net(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    loader = DataLoader(data().dataset, 16, shuffle=True)
    state = torch.get_rng_state()
    audit(net, optimizer, loader=loader)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in net.modules()] == modes
    after = (net.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][key], value) for key, value in after[0].items())
    assert before[1]["param_groups"] == after[1]["param_groups"]
    assert all(
        torch.equal(before[1]["state"][i][key], value)
        for i, values in after[1]["state"].items()
        for key, value in values.items()
    )
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


# -------------------------------------------------------------------------------------------------- the faces


def test_the_table_of_rates_does_not_speak_against_the_findings(net):
    # What no optimiser holds is not called frozen, and no decay is told of what never learns.
    net.stem.requires_grad_(False)
    freeze_batchnorm(net)
    held = [*net.stem.parameters(), *net.fc.parameters()]
    report = audit(net, AdamW(held, lr=0.1, weight_decay=0.5), layers=map_by_children(net))
    assert {"trainable-not-in-optimizer", "frozen-with-decay"} <= report.codes
    console = Console(width=100, file=io.StringIO())
    console.print(report)
    rows = [line.split() for line in console.file.getvalue().partition("Rates")[2].splitlines()]
    shown = {row[0]: row[1:3] for row in rows if len(row) > 3}
    assert shown["stem"] == shown["mid"] == ["-", "-"]
    assert shown["fc"] == ["0.1", "0.5"]


def test_a_printed_report_has_the_table_of_rates_and_the_notes(net):
    # As on the command line: print() knows nothing of Rich.
    lines = str(audit(net, no_decay_groups(net), layers=map_by_children(net))).splitlines()
    head = next(number for number, line in enumerate(lines) if line.split() == ["Rates"])
    assert [line.split()[0] for line in lines[head:] if " 0.1 " in line] == ["stem", "mid", "fc"]

    class TakesTwo(Net):
        def forward(self, x, y):
            return super().forward(x + y)

    two = TakesTwo()
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(two.children(), (0.1, 0.2, 0.3))]
    report = audit(two, SGD(groups))
    assert report.notes
    assert str(report).endswith(report.notes[-1])


@pytest.mark.parametrize("width", [80, 120])
def test_findings_are_for_people_and_for_json(net, width):
    # what to do stands there to be copied, also in a narrow terminal
    net.stem.requires_grad_(False)
    report = audit(net, AdamW(trainable(net), lr=0.1), layers=map_by_children(net))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["ok"] is False
    assert told["findings"][0]["code"] == "frozen-norm-trains"
    assert [row["name"] for row in told["rates"]] == ["stem", "mid", "fc"]
    assert told["rates"][0]["lr"] is None
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "error  frozen-norm-trains  stem.1\n" in text
    assert "Fix: layerwise.freeze_batchnorm(model)" in text
    assert "frozen" in text
    assert len(report) == len(list(report))


@pytest.mark.parametrize("wrong", [3, "adam", nn.Linear(2, 2)])
def test_something_that_is_no_optimizer_is_refused(net, wrong):
    with pytest.raises(ModelError, match="no param_groups"):
        audit(net, wrong)


def test_a_map_of_another_model_is_refused(net):
    with pytest.raises(ModelError, match="does not have"):
        audit(nn.Linear(2, 2), layers=map_by_children(net))


def test_every_code_stands_in_the_guide():
    root = Path(__file__).parents[3]
    guide = (root / "docs" / "guide" / "audit.md").read_text()
    codes = set()
    for path in (root / "src" / "layerwise" / "tuning").glob("audit_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                codes.add(node.args[1].value)
    assert len(codes) > 25
    assert {code for code in codes if f"`{code}`" not in guide} == set()


@pytest.mark.parametrize("wrap", [lambda y: (y.sum(), {"logits": [y]}), Output, Slotted])
def test_gradients_are_looked_for_wherever_an_output_holds_tensors(wrap):
    # In tuples, mappings, lists and dataclasses; a part that no tensor reaches is still found.
    class Wrapped(Net):
        def forward(self, x):
            return wrap(self.fc(self.mid(self.stem(x).detach())))

    (found,) = audit(Wrapped(), loader=data())
    assert found.code == "no-gradient"
    assert all(name.startswith("stem") for name in found.modules)


def test_an_output_without_gradient_leaves_every_parameter_without(net):
    class Detached(Net):
        def forward(self, x):
            return super().forward(x).detach()

    (found,) = audit(Detached(), loader=data())
    assert (found.code, len(found.modules)) == ("no-gradient", len(list(net.parameters())))


def test_reentrant_checkpoints_are_not_taken_for_a_fault():
    # They give gradients to backward() alone, which an audit does not call: nothing is said of them.
    class Checkpointed(Net):
        def forward(self, x):
            return self.fc(checkpoint(self.mid, self.stem(x), use_reentrant=True))

    assert not list(audit(Checkpointed(), loader=data()))


def test_reentrant_checkpoints_over_frozen_parts_whose_output_requires_gradients():
    # What model.enable_input_require_grads() makes of a transformers model: the weights inside do learn.
    class Checkpointed(Net):
        def forward(self, x):
            return self.fc(checkpoint(self.mid, self.stem(x).requires_grad_(), use_reentrant=True))

    net = frozen(Checkpointed(), "stem").train()
    net(torch.randn(8, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in net.mid.parameters())
    net.zero_grad()
    assert not list(audit(net, loader=data()))


def test_optimisers_in_a_mapping_or_two_wrappers_deep_are_looked_into(net):
    # As Lightning and others hold them; all of them count.
    parts = {name: no_decay_groups(child) for name, child in net.named_children()}
    assert not list(audit(net, parts))
    assert [f.code for f in audit(net, {"fc": parts["fc"]})] == ["trainable-not-in-optimizer"]
    wrapped = SimpleNamespace(opt=SimpleNamespace(optimizer=no_decay_groups(net)))
    assert not list(audit(net, wrapped))


def test_zeros_flat_copies_stand_for_the_weights_that_they_were_made_of(net):
    # DeepSpeed's ZeRO puts one flat tensor of its own into each param group, and keeps what it is made of.
    frozen(net, "stem")
    inner = torch.optim.SGD([torch.zeros(9, requires_grad=True)], lr=0.1)
    held = [p for p in net.parameters() if p.requires_grad]
    zero = SimpleNamespace(param_groups=inner.param_groups, state=inner.state, bit16_groups=[held])
    freeze_batchnorm(net.stem)
    assert not list(audit(net, zero))
    net.stem.requires_grad_(True)
    (found,) = audit(net, zero)
    assert found.code == "trainable-not-in-optimizer"
    assert set(found.modules) == {f"stem.{name}" for name, _ in net.stem.named_parameters()}


def test_a_tie_is_looked_for_only_where_a_model_tells_its_ends():
    # A configuration that says so is not enough: other libraries have one too.
    net = Net()
    net.config = SimpleNamespace(tie_word_embeddings=True)
    assert not list(audit(net))
    net.get_input_embeddings, net.get_output_embeddings = (lambda: net.fc), (lambda: None)
    assert not list(audit(net))
    net.get_input_embeddings = lambda: [][0]  # transformers 4 raises where there are none, as in a ResNet
    assert not list(audit(net))
