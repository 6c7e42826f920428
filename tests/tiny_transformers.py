"""Tiny transformers folders for tests: random weights and a tokenizer of a few words, made in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "runs",
    "sleeps",
    "red",
    "blue",
    "fast",
    "slow",
    "good",
    "bad",
    "very",
    "not",
    "and",
]
WORDS += ["or", "house", "tree", "sun", "moon"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder: Path, *, words: list[str] | None = None, decoder: bool = False) -> Any:
    """Save a word tokenizer in `folder`: BERT's kind, or a decoder's, which has only an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *(words or WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="[UNK]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
    made.save_pretrained(folder)
    return made


def save_bert(folder: Path, kind: str = "BertForMaskedLM", *, vocab_size: int = 30, **options: Any) -> Any:
    """Save a BERT of two layers, 16 wide, 24 positions, with its tokenizer."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        **options,
    )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_gpt2(folder: Path, kind: str = "GPT2LMHeadModel", *, vocab_size: int = 30) -> Any:
    """Save a GPT-2 of two layers, 16 wide, 32 positions, whose tokenizer has no padding token."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=3, eos_token_id=3
    )
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    save_tokenizer(folder, decoder=True)
    return model


def save_vit(folder: Path, *, classes: int = 10) -> Any:
    """Save a ViT of two layers for images of 32 pixels."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=classes,
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model
