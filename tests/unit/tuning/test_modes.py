"""Pinned eval mode: it must hold against everybody, and come off without a trace."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from layerwise.errors import LayerwiseWarning
from layerwise.tuning.modes import asked_modes, held_modes, note_modes, pin_eval, pinned, unpin


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    pin_eval(net.body.modules())
    return net


def body_is_still(net):
    """Return whether nothing in the body listens to train(), its statistics included."""
    before = copy.deepcopy(dict(net.body.named_buffers()))
    net.train()
    x = torch.randn(8, 3)
    first, second = net.body(x), net.body(x)
    same = all(torch.equal(before[name], value) for name, value in net.body.named_buffers())
    return same and torch.equal(first, second) and not any(m.training for m in net.body.modules())


def test_the_check_itself_rejects_an_unpinned_body():
    assert not body_is_still(Net())


def test_holds_against_train_from_every_side(net):
    net.train()
    net.body.train()
    net.body[1].train(True)
    net.apply(lambda module: module.train())
    assert body_is_still(net)
    assert net.training
    assert net.fc.training


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: _through_torch_save(net),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_pinned_themselves_and_independent(net, clone):
    twin = clone(net)
    assert body_is_still(twin)
    unpin(twin.modules())  # freeing the copy must not free the original, nor the other way round
    assert not body_is_still(twin)
    assert body_is_still(net)


def _through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_shallow_copy_does_not_count_as_pinned(net):
    assert not pinned(copy.copy(net.body[1]))
    assert pinned(net.body[1])


def test_state_dict_keys_classes_and_module_tree_are_unchanged(net):
    plain = Net()
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [(n, type(m)) for n, m in net.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    net.load_state_dict(plain.state_dict())
    assert body_is_still(net)


@pytest.mark.parametrize("clone", [lambda net: net, copy.deepcopy], ids=["itself", "deepcopy"])
def test_update_bn_measures_the_free_norms_and_keeps_the_held_ones(net, clone):
    # it resets all batch-norms first, and a held one is not measured in train mode afterwards
    net.fc = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    net.body[1].running_mean.fill_(2.0)
    twin = clone(net)
    update_bn([torch.randn(8, 3)], twin)
    assert torch.equal(twin.body[1].running_mean, torch.full((4,), 2.0))
    assert not torch.equal(twin.fc[0].running_mean, torch.zeros(4))
    unpin(twin.modules())
    update_bn([torch.randn(8, 3)], twin)
    assert not torch.equal(twin.body[1].running_mean, torch.full((4,), 2.0))


def test_a_held_norm_that_gets_its_shape_gets_statistics():
    # a lazy norm makes them in reset_running_stats, whatever holds it
    norm = nn.LazyBatchNorm1d()
    pin_eval([norm])
    norm(torch.randn(4, 3))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    norm.running_mean.fill_(2.0)
    norm.reset_running_stats()
    assert torch.equal(norm.running_mean, torch.full((3,), 2.0))


def test_somebody_elses_instance_reset_stays():
    norm = nn.BatchNorm1d(3)
    calls = []
    norm.reset_running_stats = lambda: calls.append(1)
    pin_eval([norm])
    unpin([norm])
    norm.reset_running_stats()
    assert calls == [1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_holds_under_compile(net, backend):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    compiled.train()
    before = net.body[1].running_mean.clone()
    x = torch.randn(8, 3)
    out = compiled(x)
    out.sum().backward()
    assert torch.allclose(out, net.fc(net.body.eval()(x)), atol=1e-6)
    assert torch.equal(before, net.body[1].running_mean)
    unpin(net.body.modules())  # compiled code must notice that the body wakes up
    compiled.train()
    compiled(x)
    assert not torch.equal(before, net.body[1].running_mean)


def test_holds_under_ddp_on_one_process(net, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped.train()
        before = net.body[1].running_mean.clone()
        wrapped(torch.randn(8, 3)).sum().backward()
        assert torch.equal(before, net.body[1].running_mean)
        assert body_is_still(wrapped.module)
    finally:
        torch.distributed.destroy_process_group()


def test_holds_under_autocast_and_checkpointing(net):
    net.train()
    before = net.body[1].running_mean.clone()
    x = torch.randn(8, 3, requires_grad=True)
    for reentrant in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net.fc(checkpoint(net.body, x, use_reentrant=reentrant)).sum().backward()
    assert torch.equal(before, net.body[1].running_mean)


def test_holds_when_a_forward_pass_raises(net):
    net.train()
    with pytest.raises(RuntimeError):
        net(torch.randn(8, 5))
    assert body_is_still(net)


def test_unpin_gives_the_mode_that_was_asked_for_meanwhile():
    net = Net().eval()
    pin_eval(net.body.modules())
    unpin(net.body.modules())
    assert not net.body[2].training  # nobody asked for train mode
    pin_eval(net.body.modules())
    net.train()
    assert unpin(net.body.modules()) == tuple(net.body.modules())
    assert all(module.training for module in net.modules())
    assert "train" not in net.body[1].__dict__
    assert not body_is_still(net)


def test_what_a_pin_was_asked_for_is_told_and_noted():
    # eval() and modes that are put back by assignment: the pin has heard of the first half, and is told
    layer = nn.Sequential(nn.Dropout(), nn.Dropout())
    pin_eval([layer[0]])
    asked = asked_modes(layer)
    assert asked == {layer: True, layer[0]: True, layer[1]: True}
    layer.eval()
    layer.training = layer[1].training = True
    assert asked_modes(layer)[layer[0]] is False
    note_modes(asked)
    assert not layer[0].training
    unpin([layer[0]])
    assert layer[0].training


def test_pinning_twice_and_unpinning_what_is_free_do_nothing(net):
    assert pin_eval(net.body.modules()) == ()
    assert unpin(net.fc.modules()) == ()
    assert pinned(net.body)


def test_an_unpinned_child_of_a_pinned_module_follows():
    net = Net()
    pin_eval([net.body])
    net.eval()
    net.train()
    assert not net.body.training
    assert net.body[1].training


class Fused(nn.Module):
    """Has work to do when the mode changes, as merged LoRA weights or re-parametrised blocks do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout()
        self.fused = False

    def train(self, mode=True):
        super().train(mode)
        self.fused = not mode
        return self


def test_a_class_with_its_own_train_is_told_once_and_works_again_afterwards():
    net = Fused()
    pin_eval([net])
    assert net.fused
    assert net.inner.training  # only the listed module is pinned
    net.train()
    assert net.fused
    unpin([net])
    assert not net.fused
    net.eval()
    assert net.fused
    net.train()
    assert not net.fused


def test_an_override_above_does_not_disturb_what_pinned_children_were_asked(net):
    outer = Fused()
    outer.body = net.body
    outer.train()
    pin_eval([outer])  # calls its train(False), which reaches the body
    unpin(net.body.modules())
    assert net.body[1].training


def test_somebody_elses_instance_train_comes_back():
    layer = nn.Dropout()
    calls = []
    layer.train = lambda mode=True: calls.append(mode)
    pin_eval([layer])
    layer.train()
    assert calls == [False]
    unpin([layer])
    layer.train()
    assert calls == [False, True, True]


def test_a_wrong_mode_is_refused_like_in_torch(net):
    with pytest.raises(ValueError, match="bool"):
        net.body.train("yes")


def test_recurrent_layers_without_dropout_are_passed_over():
    assert pin_eval([nn.LSTM(2, 2)]) == ()
    assert len(pin_eval([nn.LSTM(2, 2, num_layers=2, dropout=0.1)])) == 1


def test_torchscript_is_held_with_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated in new versions of torch
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.warns(LayerwiseWarning, match="3 TorchScript modules .* forgets it"):
        pin_eval(scripted.modules())
    scripted.train()
    norm = dict(scripted.named_modules())["1"]
    before = norm.running_mean.clone()
    scripted(torch.randn(8, 3))
    assert torch.equal(before, norm.running_mean)


def test_held_modes_restores_after_an_exception():
    net = Net()
    net.body[2].eval()
    modes = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError), held_modes(net):
        net.eval()(torch.randn(8, 5))
    assert [module.training for module in net.modules()] == modes
