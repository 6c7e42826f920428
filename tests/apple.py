"""A tensor that behaves as one on Apple's GPUs, where there is no float64."""

from __future__ import annotations

from typing import Any

import torch


class AppleTensor(torch.Tensor):
    """Refuses float64, until it is moved to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; what comes to the CPU is a plain tensor."""
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, torch.Tensor) and found.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def on_apple(tensor: torch.Tensor) -> AppleTensor:
    """Return the same numbers there."""
    return tensor.as_subclass(AppleTensor)
