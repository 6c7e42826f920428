"""A text classifier that reads the mean of all tokens, for encoders trained as sentence encoders.

transformers' own classifiers read one token: BERT's the first one, through a "pooler" layer. An encoder that
was trained to give its *mean* the meaning of the sentence (MiniLM, MPNet, E5 and their kin) never learned
anything through that pooler, so a probe on it has to learn the pooler as well: on the topic task of
``layerwise demo text`` twenty times the parameters for no better accuracy; see docs/guide/text.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import ModelError, plural
from layerwise.sources.opened import OpenedModel, ReplacedHead


class MeanPooledClassifier(nn.Module):
    """A transformers body, the mean of its token vectors, and one linear output layer.

    Args:
        body: a transformers model that returns ``last_hidden_state``, float[N, tokens, width].
        width: of its token vectors.
        num_classes: number of outputs.
    """

    def __init__(self, body: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        """Return the logits, float[N, classes].

        Args:
            input_ids: int64[N, tokens].
            attention_mask: int64[N, tokens], 0 for padding; None where there is none.
            more: what else the body takes (``token_type_ids``).
        """
        tokens = self.body(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = mask.unsqueeze(-1).to(tokens.dtype)  # [N, tokens, 1]
        mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        logits: Tensor = self.classifier(mean)
        return logits


def mean_pooled(opened: OpenedModel) -> OpenedModel:
    """Return a text classifier that reads the mean of all tokens, on the body of an opened one.

    The body is that of ``opened.model``, which must not be used any more; its pooler is left out. The
    output layer is new, initialised from torch's global generator.

    Raises:
        ModelError: it is not a text classifier, or an encoder-decoder, whose last states belong to the
            decoder.
    """
    model: Any = opened.model
    config = getattr(model, "config", None)
    if opened.task != "text_classification" or config is None or opened.num_classes is None:
        raise ModelError(
            f"pooling='mean' is for text classifiers of transformers; {opened.spec!r} is opened for "
            f"{opened.task}. Leave pooling out."
        )
    if config.is_encoder_decoder:
        raise ModelError(
            f"pooling='mean' reads an encoder, and {opened.spec!r} is an encoder-decoder. Leave pooling out."
        )
    body = model.base_model
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # transformers' bodies look for None and then leave it out
    pooled = MeanPooledClassifier(body, config.hidden_size, opened.num_classes)
    return dataclasses.replace(
        opened,
        model=pooled.eval(),
        replaced_head=ReplacedHead(("classifier",), None, opened.num_classes),
        notes=(
            *(note for note in opened.notes if not note.startswith("new output layer")),
            f"mean pooling: a linear layer of {plural(opened.num_classes, 'output')} on the mean of "
            "all tokens",
        ),
    )
