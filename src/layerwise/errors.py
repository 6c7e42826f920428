"""The errors that layerwise raises, and what a caller may want to catch.

    LayerwiseError
    ├── ModelError     a model cannot be opened, recorded or changed
    │   └── RecordingError   its forward pass could not be recorded
    ├── PlanError      a plan, phase, schedule or strategy is wrong, or does not fit the model
    ├── DataError      a data set, sample or label is wrong
    ├── CacheError     a prefix cannot be cached, or a stored cache cannot be trusted
    ├── RunError       a run folder or checkpoint is missing, damaged or in the way
    ├── TrainingError  an option of fit is wrong, or training had to stop (loss not finite, out of memory)
    └── MissingExtraError  an optional package is not installed (also an ImportError)

    LayerwiseWarning   (a UserWarning) what was asked for can be done, but is likely not what was meant

Every message says what was wrong with the value received, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

_LIBRARIES = (os.path.dirname(__file__) + os.sep, os.path.dirname(os.__file__) + os.sep, "<frozen ")


class LayerwiseError(Exception):
    """Base of all errors that layerwise raises on purpose."""


class ModelError(LayerwiseError):
    """A model cannot be opened, recorded or changed as asked."""


class RecordingError(ModelError):
    """A model's forward pass could not be recorded."""


class PlanError(LayerwiseError):
    """A plan, phase, schedule or strategy is wrong in itself or does not fit the model."""


class DataError(LayerwiseError):
    """A data set, a sample or a label is not what was expected."""


class CacheError(LayerwiseError):
    """A frozen prefix cannot be cached, or a stored cache cannot be trusted."""


class RunError(LayerwiseError):
    """A run folder or a checkpoint is missing, damaged or in the way."""


class TrainingError(LayerwiseError):
    """An option of `fit` is wrong, or training had to stop: loss not finite, or out of memory."""


class MissingExtraError(LayerwiseError, ImportError):
    """An optional package that this call needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it: pip install 'layerwise[{extra}]'"
        )


class LayerwiseWarning(UserWarning):
    """What was asked for can be done, but is likely not what was meant."""


def warn(message: str) -> None:
    """Give a `LayerwiseWarning` that shows the line of the user's own code that led here.

    Passes over layerwise, Python's library and whatever is installed, such as torch; where there is nothing
    else, it shows where the program began.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        LayerwiseWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or "-packages" in file


def named_kind(value: object) -> str:
    """Return the class of `value` with its article.

    >>> named_kind(1), named_kind([])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def plural(count: int, singular: str, several: str = "") -> str:
    """Return a count and its noun.

    >>> plural(1, "epoch"), plural(2, "class", "classes")
    ('1 epoch', '2 classes')
    """
    return f"{count:,} {singular if count == 1 else several or singular + 's'}"


def percent(part: float, whole: float, *, digits: int = 1) -> str:
    """Return a share in percent without its sign; only what is exactly none or all of it reads so.

    >>> percent(1, 3), percent(0, 5), percent(1, 10_000), percent(9_999, 10_000), percent(5, 5)
    ('33.3', '0.0', '<0.1', '>99.9', '100.0')
    """
    text = f"{100 * part / whole if whole else 0:.{digits}f}"
    least = 10.0**-digits
    if part > 0 and float(text) == 0:
        return f"<{least:.{digits}f}"
    if part < whole and float(text) == 100:
        return f">{100 - least:.{digits}f}"
    return text


def figure(value: float) -> str:
    """Return a loss or a metric with four decimals; only what is exactly 0 reads so.

    >>> figure(0.8125), figure(3.318e-5), figure(0)
    ('0.8125', '3.3e-05', '0.0000')
    """
    return f"{value:.1e}" if 0 < abs(value) < 5e-5 else f"{value:.4f}"


def points(difference: float) -> str:
    """Return a difference of two shares in percentage points, with its sign.

    >>> points(-0.08), points(0.005)
    ('-8.0 points', '+0.5 points')
    """
    return f"{100 * difference:+.1f} points"


def shorten(names: Iterable[object], count: int = 3) -> str:
    """Return the first few of some names for a message, and how many more there are.

    >>> shorten(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    texts = list(map(str, names))
    rest = f" and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + rest


def repeated(names: Iterable[object]) -> str:
    """Return which names of a model's outputs stand several times, and where; ``""`` where none does.

    >>> repeated(["bee", "ant", "bee"])
    "'bee' names outputs 0 and 2"
    """
    places: dict[object, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    several = {name: found for name, found in places.items() if len(found) > 1}
    return shorten(f"{name!r} names outputs {found[0]} and {found[1]}" for name, found in several.items())


def listed(summary: str, problems: Sequence[str], count: int = 10) -> str:
    """Return a message of a summary and the first of its problems, a line each.

    >>> print(listed("rows cannot be used", ["row 1 is empty", "row 4 is empty"], count=1))
    rows cannot be used:
      - row 1 is empty
      - and 1 more
    """
    shown = [f"\n  - {problem}" for problem in problems[:count]]
    more = f"\n  - and {len(problems) - count} more" if len(problems) > count else ""
    return f"{summary}:{''.join(shown)}{more}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, its class where it has none.

    >>> first_line(OSError("no room.")), first_line(MemoryError())
    ('no room', 'MemoryError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def did_you_mean(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean 'layer4'?"`` for the closest of `known`, or ``""`` when none is close.

    `name` itself is no answer: a folder lists links to nothing, too.

    >>> did_you_mean("layer5", ["stem", "layer4", "head"], count=1)
    " Did you mean 'layer4'?"
    >>> did_you_mean("zzz", ["stem"])
    ''
    """
    close = difflib.get_close_matches(name, [other for other in known if other != name], n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def did_you_mean_beside(path: Path, pattern: str = "*") -> str:
    """Return what `did_you_mean` says of a path that is not there and of what lies in its folder."""
    return did_you_mean(path.name, (entry.name for entry in path.parent.glob(pattern)))
