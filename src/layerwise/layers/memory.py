"""Find modules that carry something over from one forward pass to the next: counters, queues, averages.

What such a module computes depends on how often it was called before, and a value that it keeps may be read
by whoever trains it, so it cannot be computed once. Writes into a tensor's memory are seen by the recorder;
here it is about attributes that get another value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_OURS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters"})
_LIBRARIES = ("torch.", "layerwise.")  # their hooks do what the recording sees, or are the recording's own

_COLLECTS = "transformers.utils.output_capturing"  # hooks that keep outputs for `output_hidden_states=True`

Test = Callable[[torch.Tensor], bool]


class Attributes:
    """The attributes of a model's modules, as they are before a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._looked_into: dict[int, Any] = {}  # objects that many modules share, such as a configuration
        self._before = [
            (module, {name: self._content(v) for name, v in vars(module).items() if name not in _OURS})
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def changed(self, was_read: Test, of_batch: Test) -> dict[nn.Module, str]:
        """Return the modules that remember something of the pass -> the attribute.

        These are numbers and texts that changed, containers that grew by such or by values of the batch,
        values of the batch that are kept, buffers that were replaced by other tensors, and other tensors that
        were read and then replaced. Containers and plain objects are looked into, one level deep. What was
        None before and is made of weights alone is taken for something that is made once and kept.

        Args:
            was_read: whether an operation of the pass read a tensor.
            of_batch: whether a tensor was computed from the pass's input.
        """
        self._looked_into.clear()
        found = {}
        for module, before in self._before:
            now = vars(module)
            for name in now.keys() - _OURS:
                old, new = before.get(name), self._content(now[name])
                if name == "_buffers" and isinstance(old, dict):
                    replaced = [
                        n for n, buffer in old.items() if buffer is not None and new.get(n) is not buffer
                    ]
                    if replaced:
                        found[module] = replaced[0]
                elif _differs(old, new, was_read, of_batch):
                    found[module] = name
        return found

    def _content(self, value: Any) -> Any:
        """Return what is compared of an attribute: itself, or a copy of what a container or object holds."""
        if isinstance(value, dict):
            return dict(value)
        if isinstance(value, list | tuple | set | deque):
            return list(value)
        if (
            not hasattr(value, "__dict__")
            or isinstance(value, nn.Module | torch.Tensor | type)
            or callable(value)
        ):
            return value
        if id(value) not in self._looked_into:
            self._looked_into[id(value)] = dict(vars(value))
        return self._looked_into[id(value)]


def _differs(old: Any, new: Any, was_read: Test, of_batch: Test) -> bool:
    if isinstance(new, torch.Tensor):
        return old is not new and (of_batch(new) or (isinstance(old, torch.Tensor) and was_read(old)))
    if isinstance(new, dict):
        names = old if isinstance(old, dict) else {}
        return any(
            _differs(names[name], item, was_read, of_batch) if name in names else _is_news(item, of_batch)
            for name, item in new.items()
        )
    if isinstance(new, list):
        items = old if isinstance(old, list) else []
        return (
            len(items) > len(new)
            or any(_is_news(item, of_batch) for item in new[len(items) :])
            or any(_differs(one, other, was_read, of_batch) for one, other in zip(items, new))
        )
    return isinstance(old, int | float | complex | str) and type(old) is type(new) and old != new


def _is_news(item: Any, of_batch: Test) -> bool:
    """Whether something new in a container tells of the pass: a value of the batch."""
    return of_batch(item) if isinstance(item, torch.Tensor) else False


def watched(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules inside a model that carry a hook of the user's -> the hook's name.

    The hook must see the real call: it may keep what it sees, or change it.
    """
    found = {}
    for module in model.modules():
        if module is model or isinstance(module, torch.jit.ScriptModule):
            continue
        hooks: Iterable[Any] = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        for hook in hooks:
            home, name = _origin(hook)
            if home != _COLLECTS and not f"{home}.".startswith(_LIBRARIES):
                found[module] = name
    return found


def collectors(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks by which transformers collects what a module returns, ``hook(module, args, output)``.

    They stay on the modules for good once a model was asked for its hidden states.
    """
    return [hook for hook in module._forward_hooks.values() if _origin(hook)[0] == _COLLECTS]


def collects_below(module: nn.Module) -> bool:
    """Whether what such hooks of the modules inside collect becomes part of what this module returns."""
    return "_output_capturing_hooks_installed" in vars(module)


def _origin(hook: Any) -> tuple[str, str]:
    """Return the module that defines a hook, and its name."""
    function = getattr(hook, "func", hook)  # functools.partial
    home = getattr(function, "__module__", None) or type(function).__module__
    return home, getattr(function, "__qualname__", type(function).__name__)
