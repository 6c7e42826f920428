"""What a forward pass did to Python objects is put back: attributes, containers, random generators."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.layers.isolation import untouched
from layerwise.layers.snapshot import Snapshot, plain_tensors


class Busy(nn.Module):
    """Holds state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(2))
        self.count, self.prev, self.queue, self.ring = 0, None, [], deque(maxlen=2)
        self.table, self.seen, self.space = {"a": 1}, {3}, SimpleNamespace(inner=SimpleNamespace(n=0))


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
}


def told(module: nn.Module) -> str:
    hooks = len(module.linear._forward_hooks)
    weight = module.linear.weight
    return f"{vars(module)} {weight.device} {weight.data_ptr()} {id(module.total)} {hooks}"


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


def test_tensors_that_are_no_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].centre, module[0].ring = torch.zeros(2), [torch.ones(1), 3]
    assert [tuple(tensor.shape) for tensor in plain_tensors(module)] == [(2,), (1,)]
