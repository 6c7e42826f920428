"""What a structure of outputs is made of besides the content of its tensors, as text to be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

from layerwise.layers.holding import DEPTH, SCALARS, is_object, slots_of, told


def outline(
    structure: Any, of_tensor: Callable[[torch.Tensor], str], of_other: Callable[[Any], str], depth: int = 0
) -> Iterator[str]:
    """Yield the classes, names, numbers and texts in a structure, in the order of `tensors_in`.

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
        items = structure if is_mapping else getattr(structure, "__dict__", {}) | slots_of(structure)
        yield f"{kind} of {len(items)}"
        for name, item in items.items():
            yield repr(name)
            yield from outline(item, of_tensor, of_other, depth + (not is_mapping))
    else:
        yield of_other(structure)
