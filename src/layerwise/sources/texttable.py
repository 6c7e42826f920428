"""Texts with labels from any table, checked and split: what `layerwise.sources.text` turns into tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, did_you_mean, listed, named_kind, plural
from layerwise.sources.copies import Sample, tell_copies
from layerwise.sources.splits import VAL_FRAC, fracs_to_split, grouped_split, stratified_split
from layerwise.sources.tables import Row, require_columns, unused_split
from layerwise.sources.textfiles import read_parts
from layerwise.sources.textlabels import (
    SEVERAL,
    TEXT_TASKS,
    BadRowError,
    TextTask,
    classes_in,
    in_order,
    is_nan,
    label_parser,
    labels_in,
)

MAX_CHARS = 1_000_000


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
    classes: Sequence[str] = (),
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
        classes: of a model, in the order of its outputs; the data may lack some. None given are those of the
            training rows, at least two.

    Raises:
        DataError: a column is missing (those there are are named), rows have no text or label or too
            long a text, there is one class only or one that is none of `classes`, or validation has labels
            that training has not (or a split leaves it none of). All such rows are in one message, and then
            all such labels.
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
        parse_label=label_parser(task, found.label_names.get(label_column), label_separator),
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
    targets = {name: part.targets or [] for name, part in parts.items()}
    classes = classes_in(source, task, targets, found.label_names.get(label_column), classes)
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
            except BadRowError as error:
                problems.append((f"row {number} of {name}", str(error)))
        return part, problems

    def _read_row(self, part: TextPart, row: Row) -> None:
        words = self._words(row) if self.tags else None
        text = "" if self.tags else self._text(row, self.text_column)
        pair = self._text(row, self.pair_column) if self.pair_column else None
        response = self._text(row, self.response_column) if self.response_column else None
        group = row[self.group_column] if self.group_column else None
        if not isinstance(group, Hashable):
            raise BadRowError(f"has {named_kind(group)} in {self.group_column!r}; expected one value")
        target: Any = None if self.label_column is None else self.parse_label(row[self.label_column])
        if words is not None and len(target) != len(words):
            raise BadRowError(f"has {plural(len(words), 'word')} and {plural(len(target), 'tag')}")
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
        if isinstance(value, int | float) and not isinstance(value, bool) and not is_nan(value):
            value = str(value)  # a column of numbers that are meant as text
        if value is None or is_nan(value) or (isinstance(value, str) and not value.strip()):
            raise BadRowError(f"has an empty {column!r}")
        if not isinstance(value, str):
            raise BadRowError(f"has {named_kind(value)} in {column!r}; expected a text")
        if len(value) > self.max_chars:
            raise BadRowError(
                f"has {len(value):,} characters in {column!r}; expected at most {self.max_chars:,} (cut it "
                f"into texts, or raise max_chars)"
            )
        return value

    def _words(self, row: Row) -> list[str]:
        value = row[self.text_column]
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
            raise BadRowError(f"has no list of words in {self.text_column!r}")
        if not words:
            raise BadRowError(f"has an empty {self.text_column!r}")
        return list(words)


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
    if lost := in_order(labels_in(task, train.targets or []) - labels_in(task, parts["train"].targets or [])):
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
