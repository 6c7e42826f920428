"""The cache is exact on other people's networks, or says why it is off; a sample of benchmarks/cuts.py."""

from __future__ import annotations

import logging
import warnings

import pytest
from benchmarks import cuts
from benchmarks.transformers_models import SMALL

NAMES = {small.name: small for small in SMALL}
TRANSFORMERS = [
    "BertForSequenceClassification", "AlbertForSequenceClassification", "DebertaV2ForSequenceClassification",
    "GPT2ForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration",
    "BartForSequenceClassification", "ViTForImageClassification", "SwinForImageClassification",
    "ConvNextForImageClassification", "CLIPModel", "MambaForCausalLM", "DetrForObjectDetection",
]  # fmt: skip
TIMM = ["resnet18", "test_vit", "levit_128s", "tf_efficientnet_lite0", "test_convnext"]
TORCHVISION = ["squeezenet1_1", "shufflenet_v2_x0_5"]


def check(name, model, samples, frac) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, deprecated names: their own business
        logging.disable(logging.WARNING)
        try:
            found = cuts.examine(name, model, samples, frac)
        finally:
            logging.disable(logging.NOTSET)
    assert found.state == "exact", found.why
    assert found.skipped > 0


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name) -> None:
    small = NAMES[name]
    check(name, small.build(), cuts.text_samples(small), 0.6)


@pytest.mark.parametrize("frac", cuts.FRACTIONS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, frac) -> None:
    model, _ = cuts.timm_model(name)
    size = 224 if name == "levit_128s" else 160 if name.startswith("test") else 64
    check(name, model, cuts.images(size), frac)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name) -> None:
    model, _ = cuts.torchvision_model(name)
    check(name, model, cuts.images(96), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("frac", cuts.FRACTIONS)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_all_transformers(name, frac) -> None:
    # none is silently wrong; what is refused has a reason
    small = NAMES[name]
    found = cuts.examine(name, small.build(), cuts.text_samples(small), frac)
    assert found.state in ("exact", "refused")
    assert found.why
