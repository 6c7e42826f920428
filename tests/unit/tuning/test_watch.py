"""Watching a run: every moved bit is seen, and told apart by whether it was meant to move."""

import copy

import pytest
import torch
from torch import nn

import layerwise
from layerwise.errors import ModelError
from layerwise.tuning.norms import freeze_batchnorm
from layerwise.tuning.watch import digest, watch


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[:2].requires_grad_(False)
    return net


def train(net, optimizer=None, steps=2):
    optimizer = optimizer or torch.optim.SGD(net[2].parameters(), lr=0.1)
    net.train()
    for _ in range(steps):
        net(torch.randn(8, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_frozen_norm_in_train_mode_is_seen_drifting(net):
    with watch(net) as watched:
        train(net)
    report = watched.report
    assert report.moved == ("2.weight", "2.bias")
    assert report.frozen_moved == ()
    assert report.frozen_buffers_moved == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert not report.ok
    with pytest.raises(ModelError, match=r"3 buffers of frozen modules moved \(1\.running_mean"):
        report.raise_if_frozen_moved()


def test_buffers_of_frozen_parts_without_parameters_of_their_own_are_frozen():
    # The vectors of spectral_norm move in train mode; they stand in a module that has no parameters.
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    with watch(net) as watched:
        net.train()(torch.randn(5, 3))
    vectors = tuple(f"0.parametrizations.weight.0.{name}" for name in ("_u", "_v"))
    assert watched.report.frozen_buffers_moved == vectors
    with watch(net, trained=["0.parametrizations.weight.original"]) as watched:
        net.train()(torch.randn(5, 3))
    assert (watched.report.buffers_moved, watched.report.frozen_buffers_moved) == (vectors, ())
    net.requires_grad_(True)
    with watch(net) as watched:
        net.train()(torch.randn(5, 3))
    assert (watched.report.buffers_moved, watched.report.frozen_buffers) == (vectors, 0)


def test_a_frozen_norm_that_is_held_is_clean(net):
    freeze_batchnorm(net)
    with watch(net) as watched:
        train(net)
    assert watched.report.ok
    assert watched.report.moved == ("2.weight", "2.bias")
    assert (watched.report.frozen_tensors, watched.report.frozen_buffers) == (4, 3)
    watched.report.raise_if_frozen_moved()
    assert watched.report.to_dict()["ok"]
    assert "frozen: 0 of 4 parameters moved, 0 of 3 buffers moved" in str(watched.report)


def test_one_flipped_bit_of_a_frozen_weight_is_seen(net):
    freeze_batchnorm(net)
    with watch(net) as watched:
        bits = net[0].weight.data.view(torch.int32)
        bits[0, 0] ^= 1
    assert watched.report.frozen_moved == ("0.weight",)
    assert watched.report.still == ("2.weight", "2.bias")
    assert "trainable but did not move: 2.weight, 2.bias" in str(watched.report)


def test_frozen_on_the_way_counts_as_learning_when_it_is_said(net):
    # unfrozen and frozen again in between: the two ends look frozen
    def run(expected):
        model = copy.deepcopy(net)
        with watch(model) as watched:
            model[:2].requires_grad_(True)
            train(model, torch.optim.SGD(model.parameters(), lr=0.1))
            model[:2].requires_grad_(False)
            watched.expect(trained=expected)
        return watched.report

    assert not run([]).ok
    report = run([name for name, _ in net.named_parameters()])
    assert report.ok
    assert "0.weight" in report.moved


def test_norms_that_adapt_on_purpose_are_no_fault(net):
    with watch(net, adapting=["1"]) as watched:
        train(net)
    assert watched.report.ok
    assert "1.running_mean" in watched.report.buffers_moved


def test_norms_that_were_measured_on_purpose_are_watched_from_then_on(net):
    # They moved, which is no fault; what moves them afterwards is one.
    net[:2].requires_grad_(False)
    for drifts in (False, True):
        with watch(net) as watched:
            layerwise.calibrate_batchnorm(net, [torch.randn(16, 3)])
            watched.expect(measured=["1"])
            train(net) if drifts else None
        assert watched.report.ok is not drifts
        assert "1.running_mean" in watched.report.buffers_moved
        assert watched.report.frozen_buffers == 3


def test_a_replaced_parameter_is_named(net):
    with watch(net) as watched:
        net[2].weight = nn.Parameter(net[2].weight.detach().clone())
    assert watched.report.replaced == ("2.weight",)
    assert watched.report.moved == ()


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_wiped_moments_are_reported_and_kept_ones_are_not(net, kind):
    optimizer = kind(net[2].parameters(), lr=0.01)
    train(net, optimizer)
    with watch(net, optimizer=optimizer) as watched:
        train(net, optimizer)
    assert watched.report.lost_state == ()
    with watch(net, optimizer=optimizer) as watched:
        optimizer.state.clear()
    assert watched.report.lost_state == ("2.weight", "2.bias")


def test_reports_after_an_exception_and_not_before_the_end(net):
    with pytest.raises(RuntimeError), watch(net) as watched:
        net(torch.zeros(1, 9))
    assert watched.report.moved == ()
    with watch(net) as watched, pytest.raises(ModelError, match="not ended"):
        _ = watched.report


def test_wrappers_are_looked_through(net):
    with watch(torch.compile(net, backend="eager")) as watched:
        train(net)
    assert "2.weight" in watched.report.moved


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(0),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(3, device="meta"),
    ],
)
def test_every_kind_of_tensor_has_a_hash_of_its_values(tensor):
    assert digest(tensor) == digest(tensor.clone())
    if tensor.numel() and not tensor.is_meta:
        other = tensor.clone()
        other.view(-1)[:1].copy_(torch.zeros(1)) if other.is_contiguous() else other.add_(1)
        assert digest(tensor) != digest(other)
    assert digest(nn.UninitializedParameter()) != digest(tensor)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_watched(layout) -> None:
    """Their memory cannot be read in one piece."""
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.eye(2).to_sparse(layout=layout))
    with watch(model) as watched:
        model.table = 2 * model.table
    assert watched.report.buffers_moved == ("table",)
