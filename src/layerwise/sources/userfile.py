"""Open a model that the user's own function builds: ``path/to/file.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layerwise.errors import ModelError, did_you_mean, did_you_mean_beside, named_kind
from layerwise.sources.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn


def call_function(spec: str, num_classes: int | None) -> tuple[nn.Module, Preprocessing | None]:
    """Run the file, call the function, and return its model and, if it gave one, its preprocessing.

    Args:
        spec: ``path/to/file.py:function``. The file is run like an imported module; its folder is added
            to the end of ``sys.path``, so that it can import its neighbours and workers can import it.
        num_classes: given to the function if it has an argument of that name.

    Raises:
        ModelError: the file or function is missing or raises, or returns something else.
    """
    from torch import nn

    function = find_function(spec)
    parameters = inspect.signature(function).parameters.values()
    takes = any(p.name == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    options = {"num_classes": num_classes} if takes and num_classes is not None else {}
    try:
        returned = function(**options)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        given = ", ".join(f"{name}={value}" for name, value in options.items()) or "no arguments"
        raise ModelError(f"{spec}, called with {given}, raised {type(error).__name__}: {error}") from error
    model, preprocessing = (
        returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    )
    if isinstance(preprocessing, Mapping):
        preprocessing = Preprocessing.from_dict(preprocessing)
    if not isinstance(model, nn.Module) or not isinstance(preprocessing, Preprocessing | None):
        raise ModelError(
            f"{spec} returned {named_kind(model)}"
            f"{'' if preprocessing is None else f' and {named_kind(preprocessing)}'}; expected an "
            f"nn.Module, or a pair of one and its Preprocessing (or a dict of its fields)."
        )
    return model, preprocessing


def check_file(spec: str) -> Path:
    """Return the file of ``path/to/file.py:function``; it is not run.

    Raises:
        ModelError: there is none.
    """
    text, _, _ = spec.rpartition(":")
    path = Path(text)
    if not text:
        raise ModelError(f"{spec!r} names no function. Give FILE.py:FUNCTION.")
    if not path.is_file():
        raise ModelError(
            f"model file {text!r} does not exist.{did_you_mean_beside(path, '*.py')} "
            f"Give FILE.py:FUNCTION, where the function returns an nn.Module."
        )
    return path


def find_function(spec: str) -> Callable[..., Any]:
    """Run the file of ``path/to/file.py:function`` and return the function.

    Raises:
        ModelError: the file or function is missing, or running the file raises.
    """
    path = check_file(spec)
    text, _, function_name = spec.rpartition(":")
    module = _import_file(path.resolve())
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise ModelError(
            f"{text!r} has no function {function_name!r}.{did_you_mean(function_name, functions)} "
            f"It has: {', '.join(functions) or 'none'}."
        )
    found: Callable[..., Any] = function
    return found


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module that workers and pickles can find again by name."""
    taken = sys.modules.get(path.stem)
    ours = taken is None or getattr(taken, "__file__", None) == str(path)
    name = path.stem if ours else f"layerwise_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise ModelError(f"model file {str(path)!r} raised {type(error).__name__}: {error}") from error
    return module
