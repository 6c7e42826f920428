"""`RootHook`: see every call of one model while a loop runs, and vanish from copies and pickles of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Before = Callable[[tuple[Any, ...], dict[str, Any]], Any]
Due = Callable[[Any], None]

RAISED = object()
"""Stands for the output of a call that raised."""


class OnlyHere:
    """A hook that works on one model; deepcopies and pickles of the model carry a dead one."""

    def __init__(self, model: nn.Module | None, function: Any) -> None:
        self.model, self.function = model, function

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Call the function."""
        return self.function(*arguments) if module is self.model else None

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlyHere:
        return OnlyHere(None, None)

    def __reduce__(self) -> Any:
        return OnlyHere, (None, None)


@dataclass
class _Call:
    """What a model's call under way has to do at its end.

    Attributes:
        due: what to call with the output, or with `RAISED`.
        hooks: number of `RootHook` on the model.
    """

    due: list[Due] = field(default_factory=list)
    hooks: int = 0


_CALLS: WeakKeyDictionary[nn.Module, _Call] = WeakKeyDictionary()


def _seen(model: nn.Module, call: _Call) -> MethodType:
    """Return a ``_call_impl`` of a model that does what is due when a call ends, also by Ctrl-C.

    It sees the output that the caller gets, after all of torch's hooks. It is a method of that name, so
    pickles of the model have its class's own. Copies carry it, and it does nothing there; in a shallow one
    (``copy.copy``, a replica of DataParallel) it is bound to the model, and only who calls it tells.
    """
    original = ref(model)

    def _call_impl(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        caller: Any = None
        if not torch.compiler.is_dynamo_compiling():  # the compiler cannot follow this
            caller = sys._getframe(1).f_locals.get("self")  # of `nn.Module.__call__`
        if getattr(getattr(caller, "__dict__", {}).get("_call_impl"), "__func__", None) is _call_impl:
            module = caller
        if module is not original():
            return type(module)._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]
        around, call.due = call.due, []  # a model may call itself
        output = RAISED
        try:
            output = type(module)._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            due, call.due = call.due, around
            if due:
                _do(due, output)
        return output

    return MethodType(_call_impl, model)


def _do(due: list[Due], output: Any) -> None:
    """Do all that is due, the first thing first, also where one raises."""
    try:
        due.pop(0)(output)
    finally:
        if due:
            _do(due, output)


class RootHook:
    """Has a function called before every call of a model, while at least one ``with`` block is open.

    Args:
        model: whose calls.

    Attributes:
        hook: the hook on the model; None while no block is open.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.hook: OnlyHere | None = None
        self._open = 0
        self._calls = _CALLS  # while Python ends, there are no global names any more
        self._handle: RemovableHandle | None = None
        self._call: _Call | None = None

    @contextlib.contextmanager
    def attached(self, before: Before) -> Iterator[None]:
        """Attach to the model; of several blocks that are open, in whatever order they end, the first counts.

        Args:
            before: gets the arguments; returns them changed (with every tensor replaced, for example), or
                None to leave them.
        """
        model = self._model
        self._open += 1
        if self._open == 1:
            # a hook of torch's: the compiler goes past `_call_impl`, and it comes after the user's own
            self.hook = OnlyHere(model, before)
            self._handle = model.register_forward_pre_hook(self.hook, with_kwargs=True)
            self._call = self._calls.setdefault(model, _Call())
            vars(model)["_call_impl"] = _seen(model, self._call)
            self._call.hooks += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                assert self._handle is not None
                assert self._call is not None
                self._handle.remove()
                self.hook = None
                self._call.hooks -= 1
                if not self._call.hooks:
                    del vars(model)["_call_impl"]
                    self._calls.pop(model, None)  # it has gone where both are collected as garbage

    def come_last(self) -> None:
        """Have `before` called after all hooks that the model has by now, from its next call on."""
        assert self._handle is not None
        hooks: Any = self._model._forward_pre_hooks  # an OrderedDict
        hooks.move_to_end(self._handle.id)

    def at_end(self, due: Due) -> None:
        """Have `due` called when the call ends of which `before` was told last.

        Args:
            due: gets the output, or `RAISED`. What it raises reaches the caller of the model.
        """
        assert self._call is not None
        self._call.due.append(due)


def hook_count(model: nn.Module) -> int:
    """Return how many `RootHook` are attached to a model."""
    return _CALLS[model].hooks if model in _CALLS else 0
