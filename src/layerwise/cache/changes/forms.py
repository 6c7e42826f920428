"""Tensors of any form (sparse, quantised, nested, complex) as plain ones, to be compared or hashed."""

from __future__ import annotations

from typing import Any

import torch


def dense(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return dense tensors of real numbers that hold what a tensor holds; its own memory where it can be."""
    tensor = tensor.detach()
    if tensor.is_nested:
        return [part for one in tensor.unbind() for part in dense(one)]
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), *dense(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), *dense(tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), *dense(tensor.values())]
    if tensor.is_complex():
        return [torch.view_as_real(tensor.resolve_conj())]
    return [tensor.resolve_neg()]


def shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a tensor's shape; of a nested one, which has none, those of its parts."""
    return tuple(map(shape_of, tensor.unbind())) if tensor.is_nested else tuple(tensor.shape)
