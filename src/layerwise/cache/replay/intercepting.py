"""`Intercepted`: run a model's own forward with some of its module calls watched, answered or stopped.

For the time of one forward pass, these modules carry an instance attribute ``_call_impl``, which
``nn.Module.__call__`` looks up. It sees a call as hooks see it (arguments before the module's own hooks,
output after them), yet is no hook: modules that take another path when hooks are attached, such as
``nn.TransformerEncoderLayer``, do not notice. State-dict keys, classes and the module tree stay as they are.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn

from layerwise.cache.cutting.cut import CallId

Forward = Callable[..., Any]


class Intercepted(ABC):
    """Within: every call of some modules is answered by `answer`.

    Args:
        modules: module -> path.

    Attributes:
        counts: how often each module was called.
    """

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        self.counts: dict[nn.Module, int] = dict.fromkeys(modules, 0)
        self._modules = modules
        self._before: list[tuple[dict[str, Any], Any]] = []

    @abstractmethod
    def answer(self, call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of a call, which `original` makes."""

    def __enter__(self) -> Self:
        """Begin."""
        try:
            for module, path in self._modules.items():
                attributes = vars(module)
                self._before.append((attributes, attributes.get("_call_impl")))
                called = functools.partial(self._called, module, path, module._call_impl)
                attributes["_call_impl"] = called
        except BaseException:  # Ctrl-C
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the modules as they were."""
        for attributes, before in self._before:
            if before is None:
                attributes.pop("_call_impl", None)
            else:
                attributes["_call_impl"] = before

    def _called(self, module: nn.Module, path: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
        nth = self.counts[module]
        self.counts[module] = nth + 1
        return self.answer(CallId(path, nth), original, args, kwargs)
