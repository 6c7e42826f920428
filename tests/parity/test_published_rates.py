"""Rates of timm, BEiT, ELECTRA and fastai, for the same grouping."""

from __future__ import annotations

import math

import pytest

from helpers import named_map
from layerwise.layers.mapping import layer_map
from layerwise.plans.rates import decayed
from layerwise.plans.schedules import factor
from layerwise.plans.strategies import discriminative
from layerwise.plans.unfreezing import fine_tune


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("alpha", [0.65, 0.9])
def test_timms_layer_decay_scales_for_timms_grouping(name: str, alpha: float) -> None:
    """param_groups_layer_decay gives each of its layers the scale alpha ** (L - l)."""
    timm = pytest.importorskip("timm")
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, pretrained=False)
    groups = param_groups_layer_decay(model, layer_decay=alpha)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layer_of = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    count = max(layer_of.values()) + 1
    ours = list(decayed([str(layer) for layer in range(count)], alpha).values())
    assert len({round(value, 12) for value in scale.values()}) == count > 5
    for parameter, tensor in model.named_parameters():
        assert scale[id(tensor)] == pytest.approx(ours[layer_of[parameter]], rel=1e-12)


def test_timms_scales_on_our_own_map_of_a_vit() -> None:
    """Our blocks of a ViT are timm's layers, the final norm with the last block included."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    layers = layer_map(model, granularity="blocks")
    plan = discriminative(layers, decay=0.75)
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, tensor in model.named_parameters():
        assert plan.phases[0].rate(layers.group_of(name)) == pytest.approx(scale[id(tensor)]), name


def test_beits_published_scales() -> None:
    """BEiT's LayerDecayValueAssigner: decay ** (13 - i) for embeddings 0, blocks 1..12, norm and head 13."""
    layers = named_map("patch_embed", *(f"blocks.{i}" for i in range(12)), "head", granularity="blocks")
    plan = discriminative(layers, decay=0.65)
    published = [0.65 ** (12 + 1 - i) for i in range(12 + 2)]
    assert [plan.phases[0].rate(name) for name in layers.names] == pytest.approx(published)


def test_electras_published_rates() -> None:
    """ELECTRA leaves an empty step below its head: lr * decay ** (14 - depth), layers 1..12, head 14.

    Ours are one step higher in the body (issues 51 and 64 of google-research/electra call theirs a mistake);
    told as base rate and head multiplier they are the same table.
    """
    layers = named_map("embeddings", *(f"layer.{i}" for i in range(12)), "classifier", granularity="blocks")
    lr, decay = 1e-4, 0.8
    published = {"embeddings": lr * decay**14, "classifier": lr}
    published |= {f"layer.{i}": lr * decay ** (14 - (i + 1)) for i in range(12)}
    own = discriminative(layers, decay=decay).phases[0]
    for name in layers.names[:-1]:
        assert lr * own.rate(name) * decay == pytest.approx(published[name])
    same = discriminative(layers, decay=decay, rates={"classifier": 1 / decay}).phases[0]
    assert {name: lr * decay * same.rate(name) for name in layers.names} == pytest.approx(published)


@pytest.mark.filterwarnings("ignore")  # of the imports of fastai and of what it imports
def test_fastais_one_cycle_and_spread() -> None:
    """The rates of fine_tune are those that fastai's own schedule objects give."""
    pytest.importorskip("fastai")
    from fastai.callback.schedule import combined_cos
    from fastai.optimizer import even_mults

    layers = named_map("stem", "layer1", "head")
    frozen, tuned = fine_tune(layers, epochs=4).phases
    lr, steps = 2e-3, 100
    theirs = combined_cos(0.99, lr / 25, lr, lr / 1e5)
    assert [lr * factor(frozen.schedule, t, steps) for t in range(steps)] == pytest.approx(
        [float(theirs(t / steps)) for t in range(steps)], rel=1e-4
    )
    half = lr / 2
    spread = list(even_mults(half / 100, half, 3))
    assert [lr * tuned.rate(name) for name in layers.names] == pytest.approx(spread)
    for name, top in zip(layers.names, spread):
        theirs = combined_cos(0.3, top / 5, top, half / 1e5)
        ours = [lr * tuned.rate(name) * factor(tuned.schedule, t, steps) for t in range(steps)]
        assert ours == pytest.approx([float(theirs(t / steps)) for t in range(steps)], abs=half * 1e-4)


def test_ulmfits_division_is_a_decay() -> None:
    """eta_(l-1) = eta_l / 2.6."""
    rates = list(decayed(["a", "b", "c"], 1 / 2.6).values())
    assert [rates[1] / rates[0], rates[2] / rates[1]] == pytest.approx([2.6, 2.6])
    assert math.isclose(rates[-1], 1.0)
