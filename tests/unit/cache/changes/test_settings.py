"""What the loop changes and the outputs depend on is noticed: attributes, hooks, frozen weights."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cache_loops import both, images
from layerwise.cache.changes.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")


class Slotted:
    """Has no dictionary."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Shared:
    """A configuration that is a class."""

    scale = 1.0


class Config:
    """Its objects have what their class has."""

    scale = 1.0

    def __init__(self) -> None:
        self.own = 1.0

    def value(self) -> float:
        """Return a number of the object's."""
        return self.own


def helper(x: Any = 1.0) -> Any:
    """Return what is given."""
    return x


def other_helper(x: Any = 1.0) -> Any:
    """Return something else."""
    return -x


class Base(nn.Module):
    """Its attributes are inherited."""

    limit = 1.0

    def helper(self) -> None:
        """Do nothing."""

    def edited(self, scale: float = 1.0) -> float:
        """Return what is given."""
        return scale

    @property
    def level(self) -> float:
        """Return a number."""
        return 1.0


class Layer(Base):
    """Has settings of every kind."""

    scale, table = 1.0, {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.nested, self.rows, self.pair = {"a": {"b": [1.0]}}, [[1.0]], ([1.0], 2)
        self.space, self.slotted = SimpleNamespace(inner=SimpleNamespace(scale=1.0)), Slotted()
        self.array, self.large_array = np.ones(2), np.ones(100)
        self.tensor, self.large = torch.ones(1), torch.ones(100)
        self.tensors = {
            "list": [torch.ones(1)],
            "pair": (torch.ones(100),),
            "object": SimpleNamespace(t=self.tensor),
        }
        self.hidden = [
            nn.BatchNorm1d(2).requires_grad_(False),
            nn.Linear(2, 2, device="meta").requires_grad_(False),  # looked at as well, without numbers
        ]
        self.count, self.ring = itertools.count(), deque([0], maxlen=2)
        self.partial = functools.partial(torch.add, [1.0], alpha=1.0)
        self.graph, self.codes = torch.eye(9).to_sparse(), quantised(1.0)
        self.blank = torch.empty(99, device="meta")
        self.register_buffer("later", None)
        self.act = nn.Tanh()
        self.whole, self.zero, self.wholes, self.mixed = 1, 0.0, [1], {"a": 1}
        self.shared, self.config, self.function = Shared, [Config()], helper
        self.bound = Config().value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


class Other(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def quantised(value: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.full((9,), value), 0.5, 0, torch.qint8)


def anew(layer: Any) -> None:
    layer.tensor = torch.ones(1)  # equal to the one before, which then is written to
    layer.tensor.data.fill_(3)


AT_BATCHES = {
    "dict in dict": lambda m: m.nested["a"].update(c=1),
    "order of a dict": lambda m: m.tensors.update(list=m.tensors.pop("list")),
    "list in dict in dict": lambda m: m.nested["a"]["b"].append(2),
    "list in list": lambda m: m.rows[0].__setitem__(0, 2.0),
    "list in tuple": lambda m: m.pair[0].append(1),
    "object in object": lambda m: setattr(m.space.inner, "scale", 2.0),
    "slots": lambda m: setattr(m.slotted, "scale", 2.0),
    "small array": lambda m: m.array.__imul__(2),
    "small tensor": lambda m: m.tensor.data.mul_(2),
    "small tensor in a list": lambda m: m.tensors["list"][0].data.mul_(2),
    "tensor in a tuple": lambda m: m.tensors["pair"][0].mul_(2),
    "tensor anew": anew,
    "class": lambda m: setattr(Layer, "scale", 2.0),
    "dict of the class": lambda m: Layer.table.update(scale=2.0),
    "base class": lambda m: setattr(Base, "limit", 2.0),
    "class hides its base": lambda m: setattr(Layer, "limit", 2.0),
    "number that a partial function was given": lambda m: m.partial.keywords.update(alpha=2.0),
    "list that a partial function was given": lambda m: m.partial.args[0].append(2.0),
    "sparse": lambda m: m.graph.mul_(2),
    "quantised": lambda m: m.codes.copy_(quantised(2.0)),
    "number of another type": lambda m: setattr(m, "whole", 1.0),
    "number that is true": lambda m: setattr(m, "whole", True),
    "sign of zero": lambda m: setattr(m, "zero", -0.0),
    "number of another type in a list": lambda m: m.wholes.__setitem__(0, True),
    "number of another type in a dict": lambda m: m.mixed.update(a=1.0),
    "class that is an attribute": lambda m: setattr(Shared, "scale", 2.0),
    "class of an object": lambda m: setattr(Config, "scale", 2.0),
    "object of a bound method": lambda m: setattr(m.bound.__self__, "own", 2.0),
    "buffer that was none": lambda m: setattr(m, "later", torch.ones(1)),
    "new buffer": lambda m: m.register_buffer("new", torch.ones(1)),
    "attribute that hides one of the class": lambda m: setattr(m, "limit", 1.0),
    "child": lambda m: setattr(m, "linear", nn.Linear(2, 2)),
    "parameter of a child": lambda m: setattr(m.linear, "weight", nn.Parameter(torch.ones(2, 2))),
    "hook": lambda m: m.linear.register_forward_hook(lambda *a: None),
    "other hook": lambda m: (m.hook.remove(), m.linear.register_forward_hook(lambda *a: None)),
}
AT_EPOCHS = {
    "large array": lambda m: m.large_array.__imul__(2),
    "large tensor through data": lambda m: m.large.data.mul_(2),
    "large tensor through numpy": lambda m: m.large.numpy().__imul__(2),
    "large tensor in a tuple": lambda m: m.tensors["pair"][0].data.mul_(2),
    "sparse through its values": lambda m: m.graph._values().mul_(2),
    "weight of a module in a list": lambda m: m.hidden[0].weight.data.mul_(2),
    "statistics of a module in a list": lambda m: m.hidden[0].running_mean.add_(1),
    "mode of a module in a list": lambda m: m.hidden[0].eval(),
    "who learns of a module in a list": lambda m: m.hidden[0].bias.requires_grad_(True),
    "another class": lambda m: setattr(m, "__class__", Other),
    "another class of torch's": lambda m: setattr(m.act, "__class__", nn.Sigmoid),
    "another method of the class": lambda m: setattr(Layer, "forward", Other.forward),
    "another method of a base class": lambda m: setattr(Base, "helper", Other.forward),
    "other code of a method": lambda m: setattr(Base.edited, "__code__", Other.forward.__code__),
    "other defaults of a method": lambda m: setattr(Base.edited, "__defaults__", (2.0,)),
    "another method of torch's class": lambda m: setattr(nn.Tanh, "forward", Other.forward),
    "another property": lambda m: setattr(Base, "level", property(lambda self: 2.0)),
    "another method of an object's class": lambda m: setattr(Config, "value", lambda self: 2.0),
    "other code of a function": lambda m: setattr(helper, "__code__", other_helper.__code__),
    "other defaults of a function": lambda m: setattr(helper, "__defaults__", (2.0,)),
}


class Hiding(nn.Module):
    """Keeps its backbone out of its own parameters, as some do to save it with nothing."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3)
        self.backbone = [nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()).requires_grad_(False).eval()]
        self.neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        self.head, self.own = nn.Linear(4, 4), [self.neck]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.neck(self.backbone[0](x)))


@pytest.mark.parametrize("what", ["weight", "statistics", "mode", "nothing"])
def test_a_module_that_is_none_of_the_models(what) -> None:
    def change(model: Any, epoch: int) -> None:
        hidden = model.backbone[0]
        if epoch == 2 and what == "weight":
            hidden[0].weight.data.mul_(2)
        elif epoch == 2 and what == "statistics":
            hidden[1].running_mean.add_(1)
        elif epoch == 2 and what == "mode":
            hidden.train()

    loads = both(Hiding, images, "head", before_epoch=change, epochs=4, batch=11).loads
    assert (loads[2] > 0) == (what != "nothing")


@pytest.fixture
def layer(monkeypatch) -> nn.Module:
    """Return a layer; its classes are put back afterwards."""
    monkeypatch.setattr(Layer, "scale", 1.0)
    monkeypatch.setattr(Layer, "table", {"scale": 1.0})
    monkeypatch.setattr(Base, "limit", 1.0)
    monkeypatch.setattr(Layer, "limit", 1.0, raising=False)
    monkeypatch.delattr(Layer, "limit")
    monkeypatch.setattr(Layer, "forward", Layer.forward)
    monkeypatch.setattr(Base, "helper", Base.helper)
    monkeypatch.setattr(Base, "level", Base.level)
    monkeypatch.setattr(nn.Tanh, "forward", nn.Tanh.forward)
    monkeypatch.setattr(Shared, "scale", 1.0)
    monkeypatch.setattr(Config, "scale", 1.0)
    monkeypatch.setattr(Config, "value", Config.value)
    for function in (helper, Base.edited):
        monkeypatch.setattr(function, "__code__", function.__code__)
        monkeypatch.setattr(function, "__defaults__", function.__defaults__)
    made = Layer()
    made.hook = made.linear.register_forward_hook(lambda *a: None)
    return made


@pytest.mark.parametrize("name", AT_BATCHES)
def test_changes_are_seen_at_the_next_batch(name, layer) -> None:
    model = nn.Sequential(layer)
    settings = Settings(model.modules())
    before = settings.number()
    assert settings.number() == before
    AT_BATCHES[name](layer)
    now = settings.number()
    assert now != before
    assert settings.number() == now


@pytest.mark.parametrize("name", ["attribute that hides one of the class", "slots", "new buffer", "child"])
def test_changes_of_the_model_itself_are_seen_at_the_next_batch(name, layer) -> None:
    settings = Settings(layer.modules())
    before = settings.number()
    AT_BATCHES[name](layer)
    assert settings.number() != before


def closing_over(value: float) -> Any:
    return lambda x: x * value


def listed(value: float) -> Any:
    return [closing_over(value)]


@pytest.mark.parametrize("make", [closing_over, listed, slice, float])
def test_what_lies_in_memory_where_something_else_lay_is_another(make, layer) -> None:
    # what was stored for a function that is gone must not be replayed for the one at its address
    settings, numbers = Settings(nn.Sequential(layer).modules()), set()
    for value in range(20):
        layer.function = make(value)
        numbers.add(settings.number())
    assert len(numbers) == 20


def test_a_setting_that_moves_by_itself_may_be_deleted(layer) -> None:
    settings = Settings(nn.Sequential(layer).modules())
    for _ in range(3):
        settings.before_forward()
        layer.whole += 1
        settings.after_forward()
    before = settings.number()
    layer.whole += 1
    assert settings.number() == before
    del layer.whole
    assert settings.number() == before


def test_a_tensor_that_took_anothers_place_is_watched(layer) -> None:
    # it is equal to the one before, so nothing is another at first
    settings = Settings(nn.Sequential(layer).modules())
    before = settings.number()
    layer.tensor = layer.tensors["list"][0] = torch.ones(1)
    assert settings.number() == before
    layer.tensor.data.fill_(3)
    assert settings.number() != before


@pytest.mark.parametrize("at", ["batches", "epochs"])
def test_the_class_of_an_object_that_took_anothers_place_is_watched(at, layer) -> None:
    class Late:
        scale = 1.0

    model = nn.Sequential(layer)
    settings = Settings(model.modules())
    layer.config = [Late()]
    before = settings.number()
    if at == "epochs":
        settings.refresh(model.modules())
    Late.scale = 2.0
    assert settings.number() != before


@pytest.mark.parametrize("name", AT_EPOCHS)
def test_changes_of_data_are_seen_at_the_next_epoch(name, layer) -> None:
    model = nn.Sequential(layer)
    settings = Settings(model.modules())
    before = settings.number()
    AT_EPOCHS[name](layer)
    settings.refresh(model.modules())
    assert settings.number() != before


def test_the_same_settings_have_the_same_number(layer) -> None:
    settings = Settings(nn.Sequential(layer).modules())
    before = settings.number()
    layer.nested["a"]["b"][0], Layer.scale, layer.slotted.scale = 2.0, 2.0, 2.0
    assert settings.number() != before
    layer.nested["a"]["b"][0], Layer.scale, layer.slotted.scale = 1.0, 1.0, 1.0
    assert settings.number() == before


def test_using_an_iterator_is_no_other_setting(layer) -> None:
    # a pass that uses it is never skipped
    settings = Settings(nn.Sequential(layer).modules())
    before = settings.number()
    next(layer.count)
    layer.count = itertools.count()  # as `untouched` puts another in its place
    assert settings.number() == before


def test_objects_that_hold_each_other_are_looked_at_once(layer) -> None:
    layer.space.back = layer.space.inner.back = layer.space
    layer.rows.append(layer.rows)
    settings = Settings(nn.Sequential(layer).modules())
    before = settings.number()
    layer.space.inner.scale = 2.0
    assert settings.number() != before


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_all_modules_are_settings(kind) -> None:
    settings = Settings(nn.Sequential(nn.Linear(2, 2)).modules())
    before = settings.number()
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *a: None)
    try:
        assert settings.number() != before
    finally:
        handle.remove()
    assert settings.number() == before


class Graph(nn.Module):
    """Mixes the features of each sample along the edges of a sparse graph."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(192, 8), Mix(), nn.Linear(8, 4)
        graph = torch.eye(8).to_sparse()
        if kind == "buffer":
            self.mix.register_buffer("graph", graph, persistent=False)
        else:
            self.mix.graph = graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.body(x.flatten(1))))


class Mix(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.graph @ x.T).T


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_graph_that_the_loop_changes(kind) -> None:
    # what is stored behind it is worth nothing then
    def grown(model: Any, epoch: int) -> None:
        if epoch == 2:
            model.mix.graph.mul_(2)

    both(lambda: Graph(kind), images, "head", epochs=4, before_epoch=grown)


def test_tensors_without_a_version() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
        model[0].centre, model[0].table = torch.ones(1), [torch.ones(100)]
    settings = Settings(model.modules())
    before = settings.number()
    with torch.inference_mode():
        model[0].centre.fill_(2)
    assert settings.number() != before
