"""`Handed`: a ghost in place of a tensor of the batch, which the loop may do with what it likes.

An operation outside of a replay loads the samples and gets the real values. What shares memory with the
batch in a plain loop (a view, a numpy array) shares it here: from then on, that memory is what the ghost
stands for. Only a ghost that is still what was handed out, copied or moved at most, lets the model be
replayed. Within a replay it is a `Ghost` like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from layerwise.cache.replay.content import Samples
from layerwise.cache.replay.ghost import (
    PAST_THE_DISPATCHER,
    Ghost,
    blank,
    needed,
    written_to,
)
from layerwise.errors import CacheError
from layerwise.layers.forms import place_of
from layerwise.layers.operators import SHAPE_ONLY, facts_of

_COPIES = frozenset({"_to_copy", "clone", "_pin_memory"})
"""Operations on one tensor that may return the same values."""
_VIEWS = frozenset({"detach", "alias", "lift_fresh", "view", "_reshape_alias", "expand", "slice"})
"""Operations on one tensor that may return the same elements of the same memory."""


class Handed(Ghost):
    """A ghost of samples.

    Its tag says what it stands for: kept by copies, moves, aliases and one cast to a narrower type, and lost
    by every other operation.
    """

    stands_for: Samples
    _narrowed = False  # a cast took bits away: a cast back does not bring them back

    @property
    def tag(self) -> Any:
        """What it stands for; None if it was written to."""
        return None if self.stands_for.is_changed else self.stands_for.tag

    @property
    def loaded(self) -> torch.Tensor | None:
        """What was loaded, whatever was written since; None if it was not needed so far."""
        return self.stands_for.loaded

    @property
    def is_readable(self) -> bool:
        """Whether the value can be had just now."""
        return _replays == 0 and self.stands_for.is_readable

    def value(self) -> torch.Tensor:
        """Return the tensor that it stands for, what was written to it included; to be read only.

        Raises:
            CacheError: it cannot be loaded.
        """
        return self._readable().read()

    def memory(self) -> torch.Tensor:
        """Return the same; what is written to it is written to the ghost.

        Raises:
            CacheError: it cannot be loaded.
        """
        return self._readable().writable()

    def _readable(self) -> Samples:
        if not self.stands_for.is_readable:
            raise CacheError(needed("read", [self]))
        return self.stands_for

    @Ghost.data.setter  # type: ignore[attr-defined,untyped-decorator]
    def data(self, new: torch.Tensor) -> None:
        """Stand for another tensor."""
        if isinstance(new, Handed):
            self.stands_for, self._narrowed = new.stands_for, new._narrowed
        elif isinstance(new, Ghost):
            self.stands_for.spoil()
        else:
            self.stands_for = Samples(memory=new.detach())
        self.look_like(new)

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the samples where that is possible, else on shapes."""
        kwargs = kwargs or {}
        name = facts_of(func).name
        if name in SHAPE_ONLY:
            return super().__torch_dispatch__(func, types, args, kwargs)
        ghosts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Ghost)]
        readable = all([isinstance(one, Handed) and one.is_readable for one in ghosts])
        if name in _VIEWS:
            alias = _alias(args[0], func, args, kwargs)
            if alias is not None:
                return alias
        if readable and (name not in _COPIES or args[0].stands_for.is_changed):
            return _run_for_real(func, args, kwargs)
        output = super().__torch_dispatch__(func, types, args, kwargs)
        return _copied(args[0], func, args, kwargs, output) if name in _COPIES else output


def _past_the_dispatcher(name: str) -> Callable[..., Any]:
    """Return a method of `Handed` that does with its memory what torch's method of that name does."""
    method = getattr(torch.Tensor, name)

    def forward(self: Handed, *args: Any, **kwargs: Any) -> Any:
        if not self.is_readable:
            raise CacheError(needed(name, [self]))
        memory = self.memory()
        if self.requires_grad:
            memory = memory.detach().requires_grad_()
        found = method(memory, *args, **kwargs)
        return self if found is memory else found

    forward.__name__ = name
    return forward


for _name in PAST_THE_DISPATCHER:
    setattr(Handed, _name, _past_the_dispatcher(_name))


def _alias(source: Handed, func: Any, args: Any, kwargs: Any) -> Handed | None:
    """Return a view of all elements in the same order; None if it is another view."""
    meta = func(source.shaped, *args[1:], **kwargs)
    if place_of(meta) != place_of(source.shaped):
        return None
    made = Handed(meta, source.device, source.stands_for)
    made._narrowed = source._narrowed
    return made


def _copied(source: Handed, func: Any, args: Any, kwargs: Any, copy: Ghost) -> Handed:
    """Return a copy, which knows whether it may be cast back, and how it is loaded."""
    content = source.stands_for
    narrowed = source._narrowed
    if copy.dtype != source.dtype:
        narrowed = torch.promote_types(source.dtype, copy.dtype) != copy.dtype
    made = Handed(copy.shaped, copy.device, Samples())
    made._narrowed = narrowed
    if content.is_changed:
        return made
    if not source._narrowed or made.dtype == source.dtype:
        made.stands_for.tag = content.tag
    if content.load is not None:
        made.stands_for.load = lambda: func(
            *tree_map_only(Handed, lambda _: content.original(), args), **kwargs
        )
    return made


def _run_for_real(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of the loop's own on loaded tensors in the place of ghosts."""
    written = written_to(func, args, kwargs)
    shares = bool(written) or func.is_view  # what shares memory may be written to later
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], Handed):  # aliases keep their shape
        args[0].stands_for = Samples(memory=args[0].memory().detach())
    take = Handed.memory if shares else Handed.value
    output = func(*tree_map_only(Handed, take, args), **tree_map_only(Handed, take, kwargs))
    for one in written:
        if isinstance(one, Handed):
            one.look_like(one.memory())
    is_itself = isinstance(output, torch.Tensor) and written and isinstance(written[0], Handed)
    return written[0] if is_itself else output


class _Loaded(torch.autograd.Function):
    """A ghost's value, through which gradients flow back to the ghost."""

    @staticmethod
    def forward(ctx: Any, phantom: Handed) -> torch.Tensor:
        return phantom.value().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with data: of a ghost the one that it stands for, linked to it by autograd.

    Raises:
        CacheError: it cannot be loaded.
    """
    if not isinstance(tensor, Ghost):
        return tensor
    if not isinstance(tensor, Handed):
        raise CacheError(needed("read", [tensor]))
    found: torch.Tensor = _Loaded.apply(tensor) if tensor.requires_grad else tensor.memory()
    tangent = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return found if tangent is None else forward_ad.make_dual(found, tangent)  # type: ignore[no-untyped-call]


class OnlyShapes:
    """Within, ghosts load nothing: a replayed forward pass shows by that what it needs."""

    def __enter__(self) -> None:
        """Begin."""
        global _replays
        _replays += 1

    def __exit__(self, *error: object) -> None:
        """End."""
        global _replays
        _replays -= 1


_replays = 0  # forward passes under way that are replayed


def handed(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    order: tuple[int, ...] | None = None,
    tag: Any = None,
    load: Callable[[], torch.Tensor] | None = None,
) -> Handed:
    """Return what is handed out in place of a tensor of a batch.

    Args:
        shape: of that tensor.
        dtype: of that tensor.
        order: see `layerwise.cache.replay.ghost.blank`.
        tag: see `Handed`.
        load: returns that tensor, which nobody writes to; None where it cannot be had.
    """
    return Handed(blank(shape, dtype, order), torch.device("cpu"), Samples(tag, load))
