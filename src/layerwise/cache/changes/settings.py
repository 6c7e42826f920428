"""`Settings`: notice that a model computes something else now, though no parameter and no mode changed.

A temperature that follows a schedule, an adapter's scale, another activation, a hook that was added, a domain
that is chosen before each batch: attributes and buffers of modules decide what a forward pass does, and so
do attributes of their classes, and what is in containers and objects that they hold. They are compared at
every batch, those of torch's own layers, what a class declares constant, its methods, and the numbers of
large arrays and tensors at every epoch. Where nothing changed that costs next to nothing: lists of objects
are compared, all of them the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from layerwise.cache.changes.fingerprint import checksum
from layerwise.errors import shorten
from layerwise.layers.forms import is_plain, shape_of
from layerwise.layers.holding import (
    CONTAINERS,
    DEPTH,
    LARGE,
    LEAVES,
    OF_EVERY_MODULE,
    SCALARS,
    attributes_of,
    class_attributes,
    classes_held,
    classes_of,
    held,
    home,
    is_fleeting,
    is_object,
    told,
)
from layerwise.layers.isolation import buffers_in, parameters_in
from layerwise.layers.look import Look
from layerwise.layers.memory import GLOBAL_HOOKS

_TINY = 16  # numbers: a tensor or an array of so many is compared by content, as a number is

_FUNCTIONS = (FunctionType, staticmethod, classmethod, property)

_NOTHING = repr(None)

_Key = tuple[int, str]  # number of a module, or -1 - that of a class; name of an attribute
_Owner = Mapping[str, Any]
_Memo = dict[tuple[int, int], tuple[str, Any]]  # identity of a value, how deep it is -> what it is; the value


class Settings:
    """The attributes of a model's modules, buffers, children and hooks included, as a small number.

    Statistics of batch-norms are left out: a forward pass writes them, and `ModelState` knows the modes.

    Args:
        modules: of the model, itself first.

    Attributes:
        last: the number when it was last looked at.
        new: how many combinations of attributes were met for the first time, but for epochs that had
            at most one: a schedule.
        changed: what made the latest of them, for people.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._numbers: dict[Any, int] = {}
        self._kept: list[_Memo] = []  # what is known by its identity must not give it to another object
        self._moving: set[_Key] = set()  # changed by the forward pass itself
        self._completed: set[_Key] = set()  # changed by it once
        self._remembering: set[nn.Module] | None = None  # not known
        self._keeping: set[tuple[nn.Module, str]] = set()
        self.last = self.new = 0
        self.changed = ""
        self._latest: dict[_Key, Any] = {}
        self._hidden: list[nn.Module] = []  # in lists and objects: not among the model's modules
        self._handle: int  # number of the latest hook of all modules
        self._modules = _unscripted(modules)
        self._save()

    def refresh(self, modules: Iterable[nn.Module]) -> None:
        """Look again which modules there are, torch's own included; once an epoch, as it takes a while.

        Args:
            modules: of the model, itself first.
        """
        modules = _unscripted(modules)
        if self.new <= 1:  # one an epoch is a schedule
            self.new = 0
        if modules != self._modules or not self._at_epochs.is_same():
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
        """Leave out from now on what the forward pass itself changed: `layerwise.layers.memory` judges it.

        What changed for the first time is still watched, as a first pass may complete a configuration that
        the loop changes later. So is a table that a module made for itself. It may be made anew, for a longer
        text, and then what was computed with the former one is worth nothing.
        """
        changed = {key for key, value in self._attributes().items() if self._before.get(key) != value}
        tables = set(filter(self._is_table, changed))
        self._moving |= changed & self._completed - tables
        self._completed |= changed
        made_anew = any(self._before.get(key, _NOTHING) != _NOTHING for key in tables)
        self._save(None if made_anew else self.last)

    def remembers(self, modules: Iterable[nn.Module], keeping: Mapping[nn.Module, Iterable[str]]) -> None:
        """Note modules that keep something of each batch.

        Args:
            modules: `Recording.remembering`.
            keeping: `Recording.keeping`.
        """
        self._remembering = (self._remembering or set()) | set(modules)
        self._keeping |= {(module, name) for module, names in keeping.items() for name in names}

    def _is_table(self, key: _Key) -> bool:
        """Whether an attribute that a forward pass changed is now a tensor that is not of the batch."""
        index, name = key
        if index < 0 or self._remembering is None or self._modules[index] in self._remembering:
            return False
        if (self._modules[index], name) in self._keeping:
            return False
        value, before = vars(self._modules[index]).get(name), self._before.get(key, _NOTHING)
        is_tensor = isinstance(value, torch.Tensor) and not value.requires_grad and _is_readable(value)
        return is_tensor and (before == _NOTHING or before.startswith("torch."))

    def _is_same(self) -> bool:
        return self._at_batches.is_same() and self._has_same_hooks()

    def _has_same_hooks(self) -> bool:
        if list(chain.from_iterable(self._hooked)) != self._hooks:
            return False
        if RemovableHandle.next_id == self._handle:
            return True  # nobody made one
        self._handle = RemovableHandle.next_id
        return sum(map(len, self._hookable)) == len(self._hooks)

    def _save(self, number: int | None = None) -> None:
        """Take the attributes as they are now; they get `number`, if they were not met before."""
        self._at_batches, self._at_epochs = Look(), Look()
        self._classes = list(dict.fromkeys([*classes_of(self._modules), *classes_held(self._modules)]))
        tables = [h for m in self._modules[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hookable = [*tables, *GLOBAL_HOOKS]
        self._hooked = [hooks for hooks in self._hookable if hooks]
        self._hooks, self._handle = list(chain.from_iterable(self._hooked)), RemovableHandle.next_id
        self._hidden, seen = [], dict.fromkeys(map(id, self._modules), 0)
        for module in self._modules:
            look = self._at_epochs if _is_of_torch(module) else self._at_batches
            if module is self._modules[0]:  # `RootHook` hangs something on the model itself
                look.at_told(_own_length, vars(module))
            else:
                look.at_length(vars(module))
            look.at_length(module._buffers)
            self._at_batches.at_tables(module)
        for kind in self._classes:
            self._at_batches.at_length(vars(kind))
        for owner, name, key in self._items():
            if key not in self._moving and not _is_ours(owner[name]):
                (self._at_epochs if self._is_constant(key) else self._at_batches).at_item(owner, name)
                self._look_into(owner[name], seen)
        for _, tell, thing in self._aspects():
            self._at_epochs.at_told(tell, thing)
        memo: _Memo = {}
        state = {key: value for key, value in self._attributes(memo).items() if key not in self._moving}
        known = tuple(sorted(state.items()))
        if known not in self._numbers:
            self._numbers[known] = len(self._numbers) if number is None else number
            self.new += number is None
            self.changed = self._named(state)
            self._kept.append(memo)
        self.last, self._latest = self._numbers[known], state

    def _named(self, state: Mapping[_Key, Any]) -> str:
        """Return which attributes are not what they were when they were last taken."""
        owners = [*map(type, (*self._modules, *self._hidden[::-1])), *self._classes[::-1]]
        changed = (key for key, value in state.items() if self._latest.get(key) != value)
        names = (f"{name.removeprefix('_buffers.')} of {owners[at].__name__}" for at, name in changed)
        return shorten(dict.fromkeys(names))

    def _is_constant(self, key: _Key) -> bool:
        """Whether nobody changes an attribute from batch to batch."""
        index, name = key
        if index < 0:
            return False
        module = self._modules[index]
        return _is_of_torch(module) or name in getattr(module, "__constants__", ())

    def _look_into(self, value: Any, seen: dict[int, int], depth: int = 0) -> None:
        """Have what an attribute holds compared; `seen` says how deep down a thing was already met."""
        if isinstance(value, FunctionType):
            self._at_epochs.at_told(_code_of, value)
        if type(value) in LEAVES or seen.get(id(value), DEPTH + 1) <= depth:
            return
        seen[id(value)] = depth
        if isinstance(value, nn.Module):
            self._hidden.append(value)
        elif isinstance(value, torch.Tensor):
            if not value.requires_grad:  # what reads such a one is never skipped
                self._at_batches.at_version(value)
                if _is_tiny(value):
                    self._at_batches.at_content(value)
                elif _is_readable(value):
                    self._at_epochs.at_told(checksum, value)
        elif isinstance(value, np.ndarray):
            (self._at_batches if value.size <= _TINY else self._at_epochs).at_told(told, value)
        elif not is_fleeting(value):
            self._at_batches.at_content_of(value)
            for item in held(value):
                self._look_into(item, seen, depth + 1)

    def _items(self) -> Iterator[tuple[_Owner, str, _Key]]:
        """Yield each attribute and buffer: what holds it, its name there, its key."""
        for index, module in enumerate(self._modules):
            yield from _items(index, module)
        for index, kind in enumerate(self._classes):
            for name in class_attributes(kind):
                yield vars(kind), name, (-1 - index, name)

    def _attributes(self, memo: _Memo | None = None) -> dict[_Key, Any]:
        """Return what each attribute is, by value or identity, so that it can be compared and hashed."""
        memo = {} if memo is None else memo
        found: dict[_Key, Any] = {
            key: _known(owner[name], memo) for owner, name, key in self._items() if not _is_ours(owner[name])
        }
        for index, module in enumerate(self._modules):
            found[index, "_modules"] = tuple(map(id, module._modules.values()))
            found[index, "_parameters"] = tuple(map(id, module._parameters.values()))
            hooks = (module._forward_hooks, module._forward_pre_hooks) if index else GLOBAL_HOOKS
            found[index, "_forward_hooks"] = (*hooks[0], -1, *hooks[1])
        return found | {key: tell(thing) for key, tell, thing in self._aspects()}

    def _aspects(self) -> Iterator[tuple[_Key, Callable[[Any], Any], Any]]:
        """Yield what is told of modules and classes besides their attributes: key, function, its argument."""
        for index, module in enumerate(self._modules):
            yield (index, "__class__"), _kind, module
            yield (index, "current_epoch"), _epoch_of, module
        for number, module in enumerate(self._hidden):
            yield (-1 - len(self._classes) - number, "hidden"), self._state_of, module
        for index, kind in enumerate(self._classes):
            yield (-1 - index, "__dict__"), _functions, kind

    def _state_of(self, hidden: nn.Module) -> str:
        """Return a hidden module's epoch, modes in it, and who learns of its tensors or their checksums."""
        others = set(self._modules)
        own = [module for module in hidden.modules() if module not in others]
        tensors = (*parameters_in(own), *buffers_in(own))
        sums = [None if t.requires_grad or not _is_readable(t) else checksum(t) for t in tensors]
        return f"{_epoch_of(hidden)} {[module.training for module in own]} {sums}"


def _unscripted(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]


def _items(index: int, module: nn.Module) -> Iterator[tuple[_Owner, str, _Key]]:
    """Yield each attribute and buffer of a module: the dictionary that holds it, its name there, its key."""
    for name in vars(module):
        if name not in OF_EVERY_MODULE:
            yield vars(module), name, (index, name)
    if not isinstance(module, _NormBase):
        for name in module._buffers:
            yield module._buffers, name, (index, f"_buffers.{name}")


def _known(value: Any, memo: _Memo, depth: int = 0) -> str:
    """Return what a value is: numbers and texts, in containers and objects too; of all else, which one."""
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, torch.Tensor):
        if value.requires_grad or not _is_readable(value):  # what reads the former is never skipped
            return f"tensor {id(value)}"
        return f"{value.dtype} {shape_of(value)} {checksum(value)}"
    if isinstance(value, np.ndarray):
        return f"array {hash(told(value))}"
    if is_fleeting(value):
        return type(value).__name__  # what uses it is never skipped
    key = id(value), depth
    if key not in memo:
        memo[key] = _inside(value, memo, depth), value
    return memo[key][0]


def _inside(value: Any, memo: _Memo, depth: int) -> str:
    name = type(value).__name__
    if isinstance(value, FunctionType):
        return f"{name} {id(value)} {hash(_code_of(value))}"
    if isinstance(value, MethodType):
        return f"{name} {value.__name__} {_known(value.__self__, memo, depth + 1)}"
    if depth > DEPTH or (isinstance(value, CONTAINERS) and len(value) > LARGE):
        return f"{name} {id(value)}"
    items: Mapping[Any, Any]
    if isinstance(value, dict):
        items = value
    elif isinstance(value, CONTAINERS):
        return f"{name} {[_known(item, memo, depth + 1) for item in value]}"
    elif is_object(value):
        name, items = f"{name} {id(value)}", attributes_of(value)
    else:
        return f"{name} {id(value)}"
    return f"{name} {[f'{key!r}: {_known(item, memo, depth + 1)}' for key, item in items.items()]}"


def _code_of(function: Any) -> tuple[Any, ...]:
    """Return what a notebook's autoreload writes anew where the source of a function changed."""
    function = getattr(function, "__func__", None) or getattr(function, "fget", None) or function
    defaults = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__")]
    return getattr(function, "__code__", None), repr(defaults)


def _functions(kind: type) -> tuple[Any, ...]:
    """Return the functions of a class, with what they do."""
    return tuple((item, _code_of(item)) for item in vars(kind).values() if isinstance(item, _FUNCTIONS))


def _kind(module: nn.Module) -> Any:
    """Return a module's class with what it does, as torch's own are not looked into."""
    return type(module), type(module).forward


def _own_length(attributes: Mapping[str, Any]) -> int:
    return len(attributes) - ("_call_impl" in attributes)


def _is_tiny(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a number or a few, at hand: reading one from a device would wait for the device."""
    return is_plain(tensor) and tensor.numel() <= _TINY and tensor.device.type == "cpu"


def _is_readable(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta"


def _is_of_torch(module: nn.Module) -> bool:
    """Whether a layer is one of torch's: nobody changes a stride from batch to batch."""
    return type(module).__module__.startswith("torch.nn.")


def _epoch_of(module: nn.Module) -> Any:
    """Return the epoch of which a module of Lightning's learns from its trainer; None of all others."""
    return getattr(vars(module).get("_trainer"), "current_epoch", None)


def _is_ours(value: Any) -> bool:
    """Whether layerwise put it there: what pins a frozen module's mode, which `ModelState` looks at."""
    return callable(value) and home(value).startswith("layerwise.")
