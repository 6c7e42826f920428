"""`BatchShape`: how a loader's batches look, so that others can be compared with the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from layerwise.cache.comparing import same_but_for_tensors
from layerwise.cache.replay.layout import memory_order
from layerwise.errors import CacheError
from layerwise.layers.forms import is_plain, without_data
from layerwise.layers.structures import map_tensors, tensors_in

Kind = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""For each tensor of a batch, its shape without the first dimension, and its type."""


_FIXED = (
    "a batch holds tensors in an object in which others cannot be put in their place. Let the collate "
    "function return tuples, lists, dictionaries or plain dataclasses."
)


class OtherShapeError(CacheError):
    """A batch has other shapes than its samples had before."""


def leaves_of(batch: Any) -> list[torch.Tensor]:
    """Return the tensors of a batch.

    Raises:
        CacheError: one of them is of a form that is not stored, or another cannot be put in its place.
    """
    leaves = tensors_in(batch)
    if not all(map(_is_storable, leaves)):
        raise CacheError(
            "a batch holds a tensor that is sparse, nested, quantised or on meta, or requires gradients. Let "
            "the loop or the model make it of a plain one."
        )
    replaced: list[torch.Tensor] = []
    _with(batch, replaced.append)
    if len(replaced) != len(leaves):
        raise CacheError(_FIXED)
    return leaves


def kind_of(leaves: Sequence[torch.Tensor]) -> Kind:
    """Return what the samples of a batch look like that has these tensors."""
    return tuple((tuple(leaf.shape[1:]), leaf.dtype) for leaf in leaves)


def _with(batch: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a batch with other things in place of its tensors."""
    try:
        return map_tensors(batch, function)
    except Exception as error:  # a class of the user's own looks at what it is given
        raise CacheError(_FIXED) from error


def _is_storable(tensor: torch.Tensor) -> bool:
    return is_plain(tensor) and tensor.device.type != "meta" and not tensor.requires_grad


@dataclass
class BatchShape:
    """How the loader's batches look: learned from the first one.

    Attributes:
        template: its structure, with meta tensors.
        rows: for each tensor, its shape without the first dimension, and type.
        orders: for each tensor, its dimensions in the order in which they lie in memory.
    """

    template: Any
    rows: Kind
    orders: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, batch: Any, size: int) -> BatchShape:
        """Learn from a batch of `size` samples.

        Raises:
            CacheError: a tensor's first dimension does not count samples, or see `leaves_of`.
        """
        leaves = leaves_of(batch)
        if not leaves:
            raise CacheError(f"a batch of {size} samples holds no tensors.")
        for leaf in leaves:
            if leaf.dim() == 0 or leaf.shape[0] != size:
                raise CacheError(
                    f"a tensor of a batch of {size} samples has the shape {tuple(leaf.shape)}: the first "
                    f"dimension must count samples. What a sample has several of (boxes, crops) goes into a "
                    f"dimension of its own, padded to one number if need be, and is taken apart in the "
                    f"forward of a module around the model: give the cache that module, and call it."
                )
        template = _with(batch, without_data)
        return cls(template, kind_of(leaves), tuple(map(memory_order, leaves)))

    def check(self, batch: Any, size: int) -> list[torch.Tensor]:
        """Return the tensors of another batch of the same shape.

        Raises:
            OtherShapeError: its samples have other shapes.
        """
        other = BatchShape.of(batch, size)
        other.require(self.rows)
        return tensors_in(batch)

    def has_other_values(self, batch: Any) -> bool:
        """Return whether what is no tensor in another batch is not what it was in the first one."""
        return not same_but_for_tensors(self.template, batch)

    def require(self, rows: Kind) -> None:
        """Compare with the shapes that the samples had before.

        Raises:
            OtherShapeError: they are others.
        """
        if self.rows != rows:
            pairs = zip_longest(rows, self.rows, fillvalue=((), None))
            differing = next(((one, other) for one, other in pairs if one != other))
            before, now = next(pair for pair in zip(*differing) if pair[0] != pair[1])
            raise OtherShapeError(
                f"samples differ in shape from batch to batch ({before}, then {now}): "
                f"padding to the longest of a batch changes the last bits of what the prefix computes. Let "
                f"batches hold samples of one length, each padded to that in every epoch: "
                f"layerwise.by_length(loader) does."
            )
