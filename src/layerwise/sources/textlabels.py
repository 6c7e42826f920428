"""The labels of texts: what a cell says, for each task, and which classes there are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from layerwise.errors import DataError, did_you_mean, listed, named_kind
from layerwise.sources.tables import label_name, unknown_class

TextTask = Literal[
    "text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm"
]
TEXT_TASKS: tuple[str, ...] = get_args(TextTask)
SEVERAL = ("multi_label", "token_classification")  # labels of a row
# As pandas and `datasets` write a list to CSV: ['a', 'b'], ["a"], [0, 3], [].
_WRITTEN_LIST = re.compile(r"""\[\s*(?:(['"]).*\1|[\d\s,]*)\s*\]""", re.DOTALL)


class BadRowError(Exception):
    """Why one row cannot be used."""


def label_parser(task: TextTask, names: tuple[str, ...] | None, separator: str) -> Callable[[Any], Any]:
    """Return what turns a cell into the label of a task; it raises `BadRowError`.

    Args:
        task: what the labels are.
        names: of class numbers, where the data set has such.
        separator: between the labels of a ``"multi_label"`` row.
    """

    def name_of(value: Any) -> str:
        if isinstance(value, list | dict):
            raise BadRowError(f"has {named_kind(value)} as label; expected one (several: --task multi_label)")
        label = label_name(value)
        if label is None:
            raise BadRowError("has no label")
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise BadRowError(f"has the class number {value}; expected 0 to {len(names) - 1}")
            return names[value]
        return label

    def listed(value: Any, split: Callable[[str], list[str]]) -> tuple[str, ...]:
        if isinstance(value, str) and _WRITTEN_LIST.fullmatch(value.strip()):
            between = repr(separator) if task == "multi_label" else "blanks"
            raise BadRowError(
                f"has the list {value:.40} as text; expected names joined by {between}, or a real list "
                "(JSON lines or Parquet)"
            )
        entries = split(value) if isinstance(value, str) else value
        if not isinstance(entries, Sequence):
            raise BadRowError(f"has {value!r} as labels; expected a list or a text")
        return tuple(name_of(entry) for entry in entries)

    def several(value: Any) -> tuple[str, ...]:
        if value is None or is_nan(value):
            return ()  # none of the labels
        found = listed(value, lambda text: [name for name in text.split(separator) if name.strip()])
        return tuple(dict.fromkeys(found))

    def number(value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            raise BadRowError(f"has {value!r} as label; expected a number") from None
        if not math.isfinite(found):
            raise BadRowError(f"has {value!r} as label; expected a finite number")
        return found

    parsers: dict[str, Callable[[Any], Any]] = {
        "text_classification": name_of,
        "multi_label": several,
        "regression": number,
        "token_classification": lambda value: listed(value, str.split),
    }
    return parsers.get(task, lambda value: None)


def classes_in(
    source: str | Path,
    task: TextTask,
    targets: Mapping[str, Sequence[Any]],
    names: tuple[str, ...] | None,
    known: Sequence[str],
) -> tuple[str, ...]:
    """Return the class names in order; none for numbers and language models.

    Args:
        source: of the data, for messages.
        task: what the labels are.
        targets: part -> the label, or labels, of each row.
        names: of class numbers, where the data set has such.
        known: the classes of a model, in its order, of which the data may lack some; none are those of train.

    Raises:
        DataError: there are too few, or others than in train or known; all that is wrong is in it.
    """
    if task in ("regression", "causal_lm", "masked_lm"):
        return ()
    seen = {name: labels_in(task, of_part) for name, of_part in targets.items()}
    train = seen["train"]
    problems = []
    if not train:
        problems.append("no training row has a label")
    elif len(train) == 1 and not known:
        problems.append(
            f"there is one class ({next(iter(train))!r}); expected at least two. Add texts of another"
        )
    for name, labels in seen.items():
        for label in in_order(labels.difference(known or train)):
            if known:
                problems.append(unknown_class(label, name, known))
                continue
            close = did_you_mean(label, train, count=1).rstrip("?")
            problems.append(f"label {label!r} is in {name} and never in train.{close}".rstrip("."))
    if problems:
        raise DataError(listed(f"labels of {str(source)!r} cannot be used", problems))
    if known:
        return tuple(known)
    if names is not None:
        return tuple(name for name in names if name in train)
    return tuple(in_order(train))


def labels_in(task: TextTask, targets: Sequence[Any]) -> set[str]:
    """Return the class names that the labels of some rows show; none for numbers and language models."""
    if task == "text_classification":
        return set(targets)
    return {label for row in targets for label in row} if task in SEVERAL else set()


def in_order(labels: set[str]) -> list[str]:
    """Return names sorted, numbers by value, and those of one value ("7", "07") by name."""
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def is_nan(value: Any) -> bool:
    """Return whether a cell is a NaN, which stands for an empty one."""
    return isinstance(value, float) and math.isnan(value)
