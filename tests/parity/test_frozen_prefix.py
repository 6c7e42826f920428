"""A frozen part computes the same in train mode as in eval mode, bit for bit, on other people's networks."""

import re

import pytest
import torch
from torch import nn

import layerwise
from layerwise.layers.norms import find_norms

SIZES = {"inception_v3": 96, "maxvit_t": 224}
FAMILIES = re.compile(
    "densenet|efficientnet|googlenet|inception|maxvit|mnasnet|mobilenet|regnet|resnet|resnext|shufflenet|vgg.*_bn|wide"
)
TOO_LARGE = {"regnet_y_128gf"}  # 2.6 GB of weights

torchvision = pytest.importorskip("torchvision")
TORCHVISION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if FAMILIES.match(name) and name not in TOO_LARGE
]
TIMM = [
    "tf_efficientnet_lite0", "mobilenetv3_small_100", "repvgg_a0", "regnety_002", "resnet26d", "dla34",
    "ese_vovnet19b_dw", "hardcorenas_a", "mixnet_s", "lcnet_050", "levit_128s", "mobileone_s0",
    "ghostnet_050", "efficientvit_b0", "fastvit_t8", "selecsls42b", "densenet121", "resnest14d",
    "skresnet18", "hrnet_w18_small",
]  # fmt: skip
FEW_TORCHVISION = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
FEW_TIMM = ["tf_efficientnet_lite0", "levit_128s", "mobileone_s0"]


def check(model: nn.Module, size: int) -> None:
    """Freeze all but the head, in train mode: what the head receives must be what eval mode gives it."""
    assert any(norm.kind == "running" for norm in find_norms(model))
    with torch.no_grad():  # statistics that no batch has by chance
        for norm in find_norms(model):
            if norm.kind == "running":
                norm.module.running_mean.normal_(0, 0.1)
                norm.module.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, size, size)
    seen = []
    layers = layerwise.layer_map(model, x, granularity="stages")
    head = model.get_submodule(layers.head.modules[0])  # the first module of the head's group that runs
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))

    def what_the_head_sees(mode):
        seen.clear()
        with torch.no_grad():
            model.train(mode)(x)
        return seen[-1]

    drifting = [what_the_head_sees(True), what_the_head_sees(False)]
    assert not torch.equal(*drifting)  # left alone, the two differ

    plan = layerwise.linear_probe(layers, epochs=1)
    tuner = layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
    with layerwise.watch(model) as watched:
        frozen = [what_the_head_sees(True), what_the_head_sees(False)]
    assert torch.equal(*frozen)
    watched.report.raise_if_frozen_moved()
    # a head may have a batch-norm of its own, which learns
    assert all(name.startswith(layers.head.modules) for name in watched.report.buffers_moved)
    found = layerwise.audit(model, tuner.optimizer, layers=layers)
    assert found.errors == ()


@pytest.mark.parametrize("name", FEW_TORCHVISION)
def test_torchvision(name):
    _torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TORCHVISION if name not in FEW_TORCHVISION])
def test_torchvision_all(name):
    _torchvision(name)


def _torchvision(name):
    torch.manual_seed(0)
    extra = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=3, **extra)
    check(model, SIZES.get(name, 64))


@pytest.mark.parametrize("name", FEW_TIMM)
def test_timm(name):
    _timm(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TIMM if name not in FEW_TIMM])
def test_timm_all(name):
    _timm(name)


def _timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    size = model.default_cfg["input_size"][-1] if name.startswith("levit") else 64
    check(model, size)
