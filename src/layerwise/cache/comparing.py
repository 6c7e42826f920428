"""Whether tensors are the same, to the bit or but for rounding, and structures but for their tensors."""

from __future__ import annotations

from typing import Any

import torch

from layerwise.layers.structures import map_tensors

_NEAR = 1e-3  # relative difference up to which two results are the same but for rounding
_TINY = 1e-30  # below it numbers have few bits left


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape are equal, NaN at the same places included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(one[~nan], other[~nan])


def is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same but for rounding; what is not finite must be the same."""
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if not one.is_floating_point():
        return torch.equal(one, other)
    near = max(_NEAR, 8 * torch.finfo(one.dtype).eps)
    if one.dtype.itemsize == 1:  # torch does not compute with float8
        one, other = one.float(), other.float()
    finite = one.isfinite()
    if not (torch.equal(finite, other.isfinite()) and same_bits(one[~finite], other[~finite])):
        return False
    one, other = one[finite], other[finite]
    if not one.numel():
        return True
    return float((one - other).abs().max()) <= near * float(one.abs().max()) + _TINY


def same_but_for_tensors(one: Any, other: Any) -> bool:
    """Return whether two structures are equal, their tensors left aside; False where nobody can tell."""
    try:
        blank, other_blank = (map_tensors(structure, lambda tensor: None) for structure in (one, other))
        return bool(blank == other_blank)
    except Exception:  # objects without a usable equality
        return False
