"""`Ghost`: a tensor that knows its shape and has no data, so that a wrong cut raises instead of lying.

While a cached batch is replayed, the modules of the frozen prefix do not run. What they would have
returned is a ghost. The model's own code between modules (reshapes, residual adds, position tables) runs
on ghosts as it is, for the price of a few Python calls. As soon as a ghost's *value* would be needed, the
operation raises `CacheError`: when Python asks for it, when it meets a tensor that gradients flow through,
when it is written into a real tensor.

The batch's own tensors are ghosts as well, and the loop may do with them what it likes: an operation outside
of a replay loads the samples and gets the real values. Only a ghost that is still what was handed out, copied
or moved at most, lets the model be replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from layerwise.errors import CacheError

SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""Operations that read a tensor's shape and not its value: on a ghost they give real data."""

_SAME_VALUE = frozenset({"_to_copy", "clone", "detach", "alias", "lift_fresh"})
_KEEPS_TAG = _SAME_VALUE | {"_pin_memory"}


class Ghost(torch.Tensor):
    """A strided tensor with shape, strides, type and device, and without data.

    Attributes:
        tag: what the ghost stands for, kept by copies, moves and one cast to a narrower type, and lost by
            every other operation, and when it is written to; None where nobody asked.
        load: returns the tensor that it stands for, which nobody writes to; None where it cannot be had.
        was_written: an operation wrote into it.
    """

    was_written = False
    tag: Any
    load: Callable[[], torch.Tensor] | None = None
    _meta: torch.Tensor
    _real: torch.Tensor | None = None  # what the loop has written to it
    _narrowed = False  # a cast took bits away: a cast back does not bring them back
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, tag: Any = None) -> Ghost:
        """Make the tensor; `__init__` keeps what it stands for."""
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=device
        )

    def __init__(self, meta: torch.Tensor, device: torch.device, tag: Any = None) -> None:
        self._meta = meta
        self.tag = tag

    def value(self) -> torch.Tensor:
        """Return the tensor that it stands for, what was written to it included; to be read only.

        Raises:
            CacheError: it cannot be loaded.
        """
        if self._real is not None:
            return self._real
        if self.load is None:
            raise CacheError(_needed("read", (self,)))
        return self.load()

    def __repr__(self) -> str:  # type: ignore[override]  # a tensor's takes options
        return f"Ghost(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Ghost:
        return Ghost(self._meta, self.device, self.tag)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheError(_needed("pickle", (self,)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves the defaults out
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.__name__).split(".")[0]
        device = torch.device("cpu")
        tag = None
        ghosts = []
        trains = False
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Ghost):
                device = leaf.device
                tag = tag or leaf.tag
                ghosts.append(leaf)
            elif isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                trains = True
        if name in SHAPE_ONLY:
            return _factory(func, args, kwargs)
        loadable = _replays == 0 and all(one.load is not None for one in ghosts)
        if loadable and name not in _KEEPS_TAG:
            return _run_for_real(func, args, kwargs, ghosts)
        if trains:
            raise CacheError(_needed(name, tree_leaves((args, kwargs)), "it meets a tensor that trains"))
        mutable = func._schema.is_mutable
        if mutable and not isinstance(_written(func, args, kwargs), Ghost):
            raise CacheError(
                _needed(name, tree_leaves((args, kwargs)), "it is written into a tensor with data")
            )
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else device
        given = args, kwargs
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, _meta, (args, kwargs))
        try:
            output = func(*meta_args, **meta_kwargs)
        except Exception as error:  # meta tensors raise various types where data is needed
            raise CacheError(_needed(name, tree_leaves((args, kwargs)), str(error))) from error
        if mutable:
            written = _written(func, args, kwargs)
            written.tag, written.was_written = None, True  # it is not what it was
            return args[0]
        if not isinstance(output, torch.Tensor | tuple | list):
            raise CacheError(_needed(name, tree_leaves((args, kwargs))))
        keep = tag if name in _KEEPS_TAG else None
        if keep is None or not isinstance(output, torch.Tensor):
            return tree_map_only(torch.Tensor, lambda meta: Ghost(meta, target), output)
        return _copied(func, *given, ghosts[0], Ghost(output, target, keep))


def _copied(func: Any, args: Any, kwargs: Any, source: Ghost, made: Ghost) -> Ghost:
    """Give a copy of a ghost what it needs to know: whether it may be cast back, and how it is loaded."""
    if made.dtype == source.dtype:
        made._narrowed = source._narrowed
    else:
        if source._narrowed:
            made.tag = None
        made._narrowed = torch.promote_types(source.dtype, made.dtype) != made.dtype
    if source.load is not None:
        pristine, written = source.load, source._real

        def load() -> torch.Tensor:
            real = pristine() if written is None else written
            copy: torch.Tensor = func(*tree_map_only(Ghost, lambda _: real, args), **kwargs)
            return copy

        made.load = load
    return made


def _run_for_real(func: Any, args: Any, kwargs: Any, ghosts: list[Ghost]) -> Any:
    """Run an operation of the loop's own on loaded tensors in the place of ghosts."""
    writes = func._schema.is_mutable
    shares = any(result.alias_info is not None for result in func._schema.returns)
    for one in ghosts if writes or shares else ():  # what shares memory may be written to later
        one.tag = None
        one._real = one.value().clone() if one._real is None else one._real
    output = func(*tree_map_only(Ghost, Ghost.value, args), **tree_map_only(Ghost, Ghost.value, kwargs))
    return args[0] if writes and isinstance(args[0], Ghost) else output


class _Loaded(torch.autograd.Function):
    """A ghost's value, through which gradients flow back to the ghost."""

    @staticmethod
    def forward(ctx: Any, phantom: Ghost) -> torch.Tensor:
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
    found: torch.Tensor = _Loaded.apply(tensor) if tensor.requires_grad else tensor.value()
    return found


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Within, ghosts load nothing: a replayed forward pass shows by that what it needs."""
    global _replays
    _replays += 1
    try:
        yield
    finally:
        _replays -= 1


_replays = 0  # forward passes under way that are replayed


def ghost(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    order: tuple[int, ...] | None = None,
    tag: Any = None,
    load: Callable[[], torch.Tensor] | None = None,
) -> Ghost:
    """Return a ghost of the given shape.

    Args:
        shape: of the tensor that it stands for.
        dtype: of that tensor.
        device: where that tensor would be.
        order: its dimensions from the outermost in memory to the innermost (channels_last is
            ``(0, 2, 3, 1)``); None for the usual order.
        tag: see `Ghost`.
        load: see `Ghost`.

    >>> ghost((2, 3), torch.float32).sum(dim=1).shape
    torch.Size([2])
    >>> ghost((2, 3), torch.float32).sum().item()
    Traceback (most recent call last):
    ...
    layerwise.errors.CacheError: the operation '_local_scalar_dense' needs the value of a tensor that ...
    """
    if order is None or order == tuple(range(len(shape))):
        meta = torch.empty(shape, dtype=dtype, device="meta")
    else:
        meta = torch.empty([shape[d] for d in order], dtype=dtype, device="meta")
        meta = meta.permute([order.index(d) for d in range(len(shape))])
    made = Ghost(meta, torch.device(device), tag)
    made.load = load
    return made


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Ghost):
        return tensor._meta
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _factory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that reads only a tensor's shape, with a real tensor in place of the ghost."""
    ghosts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Ghost)]
    one = torch.empty((), dtype=ghosts[0].dtype, device=ghosts[0].device)
    like = tree_map_only(Ghost, lambda g: one.expand(g.shape), (args, kwargs))
    name = str(func.__name__).split(".")[0]
    if name.startswith("new_") or kwargs.get("memory_format") not in (None, torch.preserve_format):
        return func(*like[0], **like[1])
    meta = func(*tree_map_only(Ghost, lambda g: g._meta, args), **{**kwargs, "device": torch.device("meta")})
    result = torch.empty_strided(
        meta.shape, meta.stride(), dtype=meta.dtype, device=kwargs.get("device") or ghosts[0].device
    )
    fill: dict[str, Any] = {"zeros_like": 0, "ones_like": 1}
    if name in fill:
        result.fill_(fill[name])
    elif name == "full_like":
        result.fill_(args[1] if len(args) > 1 else kwargs["fill_value"])
    return result


@functools.cache
def _written_argument(func: Any) -> tuple[int, str]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return position, argument.name
    return 0, "self"


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    position, name = _written_argument(func)
    target = args[position] if position < len(args) else kwargs.get(name)
    return target[0] if isinstance(target, tuple | list) and target else target


def _needed(name: str, leaves: Any, why: str = "") -> str:
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Ghost)]
    return (
        f"the operation {name!r} needs the value of a tensor that the prefix cache did not load or compute "
        f"(shape {shapes[0] if shapes else '?'}{'; ' + why if why else ''}). If your loop reads the "
        f"inputs of a cache with views=, pass PrefixCache(..., keep_inputs=True). Otherwise the model takes "
        f"another way than on the first batch: use storage='off', and report it if it should not."
    )
