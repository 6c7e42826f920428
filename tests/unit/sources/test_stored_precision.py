"""Models that are stored in half precision."""

import pytest
import torch

from layerwise.sources.models import open_model, reopen
from tiny_text import save_tiny, tiny_config, tiny_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stored_in_half_precision_learn_in_float32(dtype, tmp_path):
    # Adam's steps on float16 weights turn into NaN, on bfloat16 ones mostly into nothing.
    model = transformers.AutoModel.from_config(tiny_config("llama")).to(dtype)
    model.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    opened = open_model(f"hf:{tmp_path / 'half'}", num_classes=3, task="text_classification")
    assert {p.dtype for p in opened.model.parameters()} == {torch.float32}
    assert torch.equal(
        opened.model.model.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight.float()
    )
    assert any("opened as float32" in note for note in opened.notes)
    assert {p.dtype for p in reopen(opened.to_dict()).model.parameters()} == {torch.float32}


def test_float32_weights_need_no_note(tmp_path):
    save_tiny(tmp_path / "bert")
    opened = open_model(f"hf:{tmp_path / 'bert'}", num_classes=3, task="text_classification")
    assert not any("float32" in note for note in opened.notes)
