"""Classifiers on the mean of all tokens."""

import pytest
import torch

from layerwise.errors import ModelError
from layerwise.layers.mapping import layer_map
from layerwise.sources.models import open_model
from layerwise.sources.pooled import mean_pooled
from tiny_text import save_tiny

pytest.importorskip("transformers")


def opened(tmp_path, family="bert", **options):
    folder = save_tiny(tmp_path / family, family)
    return open_model(f"hf:{folder}", num_classes=3, **{"task": "text_classification", **options})


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "modernbert", "gpt2", "llama"])
def test_padding_does_not_count(family, tmp_path):
    # A text has the same logits alone and beside a longer one.
    both = mean_pooled(opened(tmp_path, family))
    model, tokenizer = both.model, both.tokenizer
    texts = ["red engine", "the good goal of a fast team and a fine ball"]
    with torch.no_grad():
        together = model(**tokenizer(texts, padding=True, return_tensors="pt"))
        alone = model(**tokenizer(texts[:1], return_tensors="pt"))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_logits_are_of_the_mean_of_the_body(tmp_path):
    # By hand: the tuned body's last states, averaged over the tokens that are there.
    found = mean_pooled(opened(tmp_path))
    batch = found.tokenizer(["red engine of the road"], return_tensors="pt")
    with torch.no_grad():
        states = found.model.body(**batch).last_hidden_state
        expected = found.model.classifier(states.mean(dim=1))
        torch.testing.assert_close(found.model(**batch), expected)


def test_a_linear_probe_is_the_linear_layer_alone(tmp_path):
    # Without the pooler in it, the head is one layer, and a probe on it is a linear probe.
    found = mean_pooled(opened(tmp_path))
    layers = layer_map(found.model, found.example_input)
    assert set(layers.head.parameters) == {"classifier.weight", "classifier.bias"}
    assert layers.names[0] == "body.embeddings"
    assert layers.unused == ()


def test_encoder_decoders_and_taggers_are_refused(tmp_path):
    with pytest.raises(ModelError, match="encoder-decoder"):
        mean_pooled(opened(tmp_path, "t5"))
    with pytest.raises(ModelError, match="opened for token_classification"):
        mean_pooled(opened(tmp_path, task="token_classification"))
