"""Texts with labels from any table, checked and split: what `layerwise.sources.text` turns into tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from layerwise.errors import DataError, did_you_mean, listed, named_kind, plural
from layerwise.sources.copies import Sample, tell_copies
from layerwise.sources.splits import VAL_FRAC, fracs_to_split, grouped_split, stratified_split
from layerwise.sources.tables import Row, label_name, require_columns, unused_split
from layerwise.sources.textfiles import read_parts

TextTask = Literal[
    "text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm"
]
TEXT_TASKS: tuple[str, ...] = get_args(TextTask)
SEVERAL = ("multi_label", "token_classification")  # labels of a row
MAX_CHARS = 1_000_000
# As pandas and `datasets` write a list to CSV: ['a', 'b'], ["a"], [0, 3], [].
WRITTEN_LIST = re.compile(r"""\[\s*(?:(['"]).*\1|[\d\s,]*)\s*\]""", re.DOTALL)


@dataclass
class TextPart:
    """The rows of one part, parsed; lists of equal length.

    Attributes:
        texts: the text of each row (the prompt, of instruction data); empty for token classification.
        pairs: the second text of each, or None.
        words: the words of each row, for token classification; None otherwise.
        targets: class name, tuple of names, number, or tags; None where there are no labels.
        responses: what is learned of each row of instruction data; None otherwise.
        groups: what belongs on one side of a split; None without a group column.
    """

    texts: list[str] = field(default_factory=list)
    pairs: list[str] | None = None
    words: list[list[str]] | None = None
    targets: list[Any] | None = None
    responses: list[str] | None = None
    groups: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.texts if self.words is None else self.words)

    def take(self, indices: Sequence[int]) -> TextPart:
        """Return the rows at `indices`."""
        lists = vars(self).items()  # of token classification the texts are empty, of others some are None
        return TextPart(**{name: own and [own[index] for index in indices] for name, own in lists})


@dataclass(frozen=True)
class TextTable:
    """Texts and labels of a data set, checked and split, before they are tokenized.

    Attributes:
        task: what the labels are.
        parts: ``"train"`` and, where there are such, ``"val"`` and ``"test"``.
        classes: names in order (of tags, for token classification); empty for numbers and language
            models.
        skipped: (row, reason) of what was left out.
        notes: what was chosen, for people.
    """

    task: TextTask
    parts: Mapping[str, TextPart]
    classes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def read_texts(
    source: str | Path,
    *,
    task: TextTask = "text_classification",
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    response_column: str | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    val_frac: float = VAL_FRAC,
    test_frac: float = 0.0,
    seed: int = 0,
    encoding: str = "utf-8",
    label_separator: str = ",",
    prompt_template: str = "{prompt}\n",
    max_chars: int = MAX_CHARS,
    skip_bad_rows: bool = False,
) -> TextTable:
    """Return the texts and labels of `source`, checked and split.

    Args:
        source: a table, a folder of tables, a folder of Hugging Face `datasets`, or ``hf:ID``; see
            `layerwise.sources.textfiles.read_parts`.
        task: ``"text_classification"`` (one class a row), ``"multi_label"`` (any number of labels: a list,
            or names joined by `label_separator`), ``"regression"`` (a number),
            ``"token_classification"`` (one tag a word), ``"causal_lm"`` and ``"masked_lm"`` (no labels).
        text_column: default ``"text"``; ``"tokens"`` for token classification.
        pair_column: of a second text, for pairs.
        label_column: default ``"label"``; ``"tags"`` for token classification.
        response_column: for ``"causal_lm"``: `text_column` is a prompt, and only this is learned.
        group_column: rows with the same value stay on one side of the split (documents of one author).
        split_column: holds train, val or test.
        val: a table for validation, instead of splitting one off.
        test: likewise for testing.
        val_frac: share of the training rows to split off where there is no val part.
        test_frac: likewise.
        seed: of the split; the classes of ``"text_classification"`` keep their shares, unless there is a
            group column.
        encoding: of text files.
        label_separator: between the labels of a ``"multi_label"`` row.
        prompt_template: how a prompt is written, with ``{prompt}`` in it.
        max_chars: longer texts are an error: nearly always a file that was read as one cell.
        skip_bad_rows: leave out rows without text or label, or with too long a text, and list them.

    Raises:
        DataError: a column is missing (those there are are named), rows have no text or label or too
            long a text, there is one class only, or validation has labels that training has not (or a
            split leaves it none of). All such rows are in one message, and then all such labels.
        MissingExtraError: a package that the format needs is not installed.
    """
    if task not in TEXT_TASKS:
        raise DataError(
            f"task is {task!r}; expected one of {', '.join(TEXT_TASKS)}.{did_you_mean(task, TEXT_TASKS)}"
        )
    if response_column is not None and task != "causal_lm":
        raise DataError(f"response_column is for task 'causal_lm', not {task!r}.")
    if response_column is not None and "{prompt}" not in prompt_template:
        raise DataError(f"prompt_template is {prompt_template!r}; expected {{prompt}} in it.")
    if not label_separator:
        raise DataError("label_separator is empty; expected what stands between the labels of a row: ','.")
    tags = task == "token_classification"
    labelled = task not in ("causal_lm", "masked_lm")
    text_column = text_column or default_text_column(task)
    label_column = label_column or ("tags" if tags else "label")
    named = {
        "--text-column": text_column,
        "--pair-column": pair_column,
        "--response-column": response_column,
        "--group-column": group_column,
        "--label-column": label_column if labelled else None,
    }
    columns = {column: option for option, column in named.items() if column is not None}

    found = read_parts(source, val=val, test=test, split_column=split_column, encoding=encoding)
    reader = _Reader(
        text_column=text_column,
        label_column=label_column if labelled else None,
        parse_label=_label_parser(task, found.label_names.get(label_column), label_separator),
        tags=tags,
        pair_column=pair_column,
        response_column=response_column,
        prompt_template=prompt_template if response_column is not None else "{prompt}",
        group_column=group_column,
        max_chars=max_chars,
    )
    parts: dict[str, TextPart] = {}
    bad: list[tuple[str, str]] = []
    for name, rows in found.parts.items():
        require_columns(f"data {str(source)!r} ({name})", list(rows[0]) if rows else [], columns)
        parts[name], problems = reader.read(name, rows)
        bad += problems
    if bad and not skip_bad_rows:
        total = sum(map(len, found.parts.values()))
        raise DataError(
            listed(f"{len(bad)} of {total} rows cannot be used", [f"{row} {reason}" for row, reason in bad])
            + "\nRepair or remove them, or leave them out: --skip-bad-rows of layerwise fit "
            "(skip_bad_rows=True)."
        )
    notes = list(found.notes)
    for name in [name for name, part in parts.items() if name != "train" and not len(part)]:
        del parts[name]
        notes.append(f"{name}: none of its rows can be used, so the part is left out")
    if not len(parts["train"]):
        reasons = [f"{row} {reason}" for row, reason in bad]
        raise DataError(listed(f"data {str(source)!r} has no training row that can be used", reasons))
    classes = _classes(source, task, parts, found.label_names.get(label_column))
    if set(found.parts) == {"train"}:
        notes += unused_split(found.parts["train"], split_column)
    notes += _split(task, parts, val_frac, test_frac, seed)
    if task == "text_classification":
        notes += tell_copies({name: _samples(part) for name, part in parts.items()}, "text")
    return TextTable(task, parts, classes, tuple(bad), tuple(notes))


def _samples(part: TextPart) -> list[Sample]:
    """Return the texts and pairs of texts of a part, each with its class."""
    pairs = part.pairs or [""] * len(part)
    return [
        Sample((text, pair), label, repr(text if len(text) <= 40 else f"{text[:39]}…"))
        for text, pair, label in zip(part.texts, pairs, part.targets or [])
    ]


def default_text_column(task: str) -> str:
    """Return the column of the text where none is named."""
    return "tokens" if task == "token_classification" else "text"


@dataclass
class _Reader:
    """Turns raw rows into a `TextPart`, noting the rows that cannot be used."""

    text_column: str
    label_column: str | None
    parse_label: Callable[[Any], Any]
    tags: bool
    pair_column: str | None
    response_column: str | None
    prompt_template: str
    group_column: str | None
    max_chars: int

    def read(self, name: str, rows: Sequence[Row]) -> tuple[TextPart, list[tuple[str, str]]]:
        part = TextPart(
            pairs=[] if self.pair_column else None,
            words=[] if self.tags else None,
            targets=[] if self.label_column else None,
            responses=[] if self.response_column else None,
            groups=[] if self.group_column else None,
        )
        problems = []
        for number, row in enumerate(rows, start=1):
            try:
                self._read_row(part, row)
            except _BadRowError as error:
                problems.append((f"row {number} of {name}", str(error)))
        return part, problems

    def _read_row(self, part: TextPart, row: Row) -> None:
        words = self._words(row) if self.tags else None
        text = "" if self.tags else self._text(row, self.text_column)
        pair = self._text(row, self.pair_column) if self.pair_column else None
        response = self._text(row, self.response_column) if self.response_column else None
        group = row[self.group_column] if self.group_column else None
        if not isinstance(group, Hashable):
            raise _BadRowError(f"has {named_kind(group)} in {self.group_column!r}; expected one value")
        target: Any = None if self.label_column is None else self.parse_label(row[self.label_column])
        if words is not None and len(target) != len(words):
            raise _BadRowError(f"has {plural(len(words), 'word')} and {plural(len(target), 'tag')}")
        # Only now that nothing can fail any more, so that all lists stay of one length.
        columns: list[tuple[list[Any] | None, Any]] = [
            (part.words, words),
            (part.pairs, pair),
            (part.responses, response),
            (part.targets, target),
            (part.groups, group),
        ]
        for values, value in columns:
            if values is not None:
                values.append(value)
        if not self.tags:
            part.texts.append(self.prompt_template.replace("{prompt}", text))

    def _text(self, row: Row, column: str) -> str:
        value = row[column]
        if isinstance(value, int | float) and not isinstance(value, bool) and not _is_nan(value):
            value = str(value)  # a column of numbers that are meant as text
        if value is None or _is_nan(value) or (isinstance(value, str) and not value.strip()):
            raise _BadRowError(f"has an empty {column!r}")
        if not isinstance(value, str):
            raise _BadRowError(f"has {named_kind(value)} in {column!r}; expected a text")
        if len(value) > self.max_chars:
            raise _BadRowError(
                f"has {len(value):,} characters in {column!r}; expected at most {self.max_chars:,} (cut it "
                f"into texts, or raise max_chars)"
            )
        return value

    def _words(self, row: Row) -> list[str]:
        value = row[self.text_column]
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise _BadRowError(f"has no list of words in {self.text_column!r}")
        if not words:
            raise _BadRowError(f"has an empty {self.text_column!r}")
        return list(words)


class _BadRowError(Exception):
    """Why one row cannot be used."""


def _label_parser(task: TextTask, names: tuple[str, ...] | None, separator: str) -> Callable[[Any], Any]:
    def name_of(value: Any) -> str:
        if isinstance(value, list | dict):
            raise _BadRowError(
                f"has {named_kind(value)} as label; expected one (several: --task multi_label)"
            )
        label = label_name(value)
        if label is None:
            raise _BadRowError("has no label")
        if names is not None and isinstance(value, int):
            if not 0 <= value < len(names):
                raise _BadRowError(f"has the class number {value}; expected 0 to {len(names) - 1}")
            return names[value]
        return label

    def listed(value: Any, split: Callable[[str], list[str]]) -> tuple[str, ...]:
        if isinstance(value, str) and WRITTEN_LIST.fullmatch(value.strip()):
            between = repr(separator) if task == "multi_label" else "blanks"
            raise _BadRowError(
                f"has the list {value:.40} as text; expected names joined by {between}, or a real list "
                "(JSON lines or Parquet)"
            )
        entries = split(value) if isinstance(value, str) else value
        if not isinstance(entries, Sequence):
            raise _BadRowError(f"has {value!r} as labels; expected a list or a text")
        return tuple(name_of(entry) for entry in entries)

    def several(value: Any) -> tuple[str, ...]:
        if value is None or _is_nan(value):
            return ()  # none of the labels
        found = listed(value, lambda text: [name for name in text.split(separator) if name.strip()])
        return tuple(dict.fromkeys(found))

    def number(value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _BadRowError(f"has {value!r} as label; expected a number") from None
        if not math.isfinite(found):
            raise _BadRowError(f"has {value!r} as label; expected a finite number")
        return found

    parsers: dict[str, Callable[[Any], Any]] = {
        "text_classification": name_of,
        "multi_label": several,
        "regression": number,
        "token_classification": lambda value: listed(value, str.split),
    }
    return parsers.get(task, lambda value: None)


def _classes(
    source: str | Path, task: TextTask, parts: Mapping[str, TextPart], names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Return the class names in order; raise one error with all that is wrong with the labels."""
    if task in ("regression", "causal_lm", "masked_lm"):
        return ()
    seen: dict[str, set[str]] = {}
    for name, part in parts.items():
        seen[name] = _labels_in(task, part)
    train = seen["train"]
    problems = []
    if len(train) == 1:
        problems.append(
            f"there is one class ({next(iter(train))!r}); expected at least two. Add texts of another"
        )
    if not train:
        problems.append("no training row has a label")
    for name, labels in seen.items():
        for label in _in_order(labels - train):
            close = did_you_mean(label, train, count=1).rstrip("?")
            problems.append(f"label {label!r} is in {name} and never in train.{close}".rstrip("."))
    if problems:
        raise DataError(listed(f"labels of {str(source)!r} cannot be used", problems))
    if names is not None:
        return tuple(name for name in names if name in train)
    return tuple(_in_order(train))


def _labels_in(task: TextTask, part: TextPart) -> set[str]:
    """Return the class names that a part shows; none for numbers and language models."""
    targets = part.targets or []
    if task == "text_classification":
        return set(targets)
    return {label for row in targets for label in row} if task in SEVERAL else set()


def _in_order(labels: set[str]) -> list[str]:
    """Return names sorted, numbers by value, and those of one value ("7", "07") by name."""
    if all(re.fullmatch(r"-?\d{1,18}", label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _split(
    task: TextTask, parts: dict[str, TextPart], val_frac: float, test_frac: float, seed: int
) -> list[str]:
    """Split off the parts that are missing; return what was done."""
    fracs, notes = fracs_to_split(parts, val_frac=val_frac, test_frac=test_frac)
    if not any(fracs):
        return notes
    train = parts["train"]
    if train.groups is not None:
        split, how = grouped_split(train.groups, fracs, seed=seed), "by group"
    else:
        labels = train.targets if task == "text_classification" else None
        split = stratified_split(labels or [0] * len(train), fracs, seed=seed)
        how = "stratified" if labels else "at random"
        if task in SEVERAL:
            _keep_rare(train.targets or [], split)
    for name, frac, indices in zip(("val", "test"), fracs, split[1:], strict=True):
        if frac:
            parts[name] = train.take(indices)
            notes.append(f"{name}: {plural(len(indices), 'row')} split off from train, {how}, seed {seed}")
    parts["train"] = train.take(split[0])
    if lost := _in_order(_labels_in(task, train) - _labels_in(task, parts["train"])):
        kind = "groups" if train.groups is not None else "rows"
        raise DataError(
            f"no training row is left of {', '.join(map(repr, lost))} after the split {how} with seed {seed}"
            f"; expected at least two {kind} of each class. Leave the classes out, or take another seed."
        )
    return notes


def _keep_rare(targets: Sequence[Any], split: list[list[int]]) -> None:
    """Move rows with a label that no training row has back to these; each row has several labels."""
    shown = {label for index in split[0] for label in targets[index]}
    for part in split[1:]:
        for index in list(part):
            if not shown.issuperset(targets[index]):
                part.remove(index)
                split[0].append(index)
                shown.update(targets[index])


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
