"""What decides on the numbers that torch's operations give: autocast, settings of backends, modes."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Autocast = tuple[tuple[str, bool, torch.dtype], ...]
"""Kind of device, whether it is on, its type."""

_TINIEST = 5e-324


def backend_state(device: torch.device) -> list[Any]:
    """Return the settings by which torch chooses kernels on `device`, and the modes that see operations."""
    return [get() for get in (_CHOOSING if device.type == "cpu" else (*_CHOOSING, *_CHOOSING_CUDNN))]


def _function_modes() -> list[Any]:
    """Return the modes of others that see functions; ``with torch.device(...)`` changes no numbers."""
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    others = (mode for mode in modes if not type(mode).__module__.startswith("layerwise."))
    return [mode for mode in others if type(mode) is not DeviceContext]


def _precisions(backend: str) -> list[Any]:
    """Return in which types 32-bit numbers may be multiplied.

    torch's former getters raise where its ``fp32_precision`` was set, which came with torch 2.9.
    """
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    if get is None:
        return [torch._C._get_float32_matmul_precision()]
    return [get(backend, kind) for kind in ("matmul", "conv", "rnn")]


def _cudnn_multiplies_short() -> bool | None:
    try:
        return torch._C._get_cudnn_allow_tf32()
    except RuntimeError:  # `_precisions` tells
        return None


_CHOOSING = (
    torch._C._get_flash_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_mkldnn_enabled,
    torch._C._get_deterministic_algorithms,
    lambda: _precisions("mkldnn"),
    torch.get_num_threads,
    torch.get_default_dtype,
    lambda: _TINIEST > 0,  # not so under torch.set_flush_denormal
    torch.backends.mha.get_fastpath_enabled,
    _function_modes,
    _get_current_dispatch_mode_stack,
)
_CHOOSING_CUDNN = (
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    _cudnn_multiplies_short,
    lambda: _precisions("cuda"),
)


def autocast_state(device: torch.device) -> Autocast:
    """Return the state of autocast on the CPU and on `device`."""
    kinds = ("cpu",) if device.type in ("cpu", "meta") else ("cpu", device.type)
    return tuple([(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds])
