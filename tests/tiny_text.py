"""Tiny transformers with random weights, and a tokenizer for them, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TOPICS = {
    "cars": ["engine", "wheel", "road", "driver"],
    "food": ["flour", "sugar", "oven", "bread"],
    "sport": ["goal", "team", "match", "ball"],
}
COMMON = ["the", "a", "of", "in", "for", "and", "red", "green", "blue", "good", "bad", "fine", "fast", "slow"]
WORDS = [*COMMON, *(word for words in TOPICS.values() for word in words)]


def tiny_tokenizer() -> Any:
    """Return a tokenizer of whole words over `WORDS`, with BERT's special tokens and a pair template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )


VOCABULARY = 5 + len(WORDS)
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SMALL),
    "roberta": ("RobertaConfig", {**_SMALL, "bos_token_id": 2, "eos_token_id": 3}),
    "deberta": ("DebertaV2Config", {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": (
        "ModernBertConfig",
        {**_SMALL, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
    ),
    "llama": ("LlamaConfig", _LLAMA),
    "qwen": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "t5": ("T5Config", {**_T5, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}),
    "bart": (
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
}
ENCODERS = ("bert", "roberta", "deberta", "modernbert")
DECODERS = ("gpt2", "llama", "qwen")
ENCODER_DECODERS = ("t5", "bart")


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model of a family in `CONFIGS`."""
    import transformers

    name, options = CONFIGS[family]
    return getattr(transformers, name)(**{**options, **changes})


def tiny_model(family: str, kind: str = "SequenceClassification", *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny model with random weights; `kind` as in transformers' ``AutoModelFor...``."""
    import transformers

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()


def save_tiny(folder: Path, family: str = "bert", kind: str | None = None) -> Path:
    """Write a tiny pretrained model (random weights, without a head of its own) and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(family)
    if kind is None:
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    else:
        getattr(transformers, f"AutoModelFor{kind}").from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def topic_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return rows with ``text`` and ``topic``: a topic's text holds two of its words among others."""
    import random

    draw = random.Random(seed)
    rows = []
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        words = draw.sample(TOPICS[topic], 2) + draw.choices(["the", "a", "of", "red", "good", "slow"], k=4)
        draw.shuffle(words)
        rows.append({"text": " ".join(words[: draw.randint(4, 6)] + words[:1]), "topic": topic})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows with equal keys as a CSV file."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
