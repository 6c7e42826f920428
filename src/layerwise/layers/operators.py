"""What one call of an ATen operation says of itself: from its schema, and from its arguments."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from layerwise.layers.flops import COUNTED
from layerwise.layers.forms import tensor_digest
from layerwise.layers.graph import Effect

TRAINING_ARGUMENTS = ("training", "train", "use_input_stats")

SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""Operations that read a tensor's shape and not its value."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an operator's schema says, looked up once."""

    name: str
    arguments: tuple[str, ...]
    written: frozenset[str]
    """Names of the arguments that it writes in place."""
    is_view: bool
    is_query: bool
    draws_random: bool
    is_attention: bool
    is_batch_norm: bool
    is_shaped_by_data: bool
    counts_flops: bool


@functools.cache
def facts_of(func: Any) -> Facts:
    """Return what the schema of an operator says."""
    schema = func._schema
    name = str(func.__name__).split(".")[0]
    written = frozenset(
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return Facts(
        name=name,
        arguments=tuple(argument.name for argument in schema.arguments),
        written=written,
        is_view=not written and any(result.alias_info is not None for result in schema.returns),
        is_query=func.namespace == "prim" or name == "detach_",  # .device, .layout: no data
        draws_random=torch.Tag.nondeterministic_seeded in func.tags,
        is_attention="attention" in name,
        is_batch_norm="batch_norm" in name and "backward" not in name,
        is_shaped_by_data=torch.Tag.dynamic_output_shape in func.tags,
        counts_flops=name in COUNTED,
    )


def argument_of(facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> Any:
    """Return the first of the arguments `names` that was given, else None."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
        if name in facts.arguments and (position := facts.arguments.index(name)) < len(args):
            return args[position]
    return None


def is_shaped_by_data(facts: Facts, args: tuple[Any, ...]) -> bool:
    """Whether the data decide the shape of the result, as for ``nonzero()`` and ``x[mask]``."""
    if facts.name == "index":  # its tag says that masks are possible
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return facts.is_shaped_by_data


def effect_of(facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Effect | None:
    """Return whether a call draws random numbers or mixes the samples of a batch; None for neither."""
    if facts.is_batch_norm:
        training = argument_of(facts, args, kwargs, *TRAINING_ARGUMENTS) is True
        # instance norm is a batch-norm over a batch of one, made of all samples' channels
        return "batch" if training and args[0].shape[0] != 1 else None
    if not facts.draws_random:
        return None
    if facts.is_attention and not argument_of(facts, args, kwargs, "dropout_p"):
        return None
    switch = argument_of(facts, args, kwargs, *TRAINING_ARGUMENTS)
    return None if switch is False else "random"


def constants_of(facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments as text: of tensors, which of them are one, and what part of its memory each is.

    The number of samples is left out.
    """
    given = (*zip(facts.arguments, args), *sorted(kwargs.items()))
    met: dict[int, int] = {}
    return ", ".join(f"{name}={_text(value, met)}" for name, value in given)


def _text(value: Any, met: dict[int, int]) -> str:
    if isinstance(value, torch.Tensor):
        number = met.setdefault(id(value), len(met))
        if value.layout != torch.strided:
            return f"tensor {number}"
        return f"tensor {number} {tuple(value.shape[1:])} {value.stride()} {value.storage_offset()}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_text(item, met) for item in value)}]"
    return "generator" if isinstance(value, torch.Generator) else str(value)


def content_of(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's data; ``""`` if it has none to look at."""
    if type(tensor) is FakeTensor or tensor.device.type == "meta":
        return ""
    with torch.no_grad(), _disable_current_modes():
        return tensor_digest(tensor)


def factory_size(args: tuple[Any, ...]) -> float:
    """Return how many elements an operation without tensor arguments makes; inf if it cannot be told."""
    if args and isinstance(args[0], tuple | list):
        return math.prod(int(length) for length in args[0])
    numbers = [abs(a) for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
    return max(numbers, default=math.inf)


def run_inside(
    operator: HigherOrderOperator, mode: TorchDispatchMode, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an operator that takes functions (``flex_attention``); `mode` sees the operations that it runs.

    Raises:
        NotImplementedError: it has no form that is made of operations.
    """
    if operator is torch.ops.higher_order.cond:  # its kernel refuses to be seen
        chosen, yes, no, operands = args
        with mode:
            return (yes if chosen else no)(*operands)
    kernel = operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if kernel is None:
        raise NotImplementedError(f"{operator} cannot be seen operation by operation")
    with mode:
        return kernel(*args, **kwargs)
