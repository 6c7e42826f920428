"""`Ghost`: a tensor that knows its shape and has no data, so that a wrong cut raises instead of lying.

While a cached batch is replayed, the modules of the frozen prefix do not run. What they would have
returned is a ghost. The model's own code between modules (reshapes, residual adds, position tables) runs
on ghosts as it is, for the price of a few Python calls. As soon as a ghost's *value* would be needed, the
operation raises `CacheError`: when Python asks for it, when it meets a tensor that gradients flow through,
when it is written into a real tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves, tree_map_only

from layerwise.cache.replay.content import Content
from layerwise.errors import CacheError
from layerwise.layers.forms import without_data
from layerwise.layers.operators import SHAPE_ONLY, argument_of, facts_of

PAST_THE_DISPATCHER = (
    "numpy", "tolist", "data_ptr", "untyped_storage", "apply_", "map_", "map2_", "__dlpack__", "__reduce_ex__"
)  # fmt: skip
"""Methods that read a tensor's memory without an operation. Others, such as `__array__`, use these."""


class Ghost(torch.Tensor):
    """A strided tensor with shape, strides, type and device, and without data.

    Attributes:
        stands_for: what is known of what it stands for.
        shaped: a tensor without data that looks the same.
    """

    shaped: torch.Tensor
    stands_for: Content
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device, content: Content | None = None) -> Ghost:
        """Make the tensor; `__init__` keeps what it stands for."""
        with torch.inference_mode(False):  # a view of a normal one is normal
            made = torch.Tensor._make_wrapper_subclass(
                cls, meta.size(), strides=meta.stride(), dtype=meta.dtype, device=device
            )
        _refuse_address(_storage(made)._cdata, _NO_DATA)
        return made

    def __init__(self, meta: torch.Tensor, device: torch.device, content: Content | None = None) -> None:
        self.shaped = meta
        self.stands_for = Content() if content is None else content

    @property
    def data(self) -> torch.Tensor:
        """An alias without gradients."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        self.stands_for.spoil()
        self.look_like(new)

    def look_like(self, tensor: torch.Tensor) -> None:
        """Take the shape, strides and type of `tensor`."""
        if (tensor.shape, tensor.stride(), tensor.dtype) != (self.shape, self.stride(), self.dtype):
            self.shaped = _meta(tensor)
            with torch._C._DisableTorchDispatch():
                torch.Tensor.data.__set__(self, Ghost(self.shaped, self.device))  # type: ignore[attr-defined]

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
        """Run an operation on shapes alone."""
        kwargs = kwargs or {}
        name = facts_of(func).name
        if name in SHAPE_ONLY:
            args, kwargs = tree_map_only(Ghost, _any_values, (args, kwargs))
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        ghosts = [leaf for leaf in leaves if isinstance(leaf, Ghost)]
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Ghost)]
        if any(one.requires_grad for one in others):
            raise CacheError(needed(name, ghosts, "it meets a tensor that trains"))
        written = written_to(func, args, kwargs)
        if not all(isinstance(one, Ghost) for one in written):
            raise CacheError(needed(name, ghosts, "it is written into a tensor with data"))
        device = ghosts[-1].device
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
        meta_args, meta_kwargs = tree_map_only(torch.Tensor, _meta, (args, kwargs))
        if "device" in kwargs:
            meta_kwargs["device"] = torch.device("meta")
        try:
            output = func(*meta_args, **meta_kwargs)
        except Exception as error:  # meta tensors raise various types where data is needed
            raise CacheError(needed(name, ghosts, str(error))) from error
        if written:
            for one in written:
                one.stands_for.spoil()  # it is not what it was
                one.look_like(one.shaped)
            return written[0] if func._schema.returns else None
        if not isinstance(output, torch.Tensor | tuple | list):
            raise CacheError(needed(name, ghosts))
        whole = ghosts[0].stands_for if func.is_view else None
        return tree_map_only(torch.Tensor, lambda meta: Ghost(meta, device, Content(whole)), output)


def _refused(name: str) -> Callable[..., Any]:
    """Return a method of `Ghost` that raises where torch's method of that name would read its memory."""

    def refuse(self: Ghost, *args: Any, **kwargs: Any) -> Any:
        raise CacheError(needed(name, [self]))

    return refuse


for _name in PAST_THE_DISPATCHER:
    setattr(Ghost, _name, _refused(_name))

_storage = torch.Tensor.untyped_storage
_refuse_address = torch._C._set_storage_data_ptr_access_error_msg  # else C code that asks for it crashes
_NO_DATA = "a tensor whose samples the prefix cache did not load has no address: pass x.clone() in its place"


def blank(shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return a tensor without data.

    Args:
        shape: its shape.
        dtype: its type.
        order: its dimensions from the outermost in memory to the innermost (channels_last is
            ``(0, 2, 3, 1)``); None for the usual order.
    """
    if order is None or order == tuple(range(len(shape))):
        return torch.empty(shape, dtype=dtype, device="meta")
    lying = torch.empty([shape[d] for d in order], dtype=dtype, device="meta")
    return lying.permute([order.index(d) for d in range(len(order))])


def ghost(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    order: tuple[int, ...] | None = None,
) -> Ghost:
    """Return a ghost of the given shape.

    Args:
        shape: of the tensor that it stands for.
        dtype: of that tensor.
        device: where that tensor would be.
        order: see `blank`.

    >>> ghost((2, 3), torch.float32).sum(dim=1).shape
    torch.Size([2])
    >>> ghost((2, 3), torch.float32).sum().item()
    Traceback (most recent call last):
    ...
    layerwise.errors.CacheError: the operation '_local_scalar_dense' needs the value of a tensor that ...
    """
    return Ghost(blank(shape, dtype, order), torch.device(device))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.shaped if isinstance(tensor, Ghost) else without_data(tensor)


def _any_values(one: Ghost) -> torch.Tensor:
    return torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device=one.device)


def written_to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors that an operation writes to."""
    facts = facts_of(func)
    names = [name for name in facts.arguments if name in facts.written]
    return tree_leaves([argument_of(facts, args, kwargs, name) for name in names])


def needed(name: str, ghosts: list[Ghost], why: str = "") -> str:
    """Return the message of an error: an operation needs what is not there."""
    return (
        f"the operation {name!r} needs the value of a tensor that the prefix cache did not load or compute "
        f"(shape {tuple(ghosts[0].shape)}{'; ' + why if why else ''}). If your loop reads the "
        f"inputs of a cache with views=, pass PrefixCache(..., keep_inputs=True). Otherwise the model takes "
        f"another way than on the first batch: use storage='off', and report it if it should not."
    )
