"""Layer maps against the numbers of transformers' layers and of their configurations."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from benchmarks import oracles
from benchmarks.transformers_models import SMALL, Small

SAMPLE = [
    "AlbertForSequenceClassification",  # one set of weights for all layers
    "BartForConditionalGeneration",
    "BertForSequenceClassification",
    "CLIPModel",
    "DebertaV2ForSequenceClassification",
    "DetrForObjectDetection",
    "FunnelForSequenceClassification",  # layers in pooled blocks
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LongformerForSequenceClassification",  # recorded on real samples
    "MobileBertForSequenceClassification",  # stacks inside its layers
    "Qwen2MoeForCausalLM",
    "SqueezeBertForSequenceClassification",  # layers called by their forward
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Wav2Vec2ForSequenceClassification",
    "WhisperForConditionalGeneration",
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _check(small: Small) -> None:
    verdict = oracles.judge_transformers(small)
    assert not verdict.error
    assert verdict.complete
    assert verdict.discordant == 0
    assert verdict.found_blocks == small.layers


@pytest.mark.parametrize(
    "small", [small for small in SMALL if small.name in SAMPLE], ids=lambda small: small.name
)
def test_map_agrees_with_transformers(small: Small) -> None:
    # complete, layers in the order of their numbers, as many as the configuration says
    _check(small)


def test_bert_by_blocks() -> None:
    # embeddings, encoder layers, and a head of pooler and classifier
    small = next(small for small in SMALL if small.name == "BertForSequenceClassification")
    layers = oracles.judge_transformers(small).layers
    assert layers is not None
    assert layers.names == ("bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(3)), "classifier")
    assert layers.head is not None
    assert layers.head.parameters[0].startswith("bert.pooler")


def test_clip_by_blocks() -> None:
    # two towers one after the other, each with its own embeddings, and a head of both projections
    small = next(small for small in SMALL if small.name == "CLIPModel")
    layers = oracles.judge_transformers(small).layers
    assert layers is not None
    towers = [
        [f"{tower}_model.embeddings", *(f"{tower}_model.encoder.layers.{n}" for n in range(3))]
        for tower in ("vision", "text")
    ]
    assert layers.names == (*towers[0], *towers[1], "visual_projection")
    assert layers["head"].parameters == ("visual_projection.weight", "text_projection.weight", "logit_scale")


@pytest.mark.slow
@pytest.mark.parametrize("small", SMALL, ids=lambda small: small.name)
def test_all_models(small: Small) -> None:
    # the whole list
    _check(small)


def test_the_list_is_long_enough() -> None:
    # issue 3 asks for 65 architectures
    assert len({small.name for small in SMALL}) >= 65
