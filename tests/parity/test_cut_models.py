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


def examined(part: str, name: str, make: cuts.Make, frac: float) -> cuts.Examined:
    found = cuts.Examined(part, name, frac, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, deprecated names: their own business
        logging.disable(logging.WARNING)
        try:
            cuts.examine(found, make)
        finally:
            logging.disable(logging.NOTSET)
    return found


def check(found: cuts.Examined) -> None:
    assert found.state == "exact", found.why
    assert found.skipped > 0


def text(name: str) -> cuts.Make:
    small = NAMES[name]
    return lambda batch: (small.build(), cuts.text_samples(small, batch))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name) -> None:
    check(examined("transformers", name, text(name), 0.6))


@pytest.mark.parametrize("what", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize(
    "name",
    ["BertForSequenceClassification", "AlbertForSequenceClassification", "LlamaForCausalLM",
     "ViTForImageClassification", "T5ForConditionalGeneration"],
)  # fmt: skip
@pytest.mark.parametrize("before", [True, False])
def test_outputs_collected_by_hooks(name, what, before) -> None:
    # the first call hangs the hooks on the layers for good; what they collect is part of the output
    pytest.importorskip("transformers", minversion="5", reason="older ones collect them otherwise")

    def make(batch):
        model = NAMES[name].build()
        model.set_attn_implementation("eager")  # the others compute no attentions
        setattr(model.config, what, True)
        samples = cuts.text_samples(NAMES[name], batch)
        if before:
            model(**{key: value[None] for key, value in samples[0].items()})
        return model, samples

    found = examined("transformers", name, make, 0.6)
    check(found)
    assert found.skipped > 0.3  # layers, and not just the embeddings


@pytest.mark.parametrize("frac", cuts.FRACTIONS)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, frac) -> None:
    check(examined("timm", name, lambda batch: cuts.timm_model(name, batch), frac))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name) -> None:
    check(examined("torchvision", name, lambda batch: cuts.torchvision_model(name, batch), 1.0))


@pytest.mark.slow
@pytest.mark.parametrize("frac", cuts.FRACTIONS)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_all_transformers(name, frac) -> None:
    # none is silently wrong; what is refused has a reason
    found = examined("transformers", name, text(name), frac)
    assert found.state in ("exact", "refused")
    assert found.why
