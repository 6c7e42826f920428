"""`RootHook`: see every call of one model while a loop runs, and vanish from copies and pickles of it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Before = Callable[[tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[Any], None]


class _OnlyHere:
    """A hook that works on one model; deepcopies and pickles of the model carry a dead one."""

    def __init__(self, model: nn.Module | None, function: Callable[..., Any] | None) -> None:
        self.model, self.function = model, function

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if self.function is None or module is not self.model:
            return None
        return self.function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnlyHere:
        return _OnlyHere(None, None)

    def __reduce__(self) -> Any:
        return _OnlyHere, (None, None)


class _Call:
    """A model's ``_call_impl``, which tells when a call raised: torch's hooks do not hear of Ctrl-C.

    It is bound to the model as a method of that name, so a copy or pickle of the model has its class's own.

    Attributes:
        listeners: what to call then, of all hooks on the model; copies of it keep this, and nothing else.
    """

    __name__ = "_call_impl"

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.listeners: list[After] = []

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return type(module)._call_impl(module, *args, **kwargs)  # type: ignore[no-untyped-call]
        except BaseException:
            for after in self.listeners if module is self._model() else ():
                after(None)
            raise

    @classmethod
    def of(cls, model: nn.Module) -> _Call | None:
        """Return that of a model; None if it has none."""
        found = getattr(vars(model).get("_call_impl"), "__func__", None)
        return found if isinstance(found, cls) else None


class RootHook:
    """Has two functions called around every call of a model, while at least one ``with`` block is open."""

    def __init__(self) -> None:
        self._open = 0
        self._handles: list[RemovableHandle] = []

    @contextlib.contextmanager
    def attached(self, model: nn.Module, before: Before, after: After) -> Iterator[None]:
        """Attach to `model`; of several blocks that are open, in whatever order they end, the first counts.

        Args:
            model: whose calls.
            before: gets the arguments; returns them changed (with every tensor replaced, for example), or
                None to leave them.
            after: gets the output, or None if the call raised.
        """
        self._open += 1
        if self._open == 1:
            on_call = _OnlyHere(model, before)
            on_output = _OnlyHere(model, lambda args, kwargs, output: after(output))
            self._handles = [
                model.register_forward_pre_hook(on_call, with_kwargs=True),
                model.register_forward_hook(on_output, with_kwargs=True),
            ]
            call = _Call.of(model)
            if call is None:
                call = _Call(model)
                vars(model)["_call_impl"] = MethodType(call, model)
            call.listeners.append(after)
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                for handle in self._handles:
                    handle.remove()
                self._handles = []
                call = _Call.of(model)
                assert call is not None
                call.listeners.remove(after)
                if not call.listeners:
                    del vars(model)["_call_impl"]


def hook_count(model: nn.Module) -> int:
    """Return how many `RootHook` are attached to a model."""
    call = _Call.of(model)
    return 0 if call is None else len(call.listeners)
