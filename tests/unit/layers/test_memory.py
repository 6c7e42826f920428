"""Modules that carry something over from one forward pass to the next are named with the attribute."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.layers.recording import record


class Slotted:
    """Has no dictionary."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Counter:
    """Known to a module by its method alone."""

    def __init__(self) -> None:
        self.n = 0

    def step(self) -> None:
        self.n += 1


class Remembering(nn.Module):
    """A layer that calls `act` on itself in every forward pass."""

    def __init__(self, act: Callable[[nn.Module, torch.Tensor], object]) -> None:
        super().__init__()
        self.act = act
        self.linear = nn.Linear(3, 3)
        self.register_buffer("average", torch.zeros(3))
        self.calls, self.state, self.queue, self.table, self.seen = 0, torch.ones(3), [], None, torch.ones(3)
        self.numbers, self.ring, self.space = {"step": 0}, deque(maxlen=2), SimpleNamespace(n=0)
        self.nested, self.inner = {"a": [SimpleNamespace(n=0)]}, (SimpleNamespace(inner={"n": 0}),)
        self.iterator, self.number, self.yields = iter(range(9)), itertools.count(), (n for n in range(9))
        self.array, self.slotted, self.long = np.zeros(2), Slotted(), deque([torch.ones(1)] * 2000, 2000)
        self.left, self.bound = [1, 2, 3], functools.partial(list.pop, [1, 2, 3])
        self.step = Counter().step
        self.own, self.numpy_own, self.torch_own = (
            random.Random(1),
            np.random.default_rng(1),
            torch.Generator(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) * self.state
        self.act(self, x)
        return x


def replace_buffer(module: nn.Module, x: torch.Tensor) -> None:
    module.average = module.average + x.mean(0)


@pytest.mark.parametrize(
    ("act", "attribute"),
    [
        (lambda m, x: setattr(m, "calls", m.calls + 1), "calls"),
        (lambda m, x: m.numbers.update(step=1), "numbers"),
        (replace_buffer, "average"),
        (lambda m, x: setattr(m, "state", x.mean(0)), "state"),
        (lambda m, x: m.queue.append(x.mean(0)), "queue"),
        (lambda m, x: m.ring.append(x), "ring"),
        (lambda m, x: setattr(m.space, "n", m.space.n + 1), "space"),
        (lambda m, x: setattr(m.nested["a"][0], "n", 1), "nested"),
        (lambda m, x: m.inner[0].inner.update(n=1), "inner"),
        (lambda m, x: setattr(m.slotted, "n", 1), "slotted"),
        (lambda m, x: next(m.iterator), "iterator"),
        (lambda m, x: next(m.number), "number"),
        (lambda m, x: next(m.yields), "yields"),
        (lambda m, x: m.array.__iadd__(1), "array"),
        (lambda m, x: m.left.pop(), "left"),
        (lambda m, x: m.bound(), "bound"),
        (lambda m, x: m.step(), "step"),
        (lambda m, x: m.own.random(), "own"),
        (lambda m, x: m.numpy_own.random(), "numpy_own"),
        (lambda m, x: torch.rand(1, generator=m.torch_own), "torch_own"),
    ],
)
def test_what_changes_from_call_to_call_is_named(act, attribute) -> None:
    net = nn.Sequential(Remembering(act), nn.Linear(3, 2))
    recording = record(net, (torch.zeros(4, 3),))
    assert recording.remembering == {net[0]: attribute}
    assert (net[0].calls, net[0].step.__self__.n) == (0, 0)  # the recording leaves no trace


@pytest.mark.parametrize(
    "act",
    [
        lambda m, x: None,
        lambda m, x: setattr(m, "table", m.linear.weight * 2),  # made at the first call, and kept
        lambda m, x: m.queue.append(torch.ones(3)),
        lambda m, x: setattr(m, "calls", 0),
    ],
)
def test_what_stays_the_same_is_no_memory(act) -> None:
    assert record(nn.Sequential(Remembering(act)), (torch.zeros(4, 3),)).remembering == {}


@pytest.mark.parametrize(
    ("act", "attribute", "kept"),
    [
        (lambda m, x: setattr(m, "table", x), "table", 1),  # whoever trains it may read it
        (lambda m, x: setattr(m, "seen", x.relu()), "seen", 1),
        (lambda m, x: setattr(m, "table", {"one": [x, x + 1]}), "table", 2),
        (lambda m, x: m.numbers.update(features=x), "numbers", 1),
        (lambda m, x: m.long.append(x), "long", 1),  # nothing reads the items before
    ],
)
@pytest.mark.parametrize("fake", [True, False])
def test_what_only_keeps_values_of_the_batch_is_told_apart(fake, act, attribute, kept) -> None:
    net = nn.Sequential(Remembering(act), nn.Linear(3, 2))
    recording = record(net, (torch.zeros(4, 3),), fake=fake)
    assert recording.remembering == {}
    assert recording.keeping == {net[0]: (attribute,)}
    assert len(recording.kept_keys) == kept
    assert all(recording.values[key].kind == "computed" for key in recording.kept_keys)
    assert net[0].table is None
    assert net[0].numbers == {"step": 0}


class Previous(nn.Module):
    """Adds what it kept of the call before, which the first call of all does not show."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.kept, self.use = nn.Linear(3, 3), None, use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.kept is not None:
            x = self.use(x, self.kept)
        self.kept = x.detach()
        return x


@pytest.mark.parametrize("use", [lambda x, kept: x + kept.mean(), lambda x, kept: x.relu()])
@pytest.mark.parametrize("fake", [True, False])
def test_what_is_kept_for_the_next_call_is_memory(fake, use) -> None:
    net = nn.Sequential(Previous(use), nn.Linear(3, 2))
    recording = record(net, (torch.zeros(4, 3),), fake=fake)
    assert recording.remembering == {net[0]: "kept"}
    assert recording.keeping == {}


def test_a_class_that_counts_calls_is_named() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counting.calls += 1
            return super().forward(x)

    net = nn.Sequential(Counting(3, 3), nn.Linear(3, 2))
    assert record(net, (torch.zeros(4, 3),)).remembering == {net[0]: "calls"}
    assert Counting.calls == 0


def test_hooks_of_all_modules_must_see_each_of_them() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        watched = record(net, (torch.zeros(4, 3),)).watched
    finally:
        handle.remove()
    assert set(watched) == {net[0], net[1]}
    assert record(net, (torch.zeros(4, 3),)).watched == {}


def test_shapes_that_the_data_decide_are_handed_to_python() -> None:
    # as numbers are; an index by numbers has the shape of the index
    class Picking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            chosen = (x > 0).any(1).nonzero().flatten()
            return x[torch.tensor([0, 1])] + x[x > -9].sum() + len(chosen)

    recording = record(Picking(), (torch.ones(4, 3),))
    assert [(op.name, op.syncs) for op in recording.ops if op.name in ("nonzero", "index")] == [
        ("nonzero", True),
        ("index", False),
        ("index", True),
    ]


@pytest.mark.parametrize("fake", [True, False])
def test_a_module_that_refuses_a_second_call_remembers_the_first(fake) -> None:
    # it only keeps a value of the batch, but asks for it
    class Once(nn.Linear):
        kept = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kept is not None:
                raise ValueError("called before")
            self.kept = super().forward(x)
            return self.kept

    net = nn.Sequential(Once(3, 3), nn.Linear(3, 2))
    recording = record(net, (torch.zeros(4, 3),), fake=fake)
    assert recording.remembering == {net[0]: "kept"}
    assert recording.keeping == {}
