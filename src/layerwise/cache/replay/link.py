"""`Link`: how a training loop's batch becomes the arguments of the model's forward.

The loop is the user's own: ``model(x)``, ``model(**batch)``, ``model(batch["image"].to(device))``. So the
first call is watched, and each tensor argument is recognised among the tensors of the batch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.contents import Contents
from layerwise.cache.comparing import same_bits
from layerwise.cache.cutting.book import Form
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.replay.handed import Handed
from layerwise.cache.replay.kernels import Autocast, autocast_state, backend_state
from layerwise.cache.replay.layout import in_order, lies_in, memory_order
from layerwise.errors import CacheError
from layerwise.layers.forms import is_plain, without_data
from layerwise.layers.structures import Arguments, map_tensors, tensors_in

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_TENSOR = "a tensor"
_NAMED = (FunctionType, BuiltinFunctionType, type)
"""What is told by who it is."""


class OpenArgumentError(CacheError):
    """A call is given an object that may hold something else next time; other calls may not be."""


@dataclass(frozen=True)
class Link:
    """One way to call the model.

    Attributes:
        leaves: for each tensor argument, which tensor of the batch it is; None if the loop made it.
        own: what the loop made, as it was in the first call; None in the place of the batch's tensors.
        dtypes: of the arguments: a loop may cast what the loader gives.
        orders: of their dimensions in memory: kernels, and so last bits, are chosen by it.
        strides: of the arguments of the first call: who has the same has the same order.
        arguments: structure of ``(args, kwargs)``, with the constants (`_outline`).
        template: ``(args, kwargs)`` with meta tensors.
        autocast: state of autocast around the call.
        grad: gradients were on.
        backends: see `backend_state`.
        awake: modules of the model that were in train mode.
        device: of the arguments.
    """

    leaves: tuple[int | None, ...]
    own: tuple[torch.Tensor | None, ...] = field(repr=False, compare=False)
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    arguments: Hashable
    template: Any
    autocast: Autocast
    grad: bool
    backends: list[Any]
    awake: frozenset[nn.Module] = field(repr=False)
    device: torch.device

    @property
    def form(self) -> Form:
        """Whatever tells this way to call the model from others."""
        return Form(self.arguments, frozenset(at for at, leaf in enumerate(self.leaves) if leaf is None))

    @functools.cached_property
    def name(self) -> str:
        """Whatever of the arguments is no tensor, as text that tells it from others in other processes, too.

        Functions by what they do and hold, and not by where they lie.
        """
        held = Contents(self.arguments, "anywhere")
        return re.sub(" at 0x[0-9a-f]+", "", f"{self.arguments} {held.texts} {held.data}")

    def build(self, leaves: Sequence[torch.Tensor], like: Any = None) -> Arguments:
        """Return ``(args, kwargs)`` for the batch with the given tensors.

        Args:
            leaves: tensors of the batch.
            like: ``(args, kwargs)`` with other constants, and with what the loop made; None for those of
                the first call.
        """
        recipes = iter(zip(self.leaves, self.own, self.dtypes, self.orders))
        now = self._count(leaves)

        def leaf(given: torch.Tensor) -> torch.Tensor:
            number, own, dtype, order = next(recipes)
            if number is not None:
                return in_order(leaves[number].to(self.device, dtype), order)
            return given if like is not None or own is None else _rows(own, self._row_count(own, now))

        built: Arguments = map_tensors(self.template if like is None else like, leaf)
        return built

    def apart(self, given: Arguments) -> Arguments:
        """Return the arguments of a call in containers of their own, and copies of what the loop made.

        For a pass of the cache's: the model may write to either.
        """
        numbers = iter(self.leaves)
        found: Arguments = map_tensors(given, lambda t: t.clone() if next(numbers) is None else t)
        return found

    def _count(self, leaves: Sequence[torch.Tensor]) -> int:
        """Return the number of samples in a batch."""
        return next(len(leaves[number]) for number in self.leaves if number is not None)

    def _row_count(self, own: torch.Tensor, count: int) -> int | None:
        """Return how long what the loop made is for a batch of `count` samples; None for a single number."""
        if not own.dim():
            return None
        first = next(place for place, number in enumerate(self.leaves) if number is not None)
        is_by_sample = len(own) == len(tensors_in(self.template)[first])
        return count if is_by_sample else len(own)

    def recognises(
        self, args: Any, kwargs: Any, leaves: Sequence[torch.Tensor], tag: object, versions: Sequence[int]
    ) -> bool:
        """Return whether the arguments are those of the batch that was handed out as `leaves`.

        `tag` is that of the ghosts among them, and `versions` what `versions_of` said at the time.
        """
        tensors = tensors_in((args, kwargs))
        if len(tensors) != len(self.leaves):
            return False
        for tensor, number, own, dtype, order, strides in zip(
            tensors, self.leaves, self.own, self.dtypes, self.orders, self.strides
        ):
            if not is_plain(tensor):
                return False
            if number is None:
                length = None if own is None else self._row_count(own, self._count(leaves))
                if own is None or not _is_like(tensor, own, length):
                    return False
                continue
            if tensor.dtype != dtype or not (tensor.stride() == strides or lies_in(tensor, order)):
                return False
            if not _is_handed_out(tensor, leaves[number], (tag, number), versions[number]):
                return False
        return True

    def is_like(self, other: Link) -> bool:
        """Return whether the model gets the same arguments, made of the batch in the same way."""
        one, another = (
            (link.leaves, link.dtypes, link.orders, link.device, link.arguments) for link in (self, other)
        )
        return bool(one == another)

    def is_called_as(self, other: Link, around: Set[nn.Module]) -> bool:
        """Return whether modes, autocast, gradients and kernels are the same; of modules only `around`."""
        one, another = ((link.autocast, link.grad, link.backends) for link in (self, other))
        return one == another and (self.awake ^ other.awake).isdisjoint(around)

    def same_constants(self, args: Any, kwargs: Any) -> bool:
        """Return whether the structure, and all that is not a tensor, is as in the first call."""
        is_one_tensor = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)  # told fast
        return (_ONE_TENSOR if is_one_tensor else _outline((args, kwargs))) == self.arguments


def find_link(
    leaves: Sequence[torch.Tensor], args: Any, kwargs: Any, modules: Iterable[nn.Module] = ()
) -> Link | None:
    """Return how the arguments come from the batch's tensors; None if the call is not about this batch.

    `modules` are those of the model.

    A tensor argument is a leaf of the batch if it is the same object or has the same values (after a
    move to another device, a cast, or a change of memory format). Where several leaves have these values, it
    is the first that is no other argument. Others are the loop's own: a number of labels, a mixing weight,
    all words of a target but the last.

    Raises:
        OpenArgumentError: an argument cannot be compared with that of the next call.
        CacheError: an argument learns, or cannot be looked at.
    """
    tensors = tensors_in((args, kwargs))
    found = [_number_of(tensor, leaves) for tensor in tensors]
    for place, tensor in enumerate(tensors):
        if found[place] is None:
            alike = _numbers_alike(tensor, leaves)
            found[place] = next((number for number in alike if number not in found), next(iter(alike), None))
    device = next((tensor.device for tensor, number in zip(tensors, found) if number is not None), None)
    if device is None:
        return None
    if not all(map(is_plain, tensors)):
        raise CacheError(
            "an argument of the model is a sparse, nested or quantised tensor. Let the model make it."
        )
    if any(tensor.requires_grad for tensor in tensors):
        raise CacheError("an argument of the model requires gradients, so nothing before it can be skipped.")
    own = [tensor for tensor, number in zip(tensors, found) if number is None]
    absent = [(leaf.shape, leaf.dtype) for number, leaf in enumerate(leaves) if number not in found]
    if any(tensor.dim() > 1 and (tensor.shape, tensor.dtype) in absent for tensor in own):
        return None  # other samples, with a mask like this batch's
    passed = [leaf for number, leaf in enumerate(leaves) if number in found]  # the others stay real
    shared = next(
        (t for t in own if any(_share_memory(t, other) for other in (*passed, *tensors) if other is not t)),
        None,
    )
    if shared is not None:
        raise CacheError(
            f"the model's argument of shape {tuple(shared.shape)} is a part of another tensor of the batch "
            f"or the call, so who writes to one writes to both. Let the dataset return it, or pass a copy."
        )
    arguments = _outline((args, kwargs))
    if arguments is None:
        raise OpenArgumentError(
            "an argument of the model is an object whose content may change from call to call. Pass numbers, "
            "texts and tensors."
        )
    return Link(
        leaves=tuple(found),
        own=tuple(t.detach().clone() if number is None else None for t, number in zip(tensors, found)),
        dtypes=tuple(tensor.dtype for tensor in tensors),
        orders=tuple(memory_order(tensor) for tensor in tensors),
        strides=tuple(tensor.stride() for tensor in tensors),
        arguments=arguments,
        template=map_tensors((args, kwargs), without_data),
        autocast=autocast_state(device),
        grad=torch.is_grad_enabled(),
        backends=backend_state(device),
        awake=frozenset(module for module in modules if module.training),
        device=device,
    )


def known_arguments(leaves: Sequence[torch.Tensor], args: Any, kwargs: Any) -> int:
    """Return how many arguments of a call are tensors of a batch."""
    return sum(bool(_numbers_alike(tensor, leaves)) for tensor in tensors_in((args, kwargs)))


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if isinstance(one, Ghost) or isinstance(other, Ghost):
        return False
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except RuntimeError:  # no memory of its own
        return False


def _is_like(tensor: torch.Tensor, own: torch.Tensor, length: int | None) -> bool:
    """Whether an argument that the loop made may stand for the first one: a model may look at its shape."""
    return (
        not isinstance(tensor, Ghost)
        and not tensor.requires_grad
        and (tensor.dtype, tensor.device, tensor.dim()) == (own.dtype, own.device, own.dim())
        and tensor.shape[1:] == own.shape[1:]
        and (length is None or len(tensor) == length)
    )


def _rows(own: torch.Tensor, length: int | None) -> torch.Tensor:
    """Return a copy, with rows left out or repeated to have so many."""
    if length is None or length == len(own):
        return own.clone()
    return own[torch.arange(length, device=own.device) % len(own)]


def _outline(value: Any) -> Hashable:
    """Return something to compare a structure of arguments by: all but what tensors hold, order included.

    None where that cannot be told: an object may change behind the same name.
    """
    if isinstance(value, torch.Tensor):
        return _TENSOR
    if isinstance(value, tuple | list | Mapping):
        parts = [_outline(part) for part in (value.values() if isinstance(value, Mapping) else value)]
        names = tuple(map(repr, value)) if isinstance(value, Mapping) else ()
        return None if None in parts else (type(value), names, tuple(parts))
    if isinstance(value, _NAMED):
        return value
    return (type(value), repr(value)) if isinstance(value, _PLAIN) else None  # True is not 1, nor 0.0 -0.0


_ONE_TENSOR = _outline(((torch.empty(0),), {}))


def _number_of(tensor: torch.Tensor, leaves: Sequence[torch.Tensor]) -> int | None:
    """Return which leaf a tensor is; None if it is another object."""
    return next((number for number, leaf in enumerate(leaves) if tensor is leaf), None)


def _numbers_alike(tensor: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[int]:
    """Return the leaves that have the values of a tensor, once they are moved and cast as it is."""
    if isinstance(tensor, Ghost) or not is_plain(tensor):
        return []
    return [
        number
        for number, leaf in enumerate(leaves)
        if leaf.shape == tensor.shape
        and same_bits(leaf.detach().to(tensor.device, tensor.dtype), tensor.detach())
    ]


def _is_handed_out(tensor: torch.Tensor, leaf: torch.Tensor, tag: object, version: int) -> bool:
    if tensor.requires_grad:  # its gradient is wanted, or what it was made of learns
        return False
    if isinstance(tensor, Ghost):
        return isinstance(tensor, Handed) and bool(tensor.tag == tag)
    if isinstance(leaf, Handed):
        if leaf.loaded is None:
            return False
        leaf = leaf.loaded
    elif _version(leaf) != version:
        return False
    return tensor is leaf or same_bits(leaf.to(tensor.device, tensor.dtype), tensor)


def versions_of(leaves: Sequence[torch.Tensor]) -> list[int]:
    """Return how often each tensor was written to; 0 where torch does not count (inference tensors)."""
    return [_version(leaf) for leaf in leaves]


def _version(leaf: torch.Tensor) -> int:
    return 0 if leaf.is_inference() else leaf._version
