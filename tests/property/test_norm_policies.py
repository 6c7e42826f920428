"""Over random sequences of phases: the last one says everything, and releasing leaves no trace."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import map_by_children
from layerwise.plans.settings import Norms
from layerwise.tuning.calibration import calibrate_batchnorm
from layerwise.tuning.norms import apply_norms, release_norms

GROUPS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.b = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3))
        self.c = nn.Sequential(nn.Linear(3, 2))

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def norms():
    policies = st.sampled_from(["follow", "freeze", "calibrate"])
    of_one = st.one_of(
        st.builds(Norms, policy=policies, tune=st.booleans()),
        st.builds(Norms, policy=st.just("adapt"), momentum=st.one_of(st.none(), st.floats(0.1, 1))),
    )
    until = st.builds(Norms, policy=st.just("freeze_until"), until=st.sampled_from(GROUPS))
    groups = st.dictionaries(st.sampled_from(GROUPS), of_one)
    return st.builds(lambda own, groups: own.with_changes(groups=groups), st.one_of(of_one, until), groups)


phases = st.tuples(st.sets(st.sampled_from(GROUPS)), norms(), st.booleans(), st.booleans())


def modes(net):
    """Return what every module would do: its mode after train(), and its momentum."""
    net.train()
    return {
        name: (module.training, getattr(module, "momentum", None)) for name, module in net.named_modules()
    }


@given(st.lists(phases, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_last_phase_says_everything_and_release_leaves_no_trace(sequence):
    net = Net()
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    layers = map_by_children(net)
    for frozen, policy, dropout, copied in sequence:
        record = apply_norms(net, layers, frozen, policy, frozen_dropout=dropout)
        net = copy.deepcopy(net) if copied else net
    fresh = Net()
    frozen, policy, dropout, _ = sequence[-1]
    assert record == apply_norms(fresh, layers, frozen, policy, frozen_dropout=dropout)
    assert modes(net) == modes(fresh)
    assert set(record.adapting) | set(record.fixed) == {"a.1", "b.1"}
    assert not set(record.trainable) & set(record.frozen)
    assert record.policies == {f"{name}.1": policy.of(name).policy for name in ("a", "b")}
    release_norms(net)
    after = {name: dict(module.__dict__) for name, module in net.named_modules()}
    keys = ("training", "momentum", "train")
    for name, values in before.items():
        assert {k: after[name].get(k) for k in keys} == {k: values.get(k) for k in keys}
        assert set(after[name]) == set(values)


@given(st.permutations(range(11)), st.lists(st.integers(1, 5), min_size=11, max_size=11))
@settings(max_examples=30, deadline=None)
def test_exact_calibration_does_not_depend_on_how_the_data_is_cut(order, sizes):
    torch.manual_seed(0)
    net = Net()
    data = torch.randn(11, 2) * 2 + 1
    other = copy.deepcopy(net)
    calibrate_batchnorm(net, [data])
    cut, left = [], data[list(order)]
    for size in sizes:
        if len(left):
            cut.append(left[:size])
            left = left[size:]
    calibrate_batchnorm(other, cut)
    for path in ("a.1", "b.1"):
        for name in ("running_mean", "running_var"):
            one, two = (getattr(m.get_submodule(path), name) for m in (net, other))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
