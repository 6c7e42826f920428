"""Whether tensors are the same, to the bit or but for rounding, and structures but for their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

from layerwise.layers.holding import DEPTH, SCALARS, attributes_of, is_object, told
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


def outline(
    structure: Any, of_tensor: Callable[[torch.Tensor], str], of_other: Callable[[Any], str], depth: int = 0
) -> Iterator[str]:
    """Yield what a structure is made of besides the content of its tensors, as text to be compared.

    Classes, names, numbers and texts, in the order of `tensors_in`.

    Args:
        structure: of containers, arrays and objects.
        of_tensor: what to say of a tensor.
        of_other: what to say of what is none of these, such as a function.
        depth: of the objects around it.

    >>> list(outline({"a": (1, print)}, str, lambda thing: type(thing).__name__))
    ['dict of 1', "'a'", 'tuple of 2', '1', 'builtin_function_or_method']
    """
    kind = type(structure).__name__
    if isinstance(structure, torch.Tensor):
        yield of_tensor(structure)
    elif isinstance(structure, (*SCALARS, Enum, range)):
        yield repr(structure)
    elif isinstance(structure, np.ndarray):
        yield f"array {hash(told(structure))}"
    elif isinstance(structure, set | frozenset):
        yield f"{kind} {sorted(map(repr, structure))}"
    elif isinstance(structure, tuple | list):
        yield f"{kind} of {len(structure)}"
        for item in structure:
            yield from outline(item, of_tensor, of_other, depth)
    elif isinstance(structure, Mapping) or (depth < DEPTH and is_object(structure)):
        is_mapping = isinstance(structure, Mapping)
        items = structure if is_mapping else attributes_of(structure)
        yield f"{kind} of {len(items)}"
        for name, item in items.items():
            yield repr(name)
            yield from outline(item, of_tensor, of_other, depth + (not is_mapping))
    else:
        yield of_other(structure)
