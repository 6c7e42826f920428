"""`Ghost`: a tensor that knows its shape and has no data, so that a wrong cut raises instead of lying.

While a cached batch is replayed, the modules of the frozen prefix do not run. What they would have
returned is a ghost. The model's own code between modules (reshapes, residual adds, position tables) runs
on ghosts as it is, for the price of a few Python calls. As soon as a ghost's *value* would be needed, the
operation raises `CacheError`: when Python asks for it, when it meets a tensor that gradients flow through,
when it is written into a real tensor.

The batch's own tensors are ghosts as well, and the loop may do with them what it likes: an operation outside
of a replay loads the samples and gets the real values. What shares memory with the batch in a plain loop (a
view, a numpy array) shares it here: from then on, that memory is what the ghost stands for. Only a ghost that
is still what was handed out, copied or moved at most, lets the model be replayed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from layerwise.cache.replay.content import Content
from layerwise.errors import CacheError
from layerwise.layers.operators import SHAPE_ONLY

_COPIES = frozenset({"_to_copy", "clone", "_pin_memory"})
_VIEWS = frozenset({"detach", "alias", "lift_fresh", "view", "_reshape_alias", "expand", "slice"})
"""Operations that may return the same elements of the same memory."""

_PAST_THE_DISPATCHER = (
    "numpy", "tolist", "data_ptr", "untyped_storage", "apply_", "map_", "map2_", "__dlpack__", "__reduce_ex__"
)  # fmt: skip
"""Methods that read a tensor's memory without an operation. Others, such as `__array__`, use these."""


class Ghost(torch.Tensor):
    """A strided tensor with shape, strides, type and device, and without data.

    Its tag says what it stands for: kept by copies, moves, aliases and one cast to a narrower type, and lost
    by every other operation; None where nobody asked. `load` returns the tensor that it stands for, which
    nobody writes to; None where it cannot be had.
    """

    _meta: torch.Tensor
    _content: Content
    _narrowed = False  # a cast took bits away: a cast back does not bring them back
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, content: Content | None = None) -> Ghost:
        """Make the tensor; `__init__` keeps what it stands for."""
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False) if inference else _AS_IT_IS:  # a view of a normal one is normal
            made = torch.Tensor._make_wrapper_subclass(
                cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=device
            )
        _refuse_address(_storage(made)._cdata, _NO_DATA)
        return made

    def __init__(self, meta: torch.Tensor, device: torch.device, content: Content | None = None) -> None:
        self._meta = meta
        self._content = Content() if content is None else content

    @property
    def tag(self) -> Any:
        """What it stands for; None if it was written to."""
        content = self._content
        return content.tag if content.memory is None or not content.is_changed else None

    @property
    def was_written(self) -> bool:
        """Whether an operation wrote into it without data."""
        return self._content.was_written

    @property
    def loaded(self) -> torch.Tensor | None:
        """What was loaded, whatever was written since; None if it was not needed so far."""
        return self._content.loaded

    @property
    def is_readable(self) -> bool:
        """Whether the value can be had just now."""
        return _replays == 0 and self._content.is_readable

    def value(self) -> torch.Tensor:
        """Return the tensor that it stands for, what was written to it included; to be read only.

        Raises:
            CacheError: it cannot be loaded.
        """
        content = self._content
        if not content.is_readable:
            raise CacheError(_needed("read", (self,)))
        return content.original() if content.memory is None else content.memory

    def memory(self) -> torch.Tensor:
        """Return the same; what is written to it is written to the ghost.

        Raises:
            CacheError: it cannot be loaded.
        """
        if not self._content.is_readable:
            raise CacheError(_needed("read", (self,)))
        return self._content.writable()

    @property
    def data(self) -> torch.Tensor:
        """An alias without gradients."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if isinstance(new, Ghost):
            self._content, self._narrowed = new._content, new._narrowed
        else:
            self._content = Content(memory=new.detach())
        self._look_like(new)

    def _look_like(self, tensor: torch.Tensor) -> None:
        """Take the shape, strides, type and device of `tensor`."""
        if _place(tensor)[:2] != _place(self)[:2] or tensor.dtype != self.dtype:
            self._meta = _meta(tensor)
            with torch._C._DisableTorchDispatch():
                torch.Tensor.data.__set__(self, Ghost(self._meta, self.device))  # type: ignore[attr-defined]

    def __repr__(self) -> str:  # type: ignore[override]  # a tensor's takes options
        return f"Ghost(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = made = self.detach().clone().requires_grad_(self.requires_grad)
        return made

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves the defaults out
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.__name__).split(".")[0]
        device = torch.device("cpu")
        ghosts = []
        trains = False
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Ghost):
                device = leaf.device
                ghosts.append(leaf)
            elif isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                trains = True
        if name in SHAPE_ONLY:
            return _factory(func, args, kwargs)
        readable = _replays == 0 and all([one.is_readable for one in ghosts])
        if name in _VIEWS:
            view = _view(func, args, kwargs)
            if not readable or view._content is ghosts[0]._content:
                return view
        if readable and not (name in _COPIES and not ghosts[0]._content.is_changed):
            return _run_for_real(func, args, kwargs, ghosts)
        if trains:
            raise CacheError(_needed(name, tree_leaves((args, kwargs)), "it meets a tensor that trains"))
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        if not all(isinstance(one, Ghost) for one in written):
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
        if written:
            for one in written:
                one._content.spoil()  # it is not what it was
                one._look_like(one._meta)
            return written[0] if func._schema.returns else None
        if not isinstance(output, torch.Tensor | tuple | list):
            raise CacheError(_needed(name, tree_leaves((args, kwargs))))
        if name in _COPIES and isinstance(output, torch.Tensor):
            return _copied(func, *given, ghosts[0], output, target)
        whole = ghosts[0]._content if func.is_view else None
        return tree_map_only(torch.Tensor, lambda meta: Ghost(meta, target, Content(whole=whole)), output)


def _past_the_dispatcher(name: str) -> Callable[..., Any]:
    """Return a method of `Ghost` that does with the ghost's memory what torch's method of that name does."""
    method = getattr(torch.Tensor, name)

    def forward(self: Ghost, *args: Any, **kwargs: Any) -> Any:
        if not self.is_readable:
            raise CacheError(_needed(name, (self,)))
        memory = self.memory()
        if self.requires_grad:
            memory = memory.detach().requires_grad_()
        found = method(memory, *args, **kwargs)
        return self if found is memory else found

    forward.__name__ = name
    return forward


for _name in _PAST_THE_DISPATCHER:
    setattr(Ghost, _name, _past_the_dispatcher(_name))


def _view(func: Any, args: Any, kwargs: Any) -> Ghost:
    """Return a view of a ghost: an alias of it, if it is one of all elements in the same order."""
    source = args[0]
    meta = func(source._meta, *args[1:], **kwargs)
    if _place(meta) != _place(source._meta):
        return Ghost(meta, source.device, Content(whole=source._content))
    made = Ghost(meta, source.device, source._content)
    made._narrowed = source._narrowed
    return made


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _copied(
    func: Any, args: Any, kwargs: Any, source: Ghost, meta: torch.Tensor, device: torch.device
) -> Ghost:
    """Return a copy of a ghost, which knows whether it may be cast back, and how it is loaded."""
    made = Ghost(meta, device)
    if made.dtype == source.dtype:
        made._narrowed = source._narrowed
    else:
        made._narrowed = torch.promote_types(source.dtype, made.dtype) != made.dtype
    content = source._content
    if content.is_changed:
        return made
    if not source._narrowed or made.dtype == source.dtype:
        made._content.tag = content.tag
    if content.load is not None:
        made._content.load = lambda: func(*tree_map_only(Ghost, lambda _: content.original(), args), **kwargs)
    return made


def _run_for_real(func: Any, args: Any, kwargs: Any, ghosts: list[Ghost]) -> Any:
    """Run an operation of the loop's own on loaded tensors in the place of ghosts."""
    written = _written(func, args, kwargs) if func._schema.is_mutable else []
    shares = bool(written) or func.is_view  # what shares memory may be written to later
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], Ghost):  # aliases keep their shape
        args[0]._content = Content(memory=args[0].memory().detach())
    take = Ghost.memory if shares else Ghost.value
    output = func(*tree_map_only(Ghost, take, args), **tree_map_only(Ghost, take, kwargs))
    for one in written:
        if isinstance(one, Ghost):
            one._look_like(one.memory())
    is_itself = isinstance(output, torch.Tensor) and written and isinstance(written[0], Ghost)
    return written[0] if is_itself else output


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


_AS_IT_IS = contextlib.nullcontext()
_storage = torch.Tensor.untyped_storage
_refuse_address = torch._C._set_storage_data_ptr_access_error_msg  # else C code that asks for it crashes
_NO_DATA = "a tensor whose samples the prefix cache did not load has no address: pass x.clone() in its place"
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
    return Ghost(meta, torch.device(device), Content(tag, load))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Ghost):
        return tensor._meta
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _factory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation that reads only a tensor's shape, with a real tensor in place of the ghost."""
    args, kwargs = tree_map_only(Ghost, _without_values, (args, kwargs))
    return func(*args, **kwargs)


def _without_values(phantom: Ghost) -> torch.Tensor:
    return torch.empty_strided(phantom.shape, phantom.stride(), dtype=phantom.dtype, device=phantom.device)


@functools.cache
def _written_argument(func: Any) -> tuple[int, str]:
    """Return the position and the name of the first argument that an operation writes to."""
    return next(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    position, name = _written_argument(func)
    return tree_leaves(args[position] if position < len(args) else kwargs.get(name))


def _needed(name: str, leaves: Any, why: str = "") -> str:
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Ghost)]
    return (
        f"the operation {name!r} needs the value of a tensor that the prefix cache did not load or compute "
        f"(shape {shapes[0] if shapes else '?'}{'; ' + why if why else ''}). If your loop reads the "
        f"inputs of a cache with views=, pass PrefixCache(..., keep_inputs=True). Otherwise the model takes "
        f"another way than on the first batch: use storage='off', and report it if it should not."
    )
