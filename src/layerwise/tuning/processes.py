"""Whether several processes work on one model, and on how much of it."""

from __future__ import annotations

from typing import Any

import torch


def distributed() -> bool:
    """Return whether this process is one of a group (torchrun, accelerate launch)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count_averaged(wrapper: Any) -> int:
    """Return the number of parameters whose gradients a DistributedDataParallel averages."""
    return int(wrapper._get_ddp_logging_data()["num_parameter_tensors"])
