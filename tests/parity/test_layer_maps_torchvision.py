"""Layer maps against torchvision, whose classifiers are registered in the order in which they run."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision")

import torch
from benchmarks import oracles
from torchvision import models

from layerwise import layer_map

SAMPLE = [
    "alexnet",
    "convnext_tiny",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mobilenet_v2",
    "resnet50",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_16",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_map_agrees_with_torchvision(name: str) -> None:
    # complete, in order of registration, and the last linear layer is the head
    verdict = oracles.judge_torchvision(name)
    assert not verdict.error
    assert verdict.complete
    assert verdict.discordant == 0, verdict.worst
    assert verdict.head


@pytest.mark.parametrize(
    "name", ["deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "r3d_18"]
)
def test_segmentation_detection_and_video(name: str) -> None:
    # models of other tasks are mapped whole
    verdict = oracles.judge_torchvision(name)
    assert not verdict.error
    assert verdict.complete
    assert verdict.layers is not None
    assert len(verdict.layers) > 5


def test_resnet50_by_stages() -> None:
    # the six groups that everybody means, with the published number of operations
    with torch.device("meta"):
        model = models.resnet50()
    layers = layer_map(model, granularity="stages")
    assert layers.names == ("conv1", "layer1", "layer2", "layer3", "layer4", "fc")
    assert layers["stem"].modules == ("conv1", "bn1", "relu", "maxpool")
    flops = sum(group.flops or 0 for group in layers)
    assert flops == pytest.approx(2 * 4.089e9, rel=0.001)  # torchvision's own figure: 4.09 GMAC


@pytest.mark.parametrize(
    ("name", "gigaflops"), [("vit_b_16", 17.56), ("efficientnet_b0", 0.386), ("swin_t", 4.491)]
)
def test_flops_near_torchvision_s(name: str, gigaflops: float) -> None:
    # torchvision publishes multiply-adds (and for ViT and Swin leaves some of the attention out)
    with torch.device("meta"):
        model = models.get_model(name)
    published = models.get_model_weights(name).DEFAULT.meta["_ops"]
    assert published == pytest.approx(gigaflops, rel=0.01)
    flops = sum(group.flops or 0 for group in layer_map(model))
    assert flops == pytest.approx(2e9 * published, rel=0.04)


@pytest.mark.slow
def test_all_models() -> None:
    # everything that torchvision has is mapped; all its classifiers in order and with their head
    verdicts = [oracles.judge_torchvision(name) for name in oracles.torchvision_names()]
    assert [v.name for v in verdicts if v.error or not v.complete] == []
    assert [v.name for v in verdicts if v.discordant or v.head is False] == []
