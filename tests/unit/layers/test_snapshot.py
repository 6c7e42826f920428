"""What a forward pass did to Python objects is put back: attributes, containers, random generators."""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.layers.isolation import untouched
from layerwise.layers.recording import record
from layerwise.layers.snapshot import Snapshot, plain_tensors


class Slotted:
    """Has no dictionary."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0

    def __repr__(self) -> str:
        return f"Slotted({self.n})"


class Busy(nn.Module):
    """Holds state of every kind."""

    calls, log = 0, [0]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(2))
        self.count, self.prev, self.queue, self.ring = 0, None, [], deque(maxlen=2)
        self.table, self.seen, self.space = {"a": 1}, {3}, SimpleNamespace(inner=SimpleNamespace(n=0))
        self.array, self.slotted, self.nested = np.zeros(2), Slotted(), ([{"n": [0]}],)
        self.number, self.inner = itertools.count(), [iter([1, 2, 3])]
        self.pairs = zip(itertools.cycle([1, 2]), iter(range(9)))
        self.told = list[int]  # shows the attributes of `list`, which nobody can write


CHANGES = {
    "number": lambda m: setattr(m, "count", 1),
    "none": lambda m: setattr(m, "prev", torch.ones(2)),
    "new attribute": lambda m: setattr(m, "extra", 1),
    "removed attribute": lambda m: delattr(m, "prev"),
    "list": lambda m: m.queue.append(1),
    "deque": lambda m: m.ring.append(1),
    "dict": lambda m: m.table.update(a=2),
    "renamed key": lambda m: m.table.update(b=m.table.pop("a")),
    "set": lambda m: m.seen.clear(),
    "object in an object": lambda m: setattr(m.space.inner, "n", 5),
    "other buffer": lambda m: setattr(m, "total", torch.ones(2)),
    "other data": lambda m: setattr(m.linear.weight, "data", torch.ones(2, 2)),
    "hook": lambda m: m.linear.register_forward_hook(lambda *a: None),
    "mode": lambda m: m.eval(),
    "array": lambda m: m.array.__iadd__(1),
    "object with slots": lambda m: setattr(m.slotted, "n", 1),
    "list in a dict in a list in a tuple": lambda m: m.nested[0][0]["n"].append(1),
    "attribute of the class": lambda m: setattr(Busy, "calls", Busy.calls + 1),
    "new attribute of the class": lambda m: setattr(Busy, "more", 1),
    "list of the class": lambda m: Busy.log.append(1),
}


def told(module: nn.Module) -> str:
    hooks = len(module.linear._forward_hooks)
    weight = module.linear.weight
    of_class = f"{Busy.calls} {Busy.log} {hasattr(Busy, 'more')}"
    return f"{vars(module)} {of_class} {weight.device} {weight.data_ptr()} {id(module.total)} {hooks}"


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_undone(name) -> None:
    module = Busy()
    before, parameter = told(module), module.linear.weight
    with untouched(module):
        CHANGES[name](module)
        assert told(module) != before
    assert told(module) == before
    assert module.linear.weight is parameter


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
        (lambda: np.random.default_rng(1), lambda g: float(g.random())),
        (lambda: np.random.RandomState(1), lambda g: float(g.rand())),
        (lambda: random.Random(1), lambda g: g.random()),
    ],
)
def test_generators_go_on_where_they_were(make, draw) -> None:
    # wherever a data set keeps one: in a transform of a list, say
    holder = SimpleNamespace(transforms=[SimpleNamespace(rng=make())], data={"x": 1})
    rng = holder.transforms[0].rng
    kept = Snapshot([holder], generators_only=True)
    states, first = kept.states(), draw(rng)
    assert kept.states() != states
    holder.data["x"] = 2
    kept.restore()
    assert (kept.states(), draw(rng)) == (states, first)
    assert holder.data == {"x": 2}  # generators only


def test_iterators_go_on_where_they_were() -> None:
    # they cannot be set back, so that others take their place meanwhile
    module = Busy()
    next(module.number), next(module.inner[0]), next(module.pairs)
    mine = module.number
    with untouched(module):
        assert (next(module.number), next(module.inner[0])) == (1, 2)
        assert [next(module.pairs) for _ in range(4)] == [(2, 1), (1, 2), (2, 3), (1, 4)]
    assert (next(module.number), next(module.inner[0])) == (1, 2)
    assert [next(module.pairs) for _ in range(3)] == [(2, 1), (1, 2), (2, 3)]
    assert module.number is mine


SEEN: list[Any] = []
TIMES = 0


def note(output: Any) -> None:
    SEEN.append(output)


class Watcher:
    """Watches a layer."""

    def __init__(self) -> None:
        self.seen = []

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output)


def in_globals() -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        global TIMES
        TIMES += 1
        note(output)

    return hook, lambda: (TIMES, len(SEEN))


def in_closure() -> Any:
    seen, times, count = {}, 0, itertools.count()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal times
        times += 1
        seen[next(count)] = output

    return hook, lambda: (times, list(seen))


def in_object() -> Any:
    watcher = Watcher()
    return watcher.hook, lambda: len(watcher.seen)


def in_callable() -> Any:
    watcher = Watcher()
    return watcher, lambda: len(watcher.seen)


def in_partial() -> Any:
    seen: list[Any] = []
    return functools.partial(lambda seen, m, a, out: seen.append(out), seen), lambda: len(seen)


def in_default() -> Any:
    seen: list[Any] = []

    def hook(module: nn.Module, args: Any, output: Any, into: Any = seen) -> None:
        hook.times = len(into)
        into.append(output)

    return hook, lambda: (len(seen), vars(hook).copy())


@pytest.mark.parametrize("make", [in_globals, in_closure, in_object, in_callable, in_partial, in_default])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_hooks_write_is_put_back(make, everywhere) -> None:
    model, (hook, told_now) = nn.Sequential(nn.Linear(2, 2)), make()
    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = model[0].register_forward_hook(hook)
    try:
        before = told_now()
        with untouched(model):
            model(torch.ones(1, 2))
            assert told_now() != before  # it runs
        assert told_now() == before
        record(model, (torch.ones(1, 2),))
        assert told_now() == before
        model(torch.ones(1, 2))
        assert told_now() != before
    finally:
        handle.remove()


def test_tensors_that_are_no_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].centre, module[0].ring = torch.zeros(2), [torch.ones(1), 3]
    module[1].space = SimpleNamespace(table={"a": (torch.zeros(3),)}, again=module[0].centre)
    assert [tuple(tensor.shape) for tensor in plain_tensors([*module.modules()])] == [(2,), (1,), (3,)]
