"""Find modules that carry something over from one forward pass to the next: counters, queues, averages.

What such a module computes depends on how often it was called before, so it cannot be computed once. Others
only keep a value of the last batch (``self.features = x``), for whoever trains the model. Writes into a
tensor's memory are seen by the recorder; here it is about attributes that get another value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from layerwise.layers.holding import (
    CONTAINERS,
    DEPTH,
    LARGE,
    LEAVES,
    OF_EVERY_MODULE,
    attributes_of,
    class_attributes,
    classes_of,
    home,
    is_fleeting,
    is_object,
    told,
)

_UNREAD = OF_EVERY_MODULE - {"_buffers", "training"}  # of no effect on a forward pass, or recorded
_LIBRARIES = ("torch.", "layerwise.")  # their hooks do what the recording sees, or are the recording's own

_COLLECTS = "transformers.utils.output_capturing."  # hooks that keep outputs for `output_hidden_states=True`

GLOBAL_HOOKS = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
_VALUES = (int, float, complex, str, bytes, np.generic)

Test = Callable[[torch.Tensor], bool]


class Change(IntEnum):
    """What became of an attribute."""

    NONE = 0
    KEPT = 1
    """It holds a value of the batch in the place of another that was not read."""
    GROWN = 2
    """So it does, where nothing was."""
    MOVED = 3
    """It may tell the next forward pass of this one."""


class Attributes:
    """The attributes of a model's modules, as they are before a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._before = self._contents()

    def changes(self, was_read: Test, of_batch: Test) -> dict[nn.Module, dict[str, Change]]:
        """Return the modules that hold something else now -> what became of their attributes.

        These are numbers and texts that changed, arrays, iterators and random generators likewise, containers
        that grew by values of the batch, values of the batch that are kept, buffers that were replaced by
        other tensors, and other tensors that were read and then replaced. Containers and objects are looked
        into, and so are the attributes of a module's class. What was None before and is made of weights alone
        is taken for something that is made once and kept.

        Args:
            was_read: whether an operation of the pass read a tensor.
            of_batch: whether a tensor was computed from the pass's input.
        """
        found: dict[nn.Module, dict[str, Change]] = {}
        for module, before, now in zip(self._modules, self._before, self._contents()):
            changes: dict[str, Change] = {}
            for name, new in now.items():
                old = before.get(name)
                if name == "_buffers" and isinstance(old, dict):
                    replaced = (n for n, one in old.items() if one is not None and new.get(n) is not one)
                    changes |= dict.fromkeys(replaced, Change.MOVED)
                else:
                    changes[name] = _change(old, new, was_read, of_batch)
            if any(changes.values()):
                found[module] = {name: change for name, change in changes.items() if change}
        return found

    def _contents(self) -> list[dict[str, Any]]:
        """Return of each module what its attributes hold, its class's included."""
        known: dict[tuple[int, int], Any] = {}  # objects that many modules share, such as a configuration
        of_class = {kind: class_attributes(kind) for kind in classes_of(self._modules)}
        found = []
        for module in self._modules:
            items = {
                n: v for kind in reversed(type(module).__mro__) for n, v in of_class.get(kind, {}).items()
            }
            items |= vars(module)
            found.append({name: _content(v, known) for name, v in items.items() if name not in _UNREAD})
        return found


def _content(value: Any, known: dict[tuple[int, int], Any], depth: int = 0) -> Any:
    """Return what is compared of an attribute: itself, its state, or a copy of what it holds."""
    if isinstance(value, MethodType):
        value = value.__self__
    if type(value) in LEAVES or isinstance(value, nn.Module | torch.Tensor):
        return value
    key = id(value), depth
    if depth > DEPTH or key in known:
        return known.get(key, value)
    below = DEPTH if isinstance(value, CONTAINERS) and len(value) > LARGE else depth
    if isinstance(value, dict):
        items = value
    elif isinstance(value, CONTAINERS):
        known[key] = [_content(item, known, below + 1) for item in value]
        return known[key]
    elif is_fleeting(value) or isinstance(value, np.ndarray):
        return told(value)
    elif is_object(value):
        items = attributes_of(value)
    else:
        return value
    known[key] = {name: _content(item, known, below + 1) for name, item in items.items()}
    return known[key]


def _change(old: Any, new: Any, was_read: Test, of_batch: Test) -> Change:
    if isinstance(new, torch.Tensor):
        if old is new:
            return Change.NONE
        if isinstance(old, torch.Tensor) and was_read(old):
            return Change.MOVED
        return Change.KEPT if of_batch(new) else Change.NONE
    if isinstance(new, dict):
        names = old if isinstance(old, dict) else {}
        return max(
            (
                _change(names[name], item, was_read, of_batch) if name in names else _growth(item, of_batch)
                for name, item in new.items()
            ),
            default=Change.NONE,
        )
    if isinstance(new, list):
        items = old if isinstance(old, list) else []
        if len(items) > len(new):
            return Change.MOVED
        changes = [_change(one, other, was_read, of_batch) for one, other in zip(items, new)]
        return max(changes + [_growth(item, of_batch) for item in new[len(items) :]], default=Change.NONE)
    moved = isinstance(old, _VALUES) and type(old) is type(new) and old != new
    return Change.MOVED if moved else Change.NONE


def _growth(item: Any, of_batch: Test) -> Change:
    """Return whether something new in a container tells of the pass: a value of the batch."""
    return Change.GROWN if any(map(of_batch, _tensors_in(item))) else Change.NONE


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _tensors_in(item)


def kept_tensors(module: nn.Module, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Yield the tensors that some attributes of a module hold."""
    for name in names:
        yield from _tensors_in(_content(getattr(module, name, None), {}))


def global_hooks() -> list[Any]:
    """Return the hooks that are called with every module of the process."""
    return [hook for hooks in GLOBAL_HOOKS for hook in hooks.values()]


def watched(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules inside a model that carry a hook of the user's -> the hook's name.

    The hook must see the real call: it may keep what it sees, or change it. One that is called with every
    module of the process may watch any of them.
    """
    found = {}
    for module in model.modules():
        if module is model or isinstance(module, torch.jit.ScriptModule):
            continue
        hooks: Iterable[Any] = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        for hook in (*hooks, *global_hooks()):
            origin, name = _origin(hook)
            if origin != _COLLECTS and not origin.startswith(_LIBRARIES):
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
    """Return the home of a hook, and its name."""
    function = getattr(hook, "func", hook)  # functools.partial
    return home(function), getattr(function, "__qualname__", type(function).__name__)
