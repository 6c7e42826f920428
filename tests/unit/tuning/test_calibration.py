"""Calibration: the statistics of the whole set, whatever the batches; and nothing else changes."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from forked import Forked
from layerwise.errors import DataError, ModelError
from layerwise.layers.norms import find_norms
from layerwise.tuning.audit import audit
from layerwise.tuning.calibration import calibrate_batchnorm
from layerwise.tuning.modes import pin_eval


class Net(nn.Module):
    """Batch-norms in a chain and in a branch, dropout between them."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.two = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=None))
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        return self.last(self.two(self.one(x)) + self.side(x))


NORMS = ("one.1", "two.1", "side.1", "last.2")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def data():
    return torch.randn(23, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 3 + 5


def closed_form(net, data):
    """Return mean and unbiased variance by norm: layer after layer, over the whole set at once."""
    net = copy.deepcopy(net).eval()
    found = {}
    for name in NORMS:
        norm = net.get_submodule(name)
        seen = []
        handle = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
        with torch.no_grad():
            net(data)
        handle.remove()
        dims = [dim for dim in range(seen[0].ndim) if dim != 1]
        norm.running_mean.copy_(seen[0].mean(dims))
        norm.running_var.copy_(seen[0].var(dims))
        found[name] = (norm.running_mean, norm.running_var)
    return found


def assert_equal_statistics(net, wanted, rtol=2e-5):
    for name, (mean, variance) in wanted.items():
        norm = net.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=rtol, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance, rtol=rtol, atol=1e-5)


def test_the_comparison_rejects_statistics_that_are_a_little_off(net, data):
    wanted = closed_form(net, data)
    calibrate_batchnorm(net, [data])
    net.two[1].running_var.mul_(1.001)
    with pytest.raises(AssertionError):
        assert_equal_statistics(net, wanted)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 22, 23])
def test_exact_equals_the_closed_form_for_every_batch_size_and_order(net, data, batch_size):
    wanted = closed_form(net, data)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(batch_size))
    done = calibrate_batchnorm(net, data[order].split(batch_size))
    assert_equal_statistics(net, wanted)
    assert done.norms == NORMS
    assert done.samples == 23
    assert done.passes == (1 if batch_size == 23 else 4)
    assert net.one[1].num_batches_tracked == -(-23 // batch_size)


def test_exact_on_deep_real_architecture_does_not_depend_on_batches():
    # ResNet-18 of torchvision, random weights: 20 batch-norms
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    one = torchvision.models.resnet18(num_classes=3)
    two = copy.deepcopy(one)
    data = torch.randn(12, 3, 32, 32) + 1
    calibrate_batchnorm(one, [data])
    calibrate_batchnorm(two, data.flip(0).split(5))
    for a, b in zip(find_norms(one), find_norms(two), strict=True):
        torch.testing.assert_close(a.module.running_mean, b.module.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.module.running_var, b.module.running_var, rtol=1e-4, atol=1e-5)


def test_one_pass_is_exact_in_the_first_layer_and_depends_on_batches_below(net, data):
    wanted = closed_form(net, data)
    done = calibrate_batchnorm(net, data.split(4), method="one_pass")
    assert done.passes == 1
    assert_equal_statistics(net, {name: wanted[name] for name in ("one.1", "side.1")})
    with pytest.raises(AssertionError):
        assert_equal_statistics(net, {"last.2": wanted["last.2"]})


def test_moving_is_torchs_own_average_with_the_given_momentum(net, data):
    reference = copy.deepcopy(net).eval()
    for norm in find_norms(reference):
        norm.module.train()
        norm.module.momentum = 0.3
    with torch.no_grad():
        for batch in data.split(5):
            reference(batch)
    done = calibrate_batchnorm(net, data.split(5), method="moving", momentum=0.3)
    assert done.norms == NORMS
    for name in NORMS:
        assert torch.equal(net.get_submodule(name).running_var, reference.get_submodule(name).running_var)
    assert net.side[1].momentum is None
    assert net.one[1].momentum == 0.1


@pytest.mark.parametrize("method", ["exact", "one_pass", "moving"])
def test_modes_pins_weights_and_random_state_are_as_before(net, data, method):
    net.two.eval()
    pin_eval(net.one.modules())
    loader = DataLoader(TensorDataset(data, torch.zeros(23)), 5, shuffle=True, generator=torch.Generator())
    modes = [module.training for module in net.modules()]
    weights = copy.deepcopy(dict(net.named_parameters()))
    states = [
        torch.get_rng_state(),
        loader.generator.get_state(),
        np.random.get_state()[1],
        random.getstate(),
    ]
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    calibrate_batchnorm(net, loader, method=method)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in net.named_parameters())
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], loader.generator.get_state())
    assert (states[2] == np.random.get_state()[1]).all()
    assert states[3] == random.getstate()
    assert [len(module._forward_pre_hooks) for module in net.modules()] == hooks
    net.train()
    assert not net.one[1].training


def test_a_shuffling_loader_and_random_transforms_give_the_same_samples_each_pass(net, data):
    # with `samples` below the size of the set, a second pass over other samples would mix two sets
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            return (self.tensors[0][index] * (1 + 0.1 * torch.rand(())) + random.random() + np.random.rand(),)

    noisy = Noisy(data)
    seen = []

    def forward(model, batch):
        seen.append(batch[0].clone())
        return model(batch[0])

    done = calibrate_batchnorm(net, DataLoader(noisy, 3, shuffle=True), samples=8, forward=forward)
    assert done.samples == 8
    assert [len(x) for x in seen] == [3] + [3, 3, 2] * 4
    passes = [torch.cat(seen[1 + 3 * k : 4 + 3 * k]) for k in range(4)]
    assert all(torch.equal(passes[0].float(), other.float()) for other in passes[1:])


def test_samples_takes_the_first_ones_only(net, data):
    wanted = closed_form(net, data[:6])
    calibrate_batchnorm(net, data.split(4), samples=6)
    assert_equal_statistics(net, wanted)


def test_only_the_named_norms_change(net, data):
    before = copy.deepcopy(net.side[1].running_mean)
    done = calibrate_batchnorm(net, data.split(6), names=["one.1"])
    assert done.norms == ("one.1",)
    assert done.shift["one.1"] > 0.5  # the data have mean 5, the fresh statistics 0
    assert torch.equal(before, net.side[1].running_mean)
    with pytest.raises(ModelError, match="no norm is named"):
        calibrate_batchnorm(net, data.split(6), names=[])


def test_instance_norm_with_running_statistics_averages_over_samples(data):
    net = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
    calibrate_batchnorm(net, data.split(5))
    torch.testing.assert_close(net[0].running_mean, data.mean((2, 3)).mean(0))
    torch.testing.assert_close(net[0].running_var, data.var((2, 3)).mean(0))


def test_a_norm_used_twice_is_measured_on_all_that_it_sees(data):
    shared = nn.BatchNorm2d(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = shared

        def forward(self, x):
            return self.norm(x) + self.norm(x[:, :, ::2] * 2).mean()

    calibrate_batchnorm(Twice(), data.split(5))
    both = torch.cat([data.transpose(0, 1).flatten(1), (data[:, :, ::2] * 2).transpose(0, 1).flatten(1)], 1)
    torch.testing.assert_close(shared.running_mean, both.mean(1))
    torch.testing.assert_close(shared.running_var, both.var(1))


def test_lazy_norms_are_calibrated_when_they_get_their_shape(data):
    net = nn.Sequential(nn.LazyBatchNorm2d())
    assert calibrate_batchnorm(net, data.split(5)).norms == ("0",)
    torch.testing.assert_close(net[0].running_mean, data.mean((0, 2, 3)))


def test_a_norm_that_does_not_run_is_skipped_and_says_so(net, data):
    net.unused = nn.BatchNorm2d(4)
    assert calibrate_batchnorm(net, data.split(6)).skipped == ("unused",)


def test_a_compiled_model_is_measured_all_the_same(net, data):
    wanted = closed_form(net, data)
    compiled = torch.compile(net, backend="eager")
    compiled.eval()(data)
    calibrate_batchnorm(compiled, data.split(6))
    assert_equal_statistics(net, wanted)
    net.compile(backend="eager")
    net(data)
    calibrate_batchnorm(net, data.split(6))
    assert_equal_statistics(net, wanted)


def test_mappings_and_tuples_are_fed_without_their_labels():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, pixel_values, mask=None):
            return self.norm(pixel_values * (1 if mask is None else mask))

    x = torch.randn(6, 2)
    results = []
    for batch in (
        x,
        (x, torch.zeros(6)),
        {"pixel_values": x, "labels": torch.zeros(6), "index": torch.zeros(6)},
        ({"pixel_values": x}, torch.zeros(6)),
        ((x, torch.ones(6, 1)), torch.zeros(6)),
    ):
        net = Net()
        calibrate_batchnorm(net, [batch])
        results.append(net.norm.running_mean)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("method", ["exact", "one_pass", "moving"])
def test_old_statistics_come_back_when_the_data_fail_half_way(net, data, method):
    before = copy.deepcopy(net.state_dict())
    batches = [data[:4], data[4:8], data[8:, :1]]
    with pytest.raises(DataError):
        calibrate_batchnorm(net, batches, method=method)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.one[3].training


def test_two_processes_agree_on_the_statistics_of_all_data(net, data, tmp_path):
    wanted = closed_form(net, data)
    torch.save((net, data), tmp_path / "case.pt")
    ended = [process.finish() for process in [Forked(_calibrate_share, rank, tmp_path) for rank in (0, 1)]]
    assert [done.returncode for done in ended] == [0, 0], ended
    for rank in (0, 1):
        net.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert_equal_statistics(net, wanted)


def _calibrate_share(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2
    )
    net, data = torch.load(f"{folder}/case.pt", weights_only=False)
    share = data[:9] if rank == "0" else data[9:]
    done = calibrate_batchnorm(net, share.split(4))
    assert done.samples == 23
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        ([], {}, DataError, "no batch"),
        (iter([]), {}, DataError, "once"),
        (
            torch.randn(8, 2, 6, 6),
            {},
            DataError,
            r"a Tensor of shape \(8, 2, 6, 6\).*\[tensor\] for one batch",
        ),
        (
            {"x": torch.randn(8, 2, 6, 6)},
            {},
            DataError,
            "loader is a dict; expected an iterable of batches.*DataLoader",
        ),
        (TensorDataset(torch.randn(8, 2, 6, 6)), {}, DataError, "a TensorDataset; expected .*DataLoader"),
        (None, {}, DataError, "loader is a NoneType; expected"),
        ([torch.randn(1, 2, 3, 3)], {"names": ["last.2"]}, DataError, "one value|1 value"),
        ([torch.randn(4, 2, 6, 6)], {"names": ["one.2"]}, ModelError, "Did you mean"),
        ([torch.randn(4, 2, 6, 6)], {"names": "last.2"}, ModelError, r"a str; expected .*names=\['last.2'\]"),
        ([torch.randn(4, 2, 6, 6)], {"samples": 0}, ValueError, "at least 1"),
        ([torch.randn(4, 2, 6, 6)], {"method": "exakt"}, ValueError, "Did you mean 'exact'"),
        ([torch.randn(4, 2, 6, 6)], {"method": "moving", "momentum": 0}, ValueError, "momentum"),
    ],
)
def test_wrong_calls_say_what_to_do(net, loader, options, error, message):
    with pytest.raises(error, match=message):
        calibrate_batchnorm(net, loader, **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (1, r"a batch is an int \(1\), and no batch size"),
        (["a", "b"], r"a batch is a list \(\['a', 'b'\]\), and no batch size.*tokenizer"),
        (None, "a batch is a NoneType"),
        ((), r"a batch is a tuple \(\(\)\)"),
        (torch.tensor(1.0), r"a batch is a Tensor \(tensor\(1\.\)\)"),
        ({"x": "text"}, "a batch is a dict"),
        (torch.randn(2, 6, 6), r"fails on a batch of \(2, 6, 6\) float32: .*samples first, then channels"),
        (torch.randn(4, 6, 6, 2), r"fails on a batch of \(4, 6, 6, 2\) float32: .*forward="),
        ({"y": torch.randn(4, 2, 6, 6)}, r"fails on a batch of \(4, 2, 6, 6\) float32: TypeError"),
    ],
)
def test_batches_of_another_form_are_named(net, batch, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError, match=message):
        calibrate_batchnorm(net, [batch])
    with pytest.raises(DataError, match=message):
        audit(net, loader=[batch])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_running_out_of_memory_stays_what_it_is(net, data):
    """Who tries smaller batches looks for it."""

    def forward(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        calibrate_batchnorm(net, [data], forward=forward)


def test_a_model_without_running_statistics_is_refused():
    with pytest.raises(ModelError, match="nothing to calibrate"):
        calibrate_batchnorm(nn.LayerNorm(3), [torch.randn(4, 3)])


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.parametrize("method", ["exact", "one_pass", "moving"])
def test_scripted_norms_are_refused_unless_others_are_named(method):
    # Nothing can look into them; it was an error of torch's own.
    net = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))))
    data = [torch.randn(6, 3)]
    with pytest.raises(
        ModelError, match=r"1\.0 of this Sequential is compiled by torch.jit.* script it after"
    ):
        calibrate_batchnorm(net, data, method=method)
    assert calibrate_batchnorm(net, data, method=method, names=["0"]).norms == ("0",)


def test_norms_that_track_no_mean_are_refused_when_there_are_no_others():
    # EvoNorm tracks a variance alone; beside a batch-norm it is skipped.
    layers = pytest.importorskip("timm").layers
    net = nn.Sequential(layers.EvoNorm2dB0(3), nn.Conv2d(3, 2, 1))
    data = [torch.randn(4, 3, 5, 5)]
    with pytest.raises(ModelError, match="0 of this Sequential track something else than a mean"):
        calibrate_batchnorm(net, data)
    net.append(nn.BatchNorm2d(2))
    assert calibrate_batchnorm(net, data).skipped == ("0",)


def test_data_with_nan_change_nothing() -> None:
    """One missing value would make every later output NaN."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    data = torch.tensor([[1.0, 0.0], [2.0, float("nan")]])
    with pytest.raises(DataError, match="not finite"):
        calibrate_batchnorm(model, [data])
    assert torch.equal(model[0].running_mean, torch.zeros(2))


def test_a_norm_that_does_not_run_is_skipped_in_one_pass_too(net, data):
    net.unused = nn.BatchNorm2d(4)
    assert calibrate_batchnorm(net, data.split(6), method="one_pass").skipped == ("unused",)
    assert torch.equal(net.unused.running_mean, torch.zeros(4))


@pytest.mark.parametrize("method", ["exact", "one_pass"])
def test_a_batch_without_samples_does_not_count(net, data, method):
    # Its mean would be 0 / 0.
    wanted = copy.deepcopy(net)
    calibrate_batchnorm(wanted, data.split(6), method=method)
    calibrate_batchnorm(net, [*data.split(6), data[:0]], method=method)
    norms = [(name, m) for name, m in wanted.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert_equal_statistics(net, {name: (m.running_mean, m.running_var) for name, m in norms})


def test_a_lazy_norm_that_fails_half_way_starts_from_the_beginning():
    # It got its shape in the failed pass; there are no old statistics to put back.
    net = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(DataError, match="not finite"):
        calibrate_batchnorm(net, [torch.tensor([[1.0, 2.0], [math.nan, 3.0]])])
    assert torch.equal(net[0].running_mean, torch.zeros(2))
    assert torch.equal(net[0].running_var, torch.ones(2))


def test_no_name_at_all_is_refused(net, data):
    with pytest.raises(ModelError, match="leave `names` out for all"):
        calibrate_batchnorm(net, [data], names=[])
