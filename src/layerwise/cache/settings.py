"""`Settings`: notice that a model computes something else now, though no parameter and no mode changed.

A temperature that follows a schedule, an adapter's scale, another activation, a hook that was added, a domain
that is chosen before each batch: attributes and buffers of modules decide what a forward pass does. They are
compared at every batch, those of torch's own layers and what a class declares constant at every epoch. Where
nothing changed that costs next to nothing: lists of objects are compared, all of them the same ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import getitem
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from layerwise.cache.fingerprint import checksum

_SENTINELS = 2  # tensors whose content is compared
_TINY = 16  # numbers: a tensor of so many is compared by content, as a number is
_DEPTH = 2  # containers in containers
_LARGE = 1000  # items: longer containers are data
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_APART = frozenset(vars(nn.Module()))  # looked at apart, or of no effect on a forward pass

_Key = tuple[int, str]  # number of a module, name of an attribute


class Settings:
    """The attributes of a model's modules, buffers, children and hooks included, as a small number.

    Statistics of batch-norms are left out: a forward pass writes them, and `CutBook` knows the modes.

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
        self._at_batches, self._at_epochs = _Look(), _Look()
        self._handle = -1  # number of the latest hook of all modules
        self.refresh()

    def refresh(self) -> None:
        """Look again which modules there are, torch's own included; once an epoch, as it takes a while."""
        modules = [m for m in self._model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        if self.new <= 1:  # one an epoch is a schedule
            self.new = 0
        if modules != self._modules or not (self._is_same() and self._at_epochs.is_same()):
            self._modules = modules
            self._save()

    def number(self) -> int:
        """Return a number: another one for other attributes, and the same again when they are back."""
        if not self._is_same():
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

    def _is_same(self) -> bool:
        return self._at_batches.is_same() and self._has_same_hooks()

    def _has_same_hooks(self) -> bool:
        if not self._hook_count and RemovableHandle.next_id == self._handle:
            return True  # none was there, and nobody made one
        self._handle = RemovableHandle.next_id
        return sum(map(len, self._hooks)) == self._hook_count

    def _save(self, number: int | None = None) -> None:
        """Take the attributes as they are now; they get `number`, if they were not met before."""
        self._at_batches, self._at_epochs = _Look(), _Look()
        self._hooks = [h for m in self._modules[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_count, self._handle = sum(map(len, self._hooks)), RemovableHandle.next_id
        for index, module in enumerate(self._modules):
            of_torch = _is_of_torch(module)
            (self._at_epochs if of_torch else self._at_batches).at_length(vars(module))
            constants = frozenset(getattr(module, "__constants__", ()))
            for owner, name, key in _items(index, module):
                if key not in self._moving:
                    look = self._at_epochs if of_torch or name in constants else self._at_batches
                    look.at_item(owner, name)
                    self._at_batches.into(owner[name])
            self._at_batches.at_tables(module)
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
        for index, module in enumerate(self._modules):
            for owner, name, key in _items(index, module):
                if not _is_ours(owner[name]):
                    found[key] = _known(owner[name])
            found[index, "_modules"] = tuple(map(id, module._modules.values()))
            found[index, "_parameters"] = tuple(map(id, module._parameters.values()))
            if index:
                hooks = (*module._forward_hooks, -1, *module._forward_pre_hooks)
                found[index, "_forward_hooks"] = hooks
        return found


class _Look:
    """Objects to be compared with what they are now, in lists, which is the fastest way."""

    def __init__(self) -> None:
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._dicts: list[dict[str, Any]] = []
        self._lengths: list[int] = []
        self._tables: list[dict[str, Any]] = []
        self._entries: list[Any] = []
        self._containers: list[tuple[Any, Any]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._contents: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._seen: set[int] = set()

    def at_item(self, owner: dict[str, Any], name: str) -> None:
        """Look whether an item of a dictionary is the same object."""
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(owner[name])

    def at_length(self, attributes: dict[str, Any]) -> None:
        """Look whether a dictionary has more or fewer items."""
        self._dicts.append(attributes)
        self._lengths.append(len(attributes))

    def at_tables(self, module: nn.Module) -> None:
        """Look whether a module's children and parameters are the same objects."""
        for table in (module._modules, module._parameters):
            if table:
                self._tables.append(table)
                self._entries += table.values()

    def into(self, value: Any) -> None:
        """Look at what an attribute holds."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.requires_grad or value.is_inference():  # the latter have no version
                return
            self._versions.append((value, value._version))
            if _is_tiny(value):
                self._contents.append((value, value.clone()))
        elif isinstance(value, dict | list | set | deque) and 0 < len(value) <= _LARGE:
            self._containers.append((value, value.copy()))
        elif _is_object(value):
            self._containers.append((vars(value), dict(vars(value))))

    def is_same(self) -> bool:
        """Return whether nothing of all that has changed."""
        try:
            return (
                list(map(getitem, self._owners, self._names)) == self._values
                and list(map(len, self._dicts)) == self._lengths
                and list(chain.from_iterable(map(dict.values, self._tables))) == self._entries
                and all([now == before for now, before in self._containers])
                and all([tensor._version == version for tensor, version in self._versions])
                and all([torch.equal(now, before) for now, before in self._contents])
            )
        except (KeyError, RuntimeError, ValueError, TypeError):  # two tensors cannot be compared: they differ
            return False


class Stillness:
    """Tells cheaply that frozen weights move while an epoch runs, as a momentum encoder's do.

    Autograd's version counters show most ways of writing; the content of a few small tensors shows the others
    (``p.data.mul_``, ``p.data = ...``), as what moves the weights moves all of them.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._frozen = [p for p in parameters if not p.requires_grad]
        self._versions = [p._version for p in self._frozen]
        small = sorted((p for p in self._frozen if p.numel()), key=torch.Tensor.numel)[:_SENTINELS]
        self._contents = [(p, p.detach().clone()) for p in small]

    def holds(self) -> bool:
        """Return whether no weight that was frozen has changed since."""
        return [p._version for p in self._frozen] == self._versions and all(
            [torch.equal(p, content) for p, content in self._contents]
        )


def _items(index: int, module: nn.Module) -> Iterator[tuple[dict[str, Any], str, _Key]]:
    """Yield each attribute and buffer of a module: the dictionary that holds it, its name there, its key."""
    for name in vars(module):
        if name not in _APART:
            yield vars(module), name, (index, name)
    if not isinstance(module, _NormBase):
        for name, buffer in module._buffers.items():
            if buffer is not None:
                yield module._buffers, name, (index, f"_buffers.{name}")


def _known(value: Any, depth: int = 0) -> str:
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        if value.requires_grad or value.layout != torch.strided:  # what reads the former is never skipped
            return f"tensor {id(value)}"
        return f"{value.dtype} {tuple(value.shape)} {checksum(value)}"
    if depth < _DEPTH and isinstance(value, dict) and len(value) <= _LARGE:
        return str([f"{name!r}: {_known(item, depth + 1)}" for name, item in value.items()])
    if depth < _DEPTH and isinstance(value, list | tuple | set | deque) and len(value) <= _LARGE:
        return f"{type(value).__name__} {[_known(item, depth + 1) for item in value]}"
    if depth == 0 and _is_object(value):
        return f"{id(value)} {_known(vars(value), 1)}"
    return f"{type(value).__name__} {id(value)}"


def _is_tiny(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a number or a few, at hand: reading one from a device would wait for the device."""
    return tensor.numel() <= _TINY and tensor.device.type == "cpu" and tensor.layout == torch.strided


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
