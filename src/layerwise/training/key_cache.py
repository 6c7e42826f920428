"""`without_key_cache`: models of transformers that keep no keys and values while they train."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_key_cache(model: nn.Module) -> Iterator[None]:
    """Let a transformers model keep no keys and values inside the context; other models are left alone.

    They serve generation, where texts grow by a token; in training they are by-products that take memory,
    and the prefix cache would have to store them, as they are part of what the model returns.
    """
    transformers: Any = sys.modules.get("transformers")  # a model of it has imported it
    kind = () if transformers is None else transformers.PretrainedConfig
    # More than one: T5's decoder has a copy of its own.
    found = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in found if isinstance(config, kind)}
    before = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None) is not None]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
