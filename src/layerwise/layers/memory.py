"""Find modules that carry something over from one forward pass to the next: counters, queues, averages.

What such a module computes depends on how often it was called before, so it cannot be computed once. Writes
into a tensor's memory are seen by the recorder; here it is about attributes that get another value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_OURS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters"})


class Attributes:
    """The attributes of a model's modules, as they are before a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (module, {name: _content(value) for name, value in vars(module).items() if name not in _OURS})
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def changed(self, was_read: Callable[[torch.Tensor], bool]) -> dict[nn.Module, str]:
        """Return the modules that remember something of the pass -> the attribute.

        These are numbers and texts that changed, buffers that were replaced by other tensors, and other
        tensors that were read and then replaced. Lists, dictionaries and sets are looked into, one level
        deep. An attribute that was None before, or had another type, is taken for something that is made
        once and kept; a tensor that is only stored, for a feature that somebody may look at.

        Args:
            was_read: whether an operation of the pass read a tensor.
        """
        found = {}
        for module, before in self._before:
            now = vars(module)
            for name, old in before.items():
                if name in now and _differs(old, _content(now[name]), was_read, name == "_buffers"):
                    found[module] = name if name != "_buffers" else _replaced(old, module._buffers)
                    break
        return found


def _content(value: Any) -> Any:
    """Return what is compared of an attribute: itself, or a container's items."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list | set) else value


def _differs(old: Any, new: Any, was_read: Callable[[torch.Tensor], bool], is_buffer: bool) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return old is not new and (is_buffer or was_read(old))
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        return any(_differs(old[name], new[name], was_read, is_buffer) for name in old.keys() & new.keys())
    if isinstance(old, list):
        pairs = zip(old, new)
        return bool(old) and (
            len(old) != len(new) or any(_differs(one, other, was_read, is_buffer) for one, other in pairs)
        )
    return isinstance(old, int | float | complex | str) and old != new


def _replaced(old: dict[str, Any], new: dict[str, Any]) -> str:
    return next(name for name, tensor in old.items() if tensor is not None and new.get(name) is not tensor)
