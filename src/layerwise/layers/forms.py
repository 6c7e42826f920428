"""Tensors of any form (sparse, quantised, nested, complex) as plain ones, to be compared or hashed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def dense(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return dense tensors of real numbers that hold what a tensor holds; its own memory where it can be."""
    tensor = tensor.detach()
    if tensor.is_nested:
        return [part for one in tensor.unbind() for part in dense(one)]
    if tensor.is_quantized:
        return [tensor.int_repr(), *_steps(tensor)]
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), *dense(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), *dense(tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), *dense(tensor.values())]
    if tensor.is_complex():
        return [torch.view_as_real(tensor.resolve_conj())]
    return [tensor.resolve_neg()]


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is an array of numbers: not sparse, nested or quantised."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized)


def place_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return which elements of its memory a strided tensor is."""
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def without_data(tensor: torch.Tensor) -> torch.Tensor:
    """Return a meta tensor of the shape, strides and type of a strided one."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a tensor's shape; of a nested one, which has none, those of its parts."""
    return tuple(map(shape_of, tensor.unbind())) if tensor.is_nested else tuple(tensor.shape)


def strides_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a tensor's strides, by which kernels are chosen; none of one that has no strides."""
    return tensor.stride() if is_plain(tensor) else ()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype} {shape_of(tensor)}".encode())
    for part in dense(tensor):
        data = part.cpu().contiguous().reshape(-1)
        if data.numel():
            digest.update(data.view(torch.uint8).numpy().data)  # a view: no copy is made
    return digest.hexdigest()


def _steps(quantised: torch.Tensor) -> list[torch.Tensor]:
    """Return which numbers the integers of a quantised tensor stand for."""
    if quantised.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([quantised.q_scale(), quantised.q_zero_point()], dtype=torch.float64)]
    return [quantised.q_per_channel_scales(), quantised.q_per_channel_zero_points()]
