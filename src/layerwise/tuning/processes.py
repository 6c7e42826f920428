"""Whether several processes work on one model."""

from __future__ import annotations

import torch


def distributed() -> bool:
    """Return whether this process is one of a group (torchrun, accelerate launch)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
