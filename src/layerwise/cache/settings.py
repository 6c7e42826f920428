"""`Settings`: notice that a model computes something else now, though no parameter and no mode changed.

A temperature that follows a schedule, an adapter's scale, another activation, a hook that was added, a domain
that is chosen before each batch: attributes of modules decide what a forward pass does. They are compared at
every batch, those of torch's own layers at every epoch. Where nothing changed that costs next to nothing:
dictionaries are compared with copies of them, in which all values are the same objects.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_SENTINELS = 2  # tensors whose content is compared
_DEPTH = 2  # containers in containers
_LARGE = 1000  # items: longer containers are data
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_APART = frozenset(vars(nn.Module()))  # looked at apart, or of no effect on a forward pass

_Saved = list[tuple[Any, Any]]  # containers, and copies of them
_Key = tuple[int, str]  # number of a module, name of an attribute


class Settings:
    """The attributes of a model's modules, children and hooks included, as a small number.

    Args:
        model: whose modules.

    Attributes:
        last: the number when it was last looked at.
        new: how many combinations of attributes were met for the first time, but for epochs that had
            at most one: a schedule.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._numbers: dict[Any, int] = {}
        self._moving: set[_Key] = set()  # changed by the forward pass itself
        self.last = self.new = 0
        self._modules: list[nn.Module] = []
        self._saved: _Saved = []
        self._handle = -1  # number of the latest hook of all modules
        self.refresh()

    def refresh(self) -> None:
        """Look again which modules there are, torch's own included; once an epoch, as it takes a while."""
        modules = [m for m in self._model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        if self.new <= 1:  # one an epoch is a schedule
            self.new = 0
        if modules != self._modules or not self._is_same(self._saved):
            self._modules = modules
            self._save()

    def number(self) -> int:
        """Return a number: another one for other attributes, and the same again when they are back."""
        if not self._is_same(self._watched):
            self._save()
        return self.last

    def before_forward(self) -> None:
        """Remember the attributes as they are before a forward pass of the loop."""
        self._before = self._attributes()

    def after_forward(self) -> None:
        """Leave out from now on what the forward pass itself changed: `layerwise.layers.memory` judges it."""
        now = self._attributes()
        self._moving |= {key for key, value in self._before.items() if now.get(key, value) != value}
        self._moving |= now.keys() - self._before.keys()
        self._save(self.last)

    def _is_same(self, saved: _Saved) -> bool:
        for now, before in saved:
            before["training"] = now["training"]  # `CutBook.state` looks at the modes
        try:
            return (
                all([now == before for now, before in saved])
                and all([now == before for now, before in self._contents])
                and all([tensor._version == version for tensor, version in self._tensors])
                and self._has_same_hooks()
            )
        except (RuntimeError, ValueError, TypeError):  # two different tensors cannot be compared: they differ
            return False

    def _has_same_hooks(self) -> bool:
        if not self._hook_count and RemovableHandle.next_id == self._handle:
            return True  # none was there, and nobody made one
        self._handle = RemovableHandle.next_id
        return sum(map(len, self._hooks)) == self._hook_count

    def _save(self, number: int | None = None) -> None:
        """Take the attributes as they are now; they get `number`, if they were not met before."""
        self._saved = [(vars(module), dict(vars(module))) for module in self._modules]
        self._watched = [
            saved for saved, module in zip(self._saved, self._modules) if not _is_of_torch(module)
        ]
        self._contents: _Saved = []
        self._tensors: list[tuple[torch.Tensor, int]] = []
        self._hooks = [h for m in self._modules[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_count, self._handle = sum(map(len, self._hooks)), RemovableHandle.next_id
        looked_into: set[int] = set()
        for module in self._modules:
            self._contents += [(d, dict(d)) for d in (module._modules, module._parameters) if d]
            for name, value in vars(module).items():
                if name in _APART or id(value) in looked_into:
                    continue
                looked_into.add(id(value))
                if isinstance(value, torch.Tensor) and not value.requires_grad:
                    self._tensors.append((value, value._version))
                elif isinstance(value, dict | list | set | deque) and 0 < len(value) <= _LARGE:
                    self._contents.append((value, value.copy()))
                elif _is_object(value):
                    self._contents.append((vars(value), dict(vars(value))))
        state = self._attributes()
        for key in self._moving & state.keys():
            del state[key]
        known = tuple(sorted(state.items()))
        if known not in self._numbers:
            self._numbers[known] = len(self._numbers) if number is None else number
            self.new += number is None
        self.last = self._numbers[known]

    def _attributes(self) -> dict[_Key, Any]:
        """Return what each attribute is, by value or identity, so that it can be compared and hashed."""
        found: dict[_Key, Any] = {}
        for number, module in enumerate(self._modules):
            for name, value in vars(module).items():
                if name not in _APART and not _is_ours(value):
                    found[number, name] = _known(value)
            found[number, "_modules"] = tuple(map(id, module._modules.values()))
            found[number, "_parameters"] = tuple(map(id, module._parameters.values()))
            if number:
                hooks = (*module._forward_hooks, -1, *module._forward_pre_hooks)
                found[number, "_forward_hooks"] = hooks
        return found


class Stillness:
    """Tells cheaply that frozen weights move while an epoch runs, as a momentum encoder's do.

    Autograd's version counters show most ways of writing; the content of a few small tensors shows the others
    (``p.data.mul_``, ``p.data = ...``), as what moves the weights moves all of them.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._versions = [(p, p._version) for p in parameters if not p.requires_grad]
        small = sorted((p for p, _ in self._versions if p.numel()), key=torch.Tensor.numel)[:_SENTINELS]
        self._contents = [(p, p.detach().clone()) for p in small]

    def holds(self) -> bool:
        """Return whether no weight that is frozen now has changed since."""
        return all([p._version == version or p.requires_grad for p, version in self._versions]) and all(
            [torch.equal(p, content) or p.requires_grad for p, content in self._contents]
        )


def _known(value: Any, depth: int = 0) -> str:
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        learns = value.requires_grad  # what reads it is never skipped
        return f"tensor {id(value)} {'learns' if learns else value._version}"
    if depth < _DEPTH and isinstance(value, dict) and len(value) <= _LARGE:
        return str([f"{name!r}: {_known(item, depth + 1)}" for name, item in value.items()])
    if depth < _DEPTH and isinstance(value, list | tuple | set | deque) and len(value) <= _LARGE:
        return f"{type(value).__name__} {[_known(item, depth + 1) for item in value]}"
    if depth == 0 and _is_object(value):
        return f"{id(value)} {_known(vars(value), 1)}"
    return f"{type(value).__name__} {id(value)}"


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a layer is one of torch's: nobody changes a stride from batch to batch."""
    return type(module).__module__.startswith("torch.nn.")


def _is_ours(value: Any) -> bool:
    """Whether layerwise put it there: what pins a frozen module's mode, which `CutBook.state` looks at."""
    return callable(value) and str(getattr(value, "__module__", type(value).__module__)).startswith(
        "layerwise."
    )


def _is_object(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module | torch.Tensor | type)
        and not callable(value)
    )
