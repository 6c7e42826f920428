"""Floating-point operations of the ATen operations that do nearly all the work of a network.

Counted as ``torch.utils.flop_counter`` and fvcore do: matrix products, convolutions and attention; a
multiply and an add are two. Written out here because that module takes 0.2 s to import and does not
know the CPU's attention kernel, nor its operation for a whole LSTM layer.
"""

from __future__ import annotations

from typing import Any

import torch

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)

COUNTED = frozenset(
    {
        "mm",
        "_grouped_mm",
        "addmm",
        "bmm",
        "baddbmm",
        "mv",
        "addmv",
        "dot",
        "convolution",
        "_convolution",
        "mkldnn_rnn_layer",
        *_ATTENTION,
    }
)
"""Names of the operations that `flops` has a formula for."""


def flops(name: str, args: tuple[Any, ...], output: Any) -> int:
    r"""Return the floating-point operations of one call of the operation `name`.

    Matrix products: :math:`2\,m\,n\,k`. Convolutions: 2 x results x weights per result. Attention:
    :math:`2\,B\,H\,L_q\,L_k\,(E_k + E_v)`, masked-out pairs included, as the kernels compute them.

    Args:
        name: of the operation, without namespace and overload.
        args: its positional arguments; only shapes are read.
        output: its result.

    Returns:
        0 for an operation without a formula.
    """
    if name in ("mm", "_grouped_mm", "bmm", "mv", "dot"):
        return 2 * int(output.numel()) * int(args[0].shape[-1])
    if name in ("addmm", "baddbmm", "addmv"):
        return 2 * int(output.numel()) * int(args[1].shape[-1])
    if name in ("convolution", "_convolution"):
        return _convolution(args[0], args[1], bool(args[6]), output)
    if name == "mkldnn_rnn_layer":  # a whole LSTM layer: both weight matrices, for each sample and time
        return 2 * int(output.numel()) // int(output.shape[-1]) * int(args[1].numel() + args[2].numel())
    if name in _ATTENTION:
        query, key, value = args[:3]
        pairs = int(query.numel()) // int(query.shape[-1]) * int(key.shape[-2])
        return 2 * pairs * int(query.shape[-1] + value.shape[-1])
    return 0


def _convolution(image: torch.Tensor, weight: torch.Tensor, transposed: bool, output: torch.Tensor) -> int:
    per_result = int(weight.numel()) // max(int(weight.shape[0]), 1)  # (C_in / groups) x kernel size
    return 2 * int((image if transposed else output).numel()) * per_result
