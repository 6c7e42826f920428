"""Run a model's forward pass once and leave no trace: wrappers, hooks, buffers, caches, random state."""

from __future__ import annotations

import contextlib
import reprlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from layerwise.errors import ModelError, named_kind, shorten
from layerwise.layers.holding import home
from layerwise.layers.memory import global_hooks
from layerwise.layers.randomness import kept_random_state
from layerwise.layers.snapshot import Snapshot

_WRAPPED_AS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that no other module's child has: of torch.compile, FSDP and activation checkpointing."""

_COMPILING = ("torch._dynamo.eval_frame", "torch.nn.attention.flex_attention")


def require_module(model: object) -> None:
    """Raise `ModelError` where something else was given for a model."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model is {reprlib.repr(model)}, {named_kind(model)}; expected a torch.nn.Module. Open one by "
            "name: layerwise.open_model('timm:resnet18')"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile, DDP, DataParallel, FSDP and checkpointing.

    Layer maps and plans use the names of the unwrapped model, so one made before wrapping holds after it.
    PEFT models are returned as they are: their parameters are new ones with names of their own.
    Nothing is changed; the returned module shares everything with `model`.

    >>> layer = nn.Linear(2, 2)
    >>> unwrap(nn.DataParallel(layer)) is layer
    True
    """
    require_module(model)
    while True:
        names = (*_WRAPPED_AS, "module") if _is_data_parallel(model) else _WRAPPED_AS
        inner = next((part for name, part in model._modules.items() if name in names), None)
        if inner is None:
            return model
        model = inner


def _is_data_parallel(model: nn.Module) -> bool:
    """Return whether a model is one of torch's wrappers, or of those that apex and fairscale have."""
    kinds = type(model).__mro__
    return len(model._modules) == 1 and any(kind.__name__.endswith("DataParallel") for kind in kinds)


def check_ready(model: nn.Module) -> None:
    """Refuse a model that cannot be recorded: TorchScript, or with lazy modules of which no shape is known.

    Raises:
        ModelError: it is; of modules that are still uninitialised the first are named.
    """
    if _scripted(model):
        raise ModelError(
            f"{type(model).__name__} is TorchScript, of which no call can be seen. Give the Python model, "
            "and script it after training."
        )
    lazy = [
        name for name, parameter in [*model.named_parameters(), *model.named_buffers()] if is_lazy(parameter)
    ]
    if lazy:
        raise ModelError(
            f"{type(model).__name__} has lazy modules whose parameters have no shape yet "
            f"({shorten(lazy, 5)}). Run one real batch through the model first, so that they take their "
            "shapes, then ask again."
        )


def parameters_in(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of modules, but not of those in them, each once."""
    return list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))


def buffers_in(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the buffers of modules, but not of those in them, each once."""
    return list(dict.fromkeys(b for m in modules for b in m._buffers.values() if b is not None))


class Before:
    """What a forward pass could change in a model, as it is now; see `untouched`.

    Args:
        model: to be put back.

    Attributes:
        is_lasting: it can be put back more than once: no iterator was found, which a pass uses up.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._kept = Snapshot([*(module for module in modules if not _scripted(module)), *global_hooks()])
        self._contents = [(parameter, parameter.detach()) for parameter in parameters_in(modules)]
        self.is_lasting = not self._kept.has_stand_ins

    def put_back(self) -> None:
        """Put everything back."""
        self._kept.restore()
        for parameter, content in self._contents:
            if was_replaced(parameter, content):
                parameter.data = content


@contextlib.contextmanager
def untouched(model: nn.Module, before: Before | None = None) -> Iterator[None]:
    """Put everything back at the end that a forward pass could have changed in `model`.

    Covers each module's attributes (mode, cached tensors, hooks, buffers that were replaced by others), those
    of its class, and what they hold (`layerwise.layers.snapshot`), what forward hooks write to, parameters
    whose ``data`` was replaced, the weights that `torch.nn.utils.parametrize.cached` and autocast keep, and
    the random state of Python, numpy, torch and its CUDA devices. Does not cover writes into a tensor's
    memory: the recorder undoes those.

    Args:
        model: whose.
        before: the model as it is now, if that is known.
    """
    before = Before(model) if before is None else before
    parametrized, parametrize._cache = parametrize._cache, {}
    try:
        with _no_autocast_cache(), kept_random_state():
            yield
    finally:
        parametrize._cache = parametrized
        before.put_back()


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Within: autocast does not remember the weights that it casts, even if the model itself enters it.

    It would hand the fake ones of a recording, or those cast without gradients, to the next real forward.
    """
    before, switch = torch.is_autocast_cache_enabled(), torch.set_autocast_cache_enabled
    switch(False)
    torch.set_autocast_cache_enabled = lambda enabled: None  # what entering autocast calls
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled = switch
        switch(before)


def was_replaced(parameter: torch.Tensor, content: torch.Tensor) -> bool:
    """Return whether a parameter holds other memory than `content`, its ``detach()`` from before."""
    if parameter.device != content.device or parameter.shape != content.shape:
        return True
    try:
        return parameter.device.type != "meta" and parameter.data_ptr() != content.data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses without memory of their own (DTensor)
        return False


@contextlib.contextmanager
def plain_execution(model: nn.Module) -> Iterator[None]:
    """Within `untouched`: make the forward pass the plain one that a recording can see through.

    Switches off, for the time being: compiled calls inside the model, the hooks by which torch's
    distributed wrappers gather parameters, and the fused "fast path" of ``nn.TransformerEncoderLayer``,
    which would hide a whole layer in one operation.
    """
    for module in model.modules():
        if _scripted(module):
            continue
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle, hook in list(hooks.items()):
                if _of_distributed(hook):
                    del hooks[handle]  # `untouched` holds a copy
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within: compiled functions run as they are written; ``flex_attention`` compiles one by itself."""
    can_exist = any(name in sys.modules for name in _COMPILING)  # to import them takes a second
    with torch.compiler.set_stance("force_eager") if can_exist else contextlib.nullcontext():
        yield


def fill_meta_tensors(model: nn.Module) -> None:
    """Within `untouched`: put random tensors on the CPU in the place of those on meta.

    For a forward pass whose branches depend on computed values. Matrices are drawn from a generator of
    their own with a spread of 1 / sqrt(inputs), as a new layer's; vectors and buffers are ones (scales and
    running variances), integers zero. `untouched` puts the meta tensors back.
    """
    generator = torch.Generator().manual_seed(0)
    filled: dict[int, torch.Tensor] = {}

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            new = torch.ones_like(new)
            if tensor.ndim > 1:
                new = new.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(new, requires_grad=tensor.requires_grad)
        return new

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in filled:
                        filled[id(tensor)] = fill(tensor)
                    tensors[name] = filled[id(tensor)]  # type: ignore[assignment]


def _scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _of_distributed(hook: Any) -> bool:
    return home(getattr(hook, "func", hook)).startswith("torch.distributed.")  # func: of a partial function
