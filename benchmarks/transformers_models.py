"""Small random configurations of transformers architectures, for layer maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 99
_ATTENTION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**_ATTENTION, "vocab_size": VOCABULARY, "pad_token_id": 0}
NARROW = {**TEXT, "embedding_size": 16}
WIDE = {**TEXT, "embedding_size": 32}
DECODER = {**TEXT, "num_key_value_heads": 2}
HEAD_8 = {**DECODER, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {**_ATTENTION, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 32, 64], "depths": [2, 2, 2, 2]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_LIKE = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
SPEECH = {
    **_ATTENTION,
    "vocab_size": VOCABULARY,
    "conv_dim": [16] * 3,
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
SMALL_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
TWO_TOWERS = {"projection_dim": 16, "vision_config": VISION}


@dataclass(frozen=True)
class Small:
    """One small model.

    Attributes:
        family: prefix of its classes (``"Bert"``).
        head: suffix of the model's class.
        options: of its configuration.
        inputs: kind of example input, a key of `INPUTS`.
        layers: number of encoder and decoder layers that the configuration asks for, in all.
    """

    family: str
    head: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"
    layers: int = 3

    @property
    def name(self) -> str:
        """Name of the model's class."""
        return self.family + self.head

    def build(self) -> nn.Module:
        """Return the model with random weights."""
        import transformers

        config = getattr(transformers, self.family + "Config")(**self.options)
        model: nn.Module = getattr(transformers, self.name)(config)
        return model.eval()

    def example(self) -> dict[str, torch.Tensor]:
        """Return two samples."""
        return INPUTS[self.inputs]()


def _ids(length: int = 12) -> torch.Tensor:
    ids = torch.arange(3, 3 + 2 * length).reshape(2, length)
    ids[:, -1] = 2  # the end token of BART and CLIP
    return ids


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def _pixels(side: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(2, 3, side, side)}


INPUTS = {
    "text": _text,
    "ids": lambda: {"input_ids": _ids()},
    "pair": lambda: {**_text(), "decoder_input_ids": _ids(7)},
    "image": lambda: _pixels(32),
    "image64": lambda: _pixels(64),
    "image224": lambda: _pixels(224),
    "both": lambda: {**_text(), **_pixels(32)},
    "wave": lambda: {"input_values": torch.zeros(2, 1600)},
    "spectrogram": lambda: {"input_values": torch.zeros(2, 64, 32)},
    "speech": lambda: {"input_features": torch.zeros(2, 16, 100), "decoder_input_ids": _ids(7)},
}

CLASSIFY, CAUSAL, PAIR = "ForSequenceClassification", "ForCausalLM", "ForConditionalGeneration"
IMAGES = "ForImageClassification"

SMALL = [
    # encoders of text
    Small("Bert", CLASSIFY, TEXT),
    Small("Bert", "ForMaskedLM", TEXT),
    Small("Bert", "ForTokenClassification", TEXT),
    Small("Roberta", CLASSIFY, TEXT),
    Small("XLMRoberta", CLASSIFY, TEXT),
    Small("Camembert", CLASSIFY, TEXT),
    Small("Electra", CLASSIFY, NARROW),
    Small("Albert", CLASSIFY, NARROW, layers=1),  # one set of weights, used three times
    Small(
        "DistilBert", CLASSIFY, {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
    ),
    Small(
        "DebertaV2",
        CLASSIFY,
        {
            **TEXT,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "max_position_embeddings": 64,
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    Small(
        "Deberta",
        CLASSIFY,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 64},
    ),
    Small("MPNet", CLASSIFY, TEXT),
    Small("MobileBert", CLASSIFY, {**NARROW, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    Small(
        "ModernBert",
        CLASSIFY,
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Small("SqueezeBert", CLASSIFY, WIDE),
    Small("RoFormer", CLASSIFY, WIDE),
    Small("ConvBert", CLASSIFY, WIDE),
    Small("FNet", CLASSIFY, {**TEXT, "tpu_short_seq_length": 12}, "ids"),
    Small("Nystromformer", CLASSIFY, {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 12}),
    Small("Longformer", CLASSIFY, {**TEXT, "attention_window": 4}),
    Small("BigBird", CLASSIFY, {**TEXT, "attention_type": "original_full"}),
    Small(
        "Funnel",
        CLASSIFY,
        {"vocab_size": 99, "block_sizes": [2, 2, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
        layers=6,
    ),
    Small("XLNet", CLASSIFY, {"vocab_size": 99, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64}),
    # decoders of text
    Small(
        "GPT2",
        "LMHeadModel",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Small(
        "GPT2",
        CLASSIFY,
        {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0, "eos_token_id": 2},
    ),
    Small(
        "GPTNeo",
        CAUSAL,
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
        },
        layers=2,
    ),
    Small("GPTNeoX", CAUSAL, TEXT),
    Small(
        "OPT",
        CAUSAL,
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
    ),
    Small("Bloom", CAUSAL, {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    Small("Llama", CAUSAL, DECODER),
    Small("Llama", CLASSIFY, DECODER),
    Small("Mistral", CAUSAL, DECODER),
    Small("Mixtral", CAUSAL, {**DECODER, "num_local_experts": 4}),
    Small("Qwen2", CAUSAL, DECODER),
    Small("Qwen2Moe", CAUSAL, {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 16}),
    Small("Qwen3", CAUSAL, HEAD_8),
    Small("Gemma", CAUSAL, HEAD_8),
    Small("Gemma2", CAUSAL, HEAD_8),
    Small("Phi", CAUSAL, DECODER),
    Small("Phi3", CAUSAL, DECODER),
    Small("Falcon", CAUSAL, TEXT),
    Small("StableLm", CAUSAL, DECODER),
    Small("Olmo2", CAUSAL, DECODER),
    Small("Granite", CAUSAL, DECODER),
    Small(
        "Mamba", CAUSAL, {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4}, "ids"
    ),
    # text to text
    Small("T5", PAIR, T5_LIKE, "pair", layers=6),
    Small("MT5", PAIR, T5_LIKE, "pair", layers=6),
    Small("Bart", PAIR, ENCODER_DECODER, "pair", layers=6),
    Small("Bart", CLASSIFY, ENCODER_DECODER, "ids", layers=6),
    Small("MBart", PAIR, ENCODER_DECODER, "pair", layers=6),
    Small("Pegasus", PAIR, ENCODER_DECODER, "pair", layers=6),
    Small("Marian", "MTModel", ENCODER_DECODER, "pair", layers=6),
    # images
    Small("ViT", IMAGES, VISION, "image"),
    Small("DeiT", IMAGES, VISION, "image"),
    Small("DeiT", IMAGES + "WithTeacher", VISION, "image"),
    Small("Beit", IMAGES, VISION, "image"),
    Small("Dinov2", IMAGES, VISION, "image"),
    Small("Swin", IMAGES, {**WINDOWS, "window_size": 4}, "image", layers=4),
    Small("Swinv2", IMAGES, {**WINDOWS, "window_size": 4}, "image", layers=4),
    Small("ConvNext", IMAGES, STAGES, "image64", layers=8),
    Small("ConvNextV2", IMAGES, STAGES, "image64", layers=8),
    Small("ResNet", IMAGES, {**STAGES, "embedding_size": 8}, "image64", layers=8),
    Small("RegNet", IMAGES, {**STAGES, "embedding_size": 8, "groups_width": 8}, "image64", layers=8),
    Small(
        "Bit",
        IMAGES,
        {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [2, 2, 2, 2], "num_groups": 4},
        "image64",
        layers=8,
    ),
    Small("MobileNetV2", IMAGES, {}, "image64", layers=16),
    Small(
        "EfficientNet",
        IMAGES,
        {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0},
        "image64",
        layers=16,
    ),
    Small("MobileViT", IMAGES, {"image_size": 64}, "image64", layers=12),  # 3 convolutional, 2 + 4 + 3
    Small(
        "Segformer",
        IMAGES,
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [2, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
        "image64",
        layers=8,
    ),
    Small(
        "PoolFormer", IMAGES, {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}, "image64", layers=8
    ),
    Small(
        "ViTMAE",
        "ForPreTraining",
        {
            **VISION,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 4,
            "decoder_intermediate_size": 32,
        },
        "image",
        layers=5,
    ),
    Small(
        "Detr",
        "ForObjectDetection",
        {
            **ENCODER_DECODER,
            "num_queries": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": SMALL_RESNET,
        },
        "image64",
        layers=10,
    ),
    # sound
    Small("Wav2Vec2", CLASSIFY, SPEECH, "wave"),
    Small("Hubert", CLASSIFY, SPEECH, "wave"),
    Small(
        "Whisper",
        PAIR,
        {**ENCODER_DECODER, "max_source_positions": 50, "num_mel_bins": 16, "decoder_start_token_id": 1},
        "speech",
        layers=6,
    ),
    Small(
        "AST",
        "ForAudioClassification",
        {**_ATTENTION, "max_length": 64, "num_mel_bins": 32},
        "spectrogram",
    ),
    # images and text
    Small(
        "CLIP",
        "Model",
        {**TWO_TOWERS, "text_config": {**TEXT, "bos_token_id": 1, "eos_token_id": 2}},
        "both",
        layers=6,
    ),
    Small(
        "Siglip",
        "Model",
        {"text_config": {**TEXT, "max_position_embeddings": 12}, "vision_config": VISION},
        "both",
        layers=6,
    ),
]
