"""Normalisation: every kind is found, and each policy moves what it says and nothing else."""

import copy
import dataclasses
import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from helpers import map_by_children
from layerwise.errors import LayerwiseWarning, ModelError, PlanError
from layerwise.layers.mapping import layer_map
from layerwise.layers.norms import find_norms
from layerwise.plans.settings import Norms
from layerwise.tuning.modes import pin_eval, pinned
from layerwise.tuning.norm_layers import frozen_norms, small_batch_warning
from layerwise.tuning.norms import apply_norms, freeze_batchnorm, release_norms, training_mode


class OwnRMSNorm(nn.Module):
    """As in the modelling files of transformers: no base class, an epsilon of its own name."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Frozen(nn.Module):
    """The statistics are constants, as in torchvision's and DETR's frozen batch-norm."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(4))


class Scale(nn.Module):
    """One gain per channel, but no epsilon: LayerScale is not a norm."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.BatchNorm1d(4), "running"),
        (nn.BatchNorm2d(4, affine=False), "running"),
        (nn.BatchNorm3d(4, momentum=None), "running"),
        (nn.SyncBatchNorm(4), "running"),
        (nn.LazyBatchNorm2d(), "running"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "running"),
        (nn.BatchNorm2d(4, track_running_stats=False), "batch"),
        (nn.InstanceNorm2d(4, affine=True), "plain"),
        (nn.LayerNorm(4), "plain"),
        (nn.GroupNorm(2, 4), "plain"),
        (nn.RMSNorm(4), "plain"),
        (OwnRMSNorm(4), "plain"),
        (Frozen(), None),
        (Scale(), None),
        (nn.Linear(4, 4), None),
        (nn.PReLU(4), None),
        (nn.LazyLinear(4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_norms_are_known_by_their_build(module, kind):
    found = find_norms(nn.Sequential(module))
    assert [norm.kind for norm in found] == ([kind] if kind else [])


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_the_norms_of_a_scripted_part_are_found_and_held():
    # a body in TorchScript has no dictionaries of buffers, only something like them
    body = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(body, nn.Linear(4, 2))
    assert [(norm.name, norm.kind) for norm in find_norms(model)] == [("0.1", "running")]
    layers = layer_map(model, torch.zeros(2, 3))
    assert layers.norms == {"0.1.weight": "running", "0.1.bias": "running"}
    with pytest.warns(LayerwiseWarning, match="TorchScript"):
        record = apply_norms(model, layers, [layers.names[0]], Norms())
    assert record.fixed == ("0.1",)


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [
        ("resnet18", "running", 20),
        ("tf_efficientnet_lite0", "running", 49),  # BatchNormAct2d
        ("vit_tiny_patch16_224", "plain", 25),
        ("convnext_atto", "plain", 12),
    ],
)
def test_timms_norms_are_found(name, kind, least):
    timm = pytest.importorskip("timm")
    kinds = [norm.kind for norm in find_norms(timm.create_model(name))]
    assert kinds.count(kind) >= least
    assert set(kinds) == {kind}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_norms_of_transformers_own_classes_are_found():
    # Llama, T5 and Gemma define an RMSNorm each; a model has two a layer and one at the end
    transformers = pytest.importorskip("transformers")
    tiny = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaModel(transformers.LlamaConfig(**tiny, intermediate_size=8))
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    )
    for model in (llama, t5):
        norms = find_norms(model)
        assert len(norms) == 5
        assert {norm.kind for norm in norms} == {"plain"}


# ------------------------------------------------------------------------------------------- the policies


class Net(nn.Module):
    """Four groups, a batch-norm in each of the first three, dropout in the first and in the head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.b = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.c = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))
        self.d = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def moved(net):
    """Train for one forward pass; return the norms whose statistics moved."""
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = copy.deepcopy({name: dict(m.named_buffers()) for name, m in norms.items()})
    net.train()(torch.randn(8, 3, 5, 5))
    changed = {
        name: {key for key, value in m.named_buffers() if not torch.equal(value, before[name][key])}
        for name, m in norms.items()
    }
    assert all(
        keys in (set(), {"running_mean", "running_var", "num_batches_tracked"}) for keys in changed.values()
    )
    return [name for name, keys in changed.items() if keys]


@pytest.mark.parametrize(
    ("norms", "statistics", "trainable", "frozen"),
    [
        (Norms(), ["c.1"], [], []),
        (Norms(tune=True), ["c.1"], ["b.2"], []),
        (Norms(policy="freeze"), [], [], []),
        (Norms(policy="freeze_until", until="b"), ["b.1", "c.1"], ["b.1"], []),
        (Norms(policy="freeze_until", until="head"), [], [], []),
        (Norms(policy="calibrate"), [], [], []),
        (Norms(policy="adapt"), ["a.1", "b.1", "c.1"], ["a.1", "b.1"], []),
        (Norms(policy="adapt", rate=0), ["a.1", "b.1", "c.1"], [], []),
    ],
    ids=lambda value: f"{value.policy}-{value.until}" if isinstance(value, Norms) else "",
)
def test_policies_with_the_first_two_groups_frozen(net, norms, statistics, trainable, frozen):
    record = apply_norms(net, map_by_children(net), {"a", "b"}, norms)
    assert moved(net) == statistics == list(record.adapting)
    assert record.trainable == tuple(f"{name}.{half}" for name in trainable for half in ("weight", "bias"))
    assert record.frozen == tuple(frozen)
    assert not net.a[2].training  # dropout of a frozen group is silent under every policy
    assert net.d[2].training
    assert set(record.adapting) | set(record.fixed) == {"a.1", "b.1", "c.1"}


@pytest.mark.parametrize(
    ("norms", "statistics", "frozen"),
    [
        (Norms(), ["a.1", "b.1", "c.1"], []),
        (Norms(policy="freeze"), [], ["a.1", "b.1"]),
        (Norms(policy="freeze_until", until="b"), ["b.1", "c.1"], ["a.1"]),
        (Norms(policy="calibrate"), [], []),
    ],
    ids=lambda value: value.policy if isinstance(value, Norms) else "",
)
def test_policies_with_everything_learning(net, norms, statistics, frozen):
    record = apply_norms(net, map_by_children(net), (), norms)
    assert moved(net) == statistics
    assert record.frozen == tuple(f"{name}.{half}" for name in frozen for half in ("weight", "bias"))
    assert record.trainable == ()
    assert net.a[2].training


def test_adapt_uses_its_momentum_and_gives_the_old_one_back(net):
    layers = map_by_children(net)
    apply_norms(net, layers, {"a"}, Norms(policy="adapt", momentum=0.5))
    assert [net.a[1].momentum, net.c[1].momentum] == [0.5, 0.5]
    twin = copy.deepcopy(net)
    apply_norms(net, layers, {"a"}, Norms(policy="adapt", momentum=0.25))
    assert net.a[1].momentum == 0.25
    for model in (net, twin):
        apply_norms(model, layers, {"a"}, Norms())
        assert [model.a[1].momentum, model.c[1].momentum] == [0.1, 0.1]


def test_phases_follow_one_another_and_release_leaves_no_trace(net):
    layers = map_by_children(net)
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    apply_norms(net, layers, {"a", "b", "c"}, Norms())
    assert moved(net) == []
    apply_norms(net, layers, {"a", "b"}, Norms())  # c joins in the middle of an epoch: nobody calls train()
    assert net.c[1].training
    assert moved(net) == ["c.1"]
    again = apply_norms(net, layers, {"a", "b"}, Norms())
    assert again == apply_norms(net, layers, {"a", "b"}, Norms())  # two equal calls are one
    release_norms(net)
    assert {name: dict(module.__dict__) for name, module in net.named_modules()} == before
    assert moved(net) == ["a.1", "b.1", "c.1"]


def test_frozen_dropout_holds_norms_only(net):
    apply_norms(net, map_by_children(net), {"a", "b"}, Norms(), frozen_dropout=True)
    assert moved(net) == ["c.1"]
    assert net.a[2].training


def test_a_container_of_frozen_groups_is_still_and_one_that_spans_is_not():
    net = Net()
    outer = nn.Sequential(nn.Sequential(net.a, net.b), net.c, net.d)
    inner = map_by_children(outer[0], root="0").groups
    layers = map_by_children(outer)
    layers = type(layers)(groups=(*inner, *layers.groups[1:]), granularity="blocks")
    apply_norms(outer, layers, {"0.0"}, Norms())
    assert outer.train()[0].training
    apply_norms(outer, layers, {"0.0", "0.1"}, Norms())
    assert not outer.train()[0].training


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("last", [1, 2])
def test_an_encoder_takes_padded_sequences_with_its_first_layers_frozen(last):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    layers = map_by_children(encoder.layers, root="layers")
    frozen = [f"layers.{number}" for number in range(last)]
    apply_norms(encoder, layers, frozen, Norms())
    encoder.requires_grad_(last < 2)
    for name in frozen:
        encoder.get_submodule(name).requires_grad_(False)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    encoder.train()
    encoder(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert not any(module.training for module in encoder.layers[0].children())
    assert pinned(encoder.layers[0]) == (last == 2)
    assert not encoder.eval().layers[0].training


def test_a_module_shared_with_a_learning_group_stays_awake():
    shared = nn.BatchNorm2d(4)
    net = Net()
    net.a[1] = net.b[1] = shared
    net.a[2] = net.c[1] = nn.Dropout(0.1)
    apply_norms(net, map_by_children(net), {"a"}, Norms())
    assert not pinned(shared)
    assert not pinned(net.a[2])
    apply_norms(net, map_by_children(net), {"a", "b"}, Norms())
    assert pinned(shared)
    assert not pinned(net.c[1])


def test_wrappers_are_looked_through(net):
    layers = map_by_children(net)
    apply_norms(torch.compile(net, backend="eager"), layers, {"a", "b"}, Norms())
    assert moved(net) == ["c.1"]


def test_batch_norm_without_running_statistics_is_reported_when_frozen(net):
    net.a[1] = nn.BatchNorm2d(4, track_running_stats=False)
    assert apply_norms(net, map_by_children(net), {"a"}, Norms()).batch_only == ("a.1",)
    assert apply_norms(net, map_by_children(net), {"b"}, Norms()).batch_only == ()


@pytest.mark.parametrize(
    ("norms", "frozen", "error"),
    [
        (Norms(policy="freeze_until", until="z"), (), "group 'z' is not"),
        (Norms(), ("e",), "group 'e' is not"),
    ],
)
def test_unknown_groups_are_refused_and_nothing_changes(net, norms, frozen, error):
    layers = map_by_children(net)
    apply_norms(net, layers, {"a"}, Norms())
    with pytest.raises(PlanError, match=error):
        apply_norms(net, layers, frozen, norms)
    assert pinned(net.a)


def test_a_map_of_another_model_is_refused(net):
    with pytest.raises(ModelError, match="does not have"):
        apply_norms(nn.Sequential(nn.Linear(2, 2)), map_by_children(net), (), Norms())


# --------------------------------------------------------------------------- helpers for other people's loops


def test_freeze_batchnorm_holds_everything_and_undo_takes_it_back(net):
    net.b[1].weight.requires_grad_(False)
    change = freeze_batchnorm(net)
    assert change.names == ("a.1", "b.1", "c.1")
    assert moved(net) == []
    assert net.a[2].training  # norms only
    assert [p.requires_grad for p in (net.a[1].weight, net.a[1].bias, net.a[0].weight)] == [
        False,
        False,
        True,
    ]
    change.undo()
    assert moved(net) == ["a.1", "b.1", "c.1"]
    assert net.a[1].weight.requires_grad
    assert not net.b[1].weight.requires_grad  # was frozen before


def test_freeze_batchnorm_can_leave_the_affine_parameters(net):
    freeze_batchnorm(net.a, affine=False)
    assert net.a[1].weight.requires_grad
    assert moved(net) == ["b.1", "c.1"]


def test_freeze_batchnorm_of_a_model_without_norms_returns_an_empty_record():
    change = freeze_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert (change.names, change.modules, change.parameters) == ((), (), ())


def test_lazy_norms_stay_frozen_when_they_materialise():
    net = nn.Sequential(nn.LazyBatchNorm2d())
    freeze_batchnorm(net)
    net.train()
    x = torch.randn(8, 3, 2, 2) * 5
    assert torch.allclose(net(x), x, atol=1e-3)
    assert type(net[0]) is nn.BatchNorm2d
    assert not net[0].weight.requires_grad
    assert torch.equal(net[0].running_mean, torch.zeros(3))


def test_norms_with_running_statistics_of_other_kinds_hold(net):
    instance = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
    x = torch.randn(4, 3, 5, 5)
    drifting = copy.deepcopy(instance).train()
    drifting(x)
    assert not torch.equal(drifting[0].running_mean, instance[0].running_mean)
    freeze_batchnorm(instance)
    instance.train()(x)
    assert torch.equal(instance[0].running_mean, torch.zeros(3))


def test_training_mode_trains_all_but_frozen_norms_and_restores(net):
    net.eval()
    net.d.train()
    for parameter in net.b.parameters():
        parameter.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    with training_mode(net):
        net.train()
        assert [net.a[1].training, net.b[1].training, net.c[1].training] == [True, False, True]
        assert net.a[2].training
    assert [module.training for module in net.modules()] == modes
    with pytest.raises(RuntimeError), training_mode(net):
        net(torch.zeros(1))
    assert [module.training for module in net.modules()] == modes
    assert not any(pinned(module) for module in net.modules())


@pytest.mark.parametrize(
    ("conv", "head", "frozen"), [(False, True, True), (True, True, False), (False, False, True)]
)
def test_affine_free_norms_go_with_the_parameters_around_them(conv, head, frozen):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    net[0].requires_grad_(conv)
    net[2].requires_grad_(head)
    assert [norm.name for norm in frozen_norms(net)] == (["1"] if frozen else [])


def test_small_batches_draw_a_warning_that_names_layers_and_a_policy(net):
    message = small_batch_warning(net, 4)
    assert "3 batch-norm layers train on batches of 4 (a.1, b.1, c.1)" in message
    assert "'freeze'" in message
    assert small_batch_warning(net, 9) is None
    pin_eval(net.a.modules())
    assert "2 batch-norm layers" in small_batch_warning(net, 8)
    freeze_batchnorm(net)
    assert small_batch_warning(net, 1) is None


def test_a_map_with_a_module_that_is_gone_is_refused(net):
    # Of a model of the same parameters whose pooling stands elsewhere.
    layers = map_by_children(net)
    net.d = nn.Sequential(OrderedDict([("pool", net.d[0]), ("flat", net.d[1]), ("3", net.d[3])]))
    head = dataclasses.replace(layers.groups[-1], modules=("d.0", "d.3"))
    stale = dataclasses.replace(layers, groups=(*layers.groups[:-1], head))
    with pytest.raises(ModelError, match=r"names a module 'd.0', which this Net does not have. Make the map"):
        apply_norms(net, stale, (), Norms())


def test_the_record_of_a_policy_is_plain_data(net):
    record = apply_norms(net, map_by_children(net), {"a"}, Norms())
    told = json.loads(json.dumps(record.to_dict()))
    assert (told["policy"], told["adapting"]) == ("follow", ["b.1", "c.1"])


def test_a_norm_without_anything_around_it_is_not_meant_frozen():
    # No parameter says so.
    assert frozen_norms(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.ReLU())) == ()
