"""Options of fit: every wrong one is listed, and a run is resumed only with the same ones."""

import functools
import math
import re

import pytest
import torch

from layerwise.errors import RunError, TrainingError
from layerwise.plans.plan import Plan
from layerwise.training.classification import Classification
from layerwise.training.monitoring import has_stalled, is_better
from layerwise.training.options import check_options, check_same_run, find_optimizer

GOOD = {
    "lr": 1e-3,
    "optimizer": "adamw",
    "batch_size": 8,
    "accumulate": 1,
    "workers": 0,
    "keep_checkpoints": 2,
    "seed": 0,
    "precision": "fp32",
    "label_smoothing": 0.0,
    "keep": "best",
    "sampler": None,
    "cache": "off",
    "weight_decay": None,
    "clip_norm": None,
    "early_stopping": None,
    "checkpoint_every_steps": None,
    "class_weights": None,
    "task": "auto",
    "classes": None,
    "device": "auto",
    "trackers": None,
}


def test_good_options_pass() -> None:
    # Defaults and the other legal values raise nothing.
    check_options(GOOD)
    check_options({**GOOD, "class_weights": [1, 2.0], "clip_norm": 1, "early_stopping": 3, "weight_decay": 0})
    check_options({**GOOD, "task": Classification(("a", "b")), "device": "cpu", "trackers": ["tensorboard"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", 0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "1e-3"),
        ("optimizer", "adamv"),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("accumulate", 0),
        ("workers", -1),
        ("workers", 1_000_000),
        ("seed", -1),
        ("precision", "fp8"),
        ("precision", "fp16"),
        ("precision", ["fp32"]),
        ("device", "cuda:1"),
        ("device", ["cpu"]),
        ("task", "image_classification"),
        ("task", 3),
        ("trackers", 3),
        ("classes", 3),
        ("classes", "abc"),
        ("classes", {"a"}),
        ("trackers", [3]),
        ("label_smoothing", 1.0),
        ("class_weights", "rare"),
        ("class_weights", [1.0, -1.0]),
        ("class_weights", 3),
        ("early_stopping", 0),
        ("clip_norm", 0),
        ("weight_decay", -0.1),
    ],
)
def test_each_wrong_value_is_told(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    # The option and the value received stand in the message.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=name) as caught:
        check_options({**GOOD, name: value})
    assert repr(value) in str(caught.value)


def test_rare_classes_are_not_counted_twice() -> None:
    # Balanced weights of the loss and of the samples exclude each other; costs of the caller's own do not.
    with pytest.raises(TrainingError, match=r"rare classes twice.* Leave out class_weights .* or sampler"):
        check_options({**GOOD, "class_weights": "balanced", "sampler": "weighted"})
    check_options({**GOOD, "class_weights": [1.0, 5.0], "sampler": "weighted"})


def test_all_wrong_values_are_told_at_once() -> None:
    # One error lists every problem.
    with pytest.raises(TrainingError, match="3 options") as caught:
        check_options({**GOOD, "lr": -1, "batch_size": 0, "keep": "first"})
    assert all(name in str(caught.value) for name in ("lr is -1", "batch_size is 0", "keep is 'first'"))


def test_optimisers_by_name_and_as_classes() -> None:
    # A name has its defaults, which options win over; anything callable is taken as it is.
    cpu = torch.device("cpu")
    fused = {"momentum": 0.9, "fused": True}
    assert find_optimizer("sgd", None, device=cpu)[:2] == (torch.optim.SGD, fused)
    assert find_optimizer("sgd", {"momentum": 0.5}, device=cpu)[1] == {**fused, "momentum": 0.5}
    assert find_optimizer("adamw", {"foreach": True}, device=cpu)[1] == {"foreach": True}
    assert find_optimizer("adamw", None, device=torch.device("meta"))[1] == {}
    assert find_optimizer(torch.optim.Adagrad, None, device=cpu) == (torch.optim.Adagrad, {}, "Adagrad")
    with pytest.raises(TrainingError, match="Did you mean 'adamw'"):
        find_optimizer("adam_w", None, device=cpu)


def test_the_name_of_a_factory_is_the_same_in_every_process() -> None:
    # It goes into run.json, and a resumed run must have the same; an address differs.
    def make(parameters: object, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, momentum=momentum)

    factory = functools.partial(make, momentum=0.5)
    assert " at 0x" in repr(factory)
    name = find_optimizer(factory, None, device=torch.device("cpu"))[2]
    assert re.fullmatch(r"functools\.partial\(<function .*make>, momentum=0\.5\)", name)


def test_a_resumed_run_must_be_the_same_run() -> None:
    # Every difference in plan, settings, data, task or model is listed; none passes.
    plan = Plan.model_validate(
        {"groups": ["a", "b"], "phases": [{"name": "p", "rates": {"b": 1.0}, "epochs": 1}]}
    )
    about = {
        "plan": plan.model_dump(mode="json"),
        "settings": {"lr": 0.1, "seed": 0},
        "data": {"train_samples": 10},
        "task": {"classes": ["x", "y"]},
        "model": {"class": "Net"},
    }
    check_same_run(about, now=about, plan=plan, out="runs/x")
    now = {**about, "settings": {"lr": 0.2, "seed": 0}, "task": {"classes": ["x", "z"]}}
    with pytest.raises(RunError) as caught:
        check_same_run(about, now=now, plan=plan, out="runs/x")
    assert "settings.lr: 0.1 -> 0.2" in str(caught.value)
    assert "task.classes: ['x', 'y'] -> ['x', 'z']" in str(caught.value)
    assert "seed" not in str(caught.value)
    known = {**about, "data": {"train_samples": 10, "train_fingerprint": "a"}}
    check_same_run(about, now=known, plan=plan, out="runs/x")  # an older run, or augmented data: unknown
    check_same_run(known, now=about, plan=plan, out="runs/x")
    other = {**about, "data": {"train_samples": 10, "train_fingerprint": "b"}}
    with pytest.raises(RunError, match=r"data\.train_fingerprint: 'a' -> 'b'"):
        check_same_run(known, now=other, plan=plan, out="runs/x")
    longer = plan.model_copy(update={"strategy": "another"})
    with pytest.raises(RunError, match=r"plan\.strategy"):
        check_same_run(about, now=about, plan=longer, out="runs/x")
    lacking = {name: value for name, value in about["plan"].items() if name != "strategy"}
    for before, told in (
        (lacking, "plan.strategy: None ->"),
        ({**about["plan"], "x": 3}, "plan.x: 3 -> None"),
    ):
        with pytest.raises(RunError, match=re.escape(told)):  # of another version, or altered
            check_same_run({**about, "plan": before}, now=about, plan=plan, out="runs/x")


def test_better_and_stalled() -> None:
    # NaN never improves; equal is not better, but by its loss; lower is better where the mode says so.
    assert is_better(1.0, None, "max")
    assert not is_better(1.0, 1.0, "max")
    assert not is_better(math.nan, 0.5, "max")
    assert not is_better(math.nan, math.nan, "max")
    assert is_better(0.5, math.nan, "max")
    assert is_better(0.4, 0.5, "min")
    assert is_better(1.0, 1.0, "max", loss=0.1, than_loss=0.4)
    assert not is_better(1.0, 1.0, "max", loss=0.4, than_loss=0.4)
    assert not is_better(0.9, 1.0, "max", loss=0.1, than_loss=0.4)
    assert not is_better(1.0, 1.0, "max", loss=math.nan, than_loss=0.4)
    assert is_better(1.0, 1.0, "max", loss=0.4, than_loss=math.nan)
    assert not is_better(1.0, 1.0, "max", loss=0.4, than_loss=None)
    assert not has_stalled([math.nan, 0.5, 0.6, 0.7], "max", patience_epochs=1)
    assert has_stalled([0.5, math.nan, math.nan], "max", patience_epochs=2)
    assert has_stalled([1.0, 0.5, 0.6, 0.5], "min", patience_epochs=2)
    assert not has_stalled([1.0, 0.5, 0.6, 0.4], "min", patience_epochs=2)
    assert not has_stalled([], "max", patience_epochs=1)


def test_a_run_is_not_resumed_with_a_model_of_another_class() -> None:
    # Its weights might fit all the same; both names are told.
    plan = Plan.model_validate({"groups": ["a"], "phases": [{"name": "p", "rates": {"a": 1.0}, "epochs": 1}]})
    about = {"plan": plan.model_dump(mode="json"), "model": {"class": "ResNet", "spec": "timm:resnet18"}}
    for key, value in (("class", "DenseNet"), ("spec", "timm:resnet34")):
        now = {**about, "model": {**about["model"], key: value}}
        with pytest.raises(
            RunError, match=rf"model\.{key}: '{about['model'][key]}' -> '{value}'\n.*same values"
        ):
            check_same_run(about, now=now, plan=plan, out="runs/x")
