"""What can be measured on batches of token ids, one number a text: length, fertility, unknown tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from layerwise.choosing.distances import Array


def measure_tokens(ids: Tensor, mask: Tensor | None, tokenizer: Any = None) -> dict[str, Array]:
    """Return figures of a batch of texts, float64[N] each.

    - ``"length"``: tokens, special ones and padding left out where that is known.
    - ``"fertility"``: tokens a word (words are what white space separates in the decoded text). Near 1 where
      the tokenizer knows the words, 2 and more where it cuts them to pieces: another language, a jargon,
      code. 0 for a text without words.
    - ``"unknown"``: share of tokens that are the tokenizer's unknown token; always 0 for byte-level ones.

    Args:
        ids: int[N, T].
        mask: int[N, T], 0 for padding; None counts every token.
        tokenizer: a transformers tokenizer; without one only the length is known.

    Source: fertility as in Rust et al. 2021 (How good is your tokenizer?), section 3.2.
    """
    rows = ids.detach().cpu().numpy()
    kept = np.ones_like(rows, dtype=bool) if mask is None else mask.detach().cpu().numpy().astype(bool)
    if tokenizer is None:
        return {"length": kept.sum(1).astype(np.float64)}
    special = {id_ for id_ in tokenizer.all_special_ids if id_ != tokenizer.unk_token_id}
    kept &= ~np.isin(rows, list(special))
    length = kept.sum(1).astype(np.float64)
    words = np.array([len(tokenizer.decode(row[keep].tolist()).split()) for row, keep in zip(rows, kept)])
    unknown = (rows == tokenizer.unk_token_id) & kept if tokenizer.unk_token_id is not None else kept & False
    return {
        "length": length,
        "fertility": np.where(words > 0, length / np.maximum(words, 1), 0.0),
        "unknown": unknown.sum(1) / np.maximum(length, 1),
    }
