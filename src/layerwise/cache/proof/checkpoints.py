"""Gradient checkpointing: what it runs again in the backward pass runs outside of a replay."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from layerwise.cache.replay.ghost import Ghost
from layerwise.errors import CacheError
from layerwise.layers.structures import tensors_in

logger = logging.getLogger("layerwise.cache")

_CHECKPOINT = "torch.utils.checkpoint"
_TOGETHER = (
    "gradient checkpointing runs frozen and learning layers together again in the backward pass, and there "
    "nothing can be skipped. Checkpoint them apart."
)


def is_checkpointed() -> bool:
    """Return whether the caller runs inside a function that `torch.utils.checkpoint` will run again.

    Raises:
        CacheError: it is a reentrant one, and what it gets learns.
    """
    frame, found = sys._getframe().f_back, False
    while frame is not None:
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            found = True
            if any(getattr(frame.f_locals.get("ctx"), "needs_input_grad", ())):
                raise CacheError(_TOGETHER)
        frame = frame.f_back
    return found


def check_backward(output: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Try the backward pass of a replay in which a checkpoint was around something that was skipped.

    What a checkpoint runs again in the backward pass runs outside of the replay, so that nothing is skipped
    then. That is no harm, unless learning layers in the same checkpoint need it.

    Raises:
        CacheError: they do.
    """
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        found = torch.autograd.grad(
            outputs, learning, list(map(torch.zeros_like, outputs)), allow_unused=True
        )
    except CacheError as error:
        raise CacheError(_TOGETHER) from error
    except RuntimeError as error:  # with a reentrant one, in which nothing was skipped, it cannot be tried
        logger.debug("prefix cache: the backward pass was not tried: %s", error)
    else:
        if any(isinstance(gradient, Ghost) for gradient in found):  # the last layer itself does not run again
            raise CacheError(_TOGETHER)
