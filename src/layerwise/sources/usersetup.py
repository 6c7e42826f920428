"""Open a training set-up that the user's own function builds, to look it over: ``script.py:build``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from layerwise.errors import LayerwiseError, ModelError, did_you_mean, named_kind
from layerwise.sources.userfile import find_function

PARTS = ("model", "optimizer", "scheduler", "loader")


def call_setup(spec: str) -> dict[str, Any]:
    """Run the file, call the function without arguments, and return the parts of what it gives, by name.

    Args:
        spec: ``path/to/file.py:function``. The function returns the model, or a tuple of the model and,
            in any order, optimiser(s), scheduler(s) and a loader of batches, told apart by what they
            are; or a mapping with some of the keys ``model, optimizer, scheduler, loader``. The code
            is run, with all rights of the caller.

    Raises:
        ModelError: the file or function is missing or raises, or what it returns has no model or an
            unknown part.
    """
    function = find_function(spec)
    try:
        returned = function()
    except LayerwiseError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise ModelError(
            f"{spec}, called without arguments, raised {type(error).__name__}: {error}"
        ) from error
    if isinstance(returned, Mapping):
        unknown = [key for key in returned if key not in PARTS]
        if unknown:
            raise ModelError(
                f"{spec} returned a mapping with the key {unknown[0]!r}; expected some of "
                f"{', '.join(PARTS)}.{did_you_mean(str(unknown[0]), PARTS)}"
            )
        parts = dict(returned)
    else:
        parts = _by_kind(spec, returned if isinstance(returned, tuple | list) else (returned,))
    from torch import nn

    if not isinstance(parts.get("model"), nn.Module):
        raise ModelError(
            f"{spec} returned no nn.Module (it returned {named_kind(returned)}); expected the model, or "
            "a tuple of the model and its optimizer (and scheduler, and loader), or a mapping of them."
        )
    return {name: parts.get(name) for name in PARTS}


def _by_kind(spec: str, returned: Iterable[Any]) -> dict[str, Any]:
    from torch import nn

    found: dict[str, list[Any]] = {}
    for part in returned:
        if isinstance(part, nn.Module):
            kind = "model"
        elif hasattr(part, "param_groups") or hasattr(part, "opt"):
            kind = "optimizer"
        elif callable(getattr(part, "step", None)):
            kind = "scheduler"
        elif isinstance(part, Iterable) and not isinstance(part, str | bytes):
            kind = "loader"
        else:
            raise ModelError(
                f"{spec} returned {named_kind(part)}, which is no model, optimizer, scheduler or loader."
            )
        found.setdefault(kind, []).append(part)
    if len(found.get("model", [])) > 1 or len(found.get("loader", [])) > 1:
        raise ModelError(
            f"{spec} returned several models or loaders; name them in a mapping: {', '.join(PARTS)}."
        )
    return {kind: parts if kind in ("optimizer", "scheduler") else parts[0] for kind, parts in found.items()}
