"""Predictions of a run for texts: from files, from standard input, or from a list."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import DataError, RunError
from layerwise.training.run import Run
from layerwise.training.token_tasks import LanguageModelling, TokenClassification

STDIN = "-"


@dataclass(frozen=True)
class Text:
    """One text to predict for.

    Attributes:
        text: what the model reads.
        pair: the second text, for models of pairs.
    """

    text: str
    pair: str | None = None


def read_texts(
    inputs: Sequence[str | Path],
    *,
    text_column: str = "text",
    pair_column: str | None = None,
    encoding: str = "utf-8",
) -> list[Text]:
    """Return the texts in some files, in order.

    Of a table (CSV, TSV, JSON lines, Parquet, CoNLL) the named columns; of any other file every line that
    is not blank. A list of words in a cell is the text of these words.

    Args:
        inputs: files; ``"-"``, or none at all, is standard input, read as lines.
        text_column: column of the text in tables.
        pair_column: column of the second text in tables; lines hold it after a tab.
        encoding: of files and of standard input; a byte-order mark is skipped.

    Raises:
        DataError: a file is missing, is not in `encoding`, lacks a column or a text in it, or there is no
            text at all.
    """
    from layerwise.sources.tables import TABLES, require_columns
    from layerwise.sources.textfiles import CONLL, read_table

    columns = [text_column, *([pair_column] if pair_column else [])]
    options = dict(zip(columns, ("--text-column", "--pair-column")))
    texts: list[Text] = []
    for name in inputs or [STDIN]:
        path = Path(name)
        if str(name) == STDIN:
            content = _decoded(sys.stdin.buffer.read(), "standard input", encoding)
            texts += _lines(content, pair_column is not None)
        elif path.suffix.lower() in (*TABLES, *CONLL):
            rows = read_table(path, encoding)
            require_columns(f"table {str(path)!r}", list(rows[0]), options)
            texts += [_of_row(row, columns, f"row {number} of {name}") for number, row in enumerate(rows, 1)]
        else:
            texts += _lines(_read(path, encoding), pair_column is not None)
    if not texts:
        names = ("standard input" if str(name) == STDIN else str(name) for name in inputs or [STDIN])
        raise DataError(f"{', '.join(names)} holds no text. Give texts, one a line, or a table of them.")
    return texts


def _of_row(row: dict[str, Any], columns: Sequence[str], where: str) -> Text:
    cells = []
    for column in columns:
        value = row[column]
        if isinstance(value, list):
            if not value or not all(isinstance(word, str) and word.split() == [word] for word in value):
                raise DataError(
                    f"{where} has {str(value)[:60]} in {column!r}; expected a text, or a list of words."
                )
            value = " ".join(value)
        if value is None or value != value or not str(value).strip():  # NaN stands for an empty cell
            raise DataError(f"{where} has an empty {column!r}; expected a text. Remove the row.")
        cells.append(str(value))
    return Text(*cells)


def _read(path: Path, encoding: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}. Give a file of texts.") from error
    return _decoded(content, repr(str(path)), encoding)


def _decoded(content: bytes, name: str, encoding: str) -> str:
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(
            f"{name} cannot be read as {encoding}: {error}. Name its encoding: --encoding."
        ) from error


def _lines(content: str, pairs: bool) -> list[Text]:
    found = []
    # Not splitlines(): a text may hold other characters that it takes for ends of lines.
    for line in io.StringIO(content, newline=None):
        if line.strip():
            text, tab, pair = line.rstrip("\n").partition("\t") if pairs else (line.rstrip("\n"), "", "")
            found.append(Text(text, pair if tab else None))
    return found


@torch.no_grad()
def predict_texts(
    run: Run,
    texts: Sequence[Text | str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Return one prediction for each text, in order.

    Texts of about one length go through the model together, so that little of a batch is padding; in
    float32 a prediction may so differ in the last digits from that of the text alone.

    Args:
        run: from `layerwise.load_run`; one that knows its tokenizer.
        texts: strings, or `Text` for pairs.
        batch_size: texts of one forward pass.
        max_length: tokens of a text, the rest is cut off; None is what the run was trained with.
        new_tokens: how many tokens a causal language model writes at most; fewer where its positions end.

    Returns:
        Mappings with ``"text"`` and what the task decodes: label and probabilities, numbers; for tokens
        ``"words"``, their ``"tags"`` (None for the words beyond `max_length`, which ``"cut"``
        counts) and the ``"entities"``; for a causal language model its
        ``"completion"``; for a masked one the ``"fillers"`` of the masks (``"cut"`` counts those beyond
        `max_length`).

    Raises:
        RunError: the run has no tokenizer.
        DataError: a text is empty, or the second one of a pair is.
    """
    tokenizer = run.tokenizer
    if tokenizer is None:
        raise RunError(
            f"{run.path} has no tokenizer: it was not finished, was started from Python, or is no run of "
            "texts. Finish it, or give the predict() of layerwise.load_run(...) a batch of tensors."
        )
    asked = [text if isinstance(text, Text) else Text(text) for text in texts]
    if empty := [str(number) for number, text in enumerate(asked, start=1) if not text.text.strip()]:
        raise DataError(f"texts {', '.join(empty[:10])} are empty; there is nothing to predict. Remove them.")
    if run.table.get("pair_column") or any(text.pair is not None for text in asked):
        alone = [str(n) for n, text in enumerate(asked, start=1) if not (text.pair or "").strip()]
        if alone:
            raise DataError(
                f"texts {', '.join(alone[:10])} have no second text; expected pairs. Give it after a tab in "
                "a line, in the pair column of a table, or as the pair= of a Text."
            )
    length = max_length or run.about.get("data", {}).get("max_length")
    order = sorted(range(len(asked)), key=lambda index: len(asked[index].text))
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        part = [asked[index] for index in indices]
        if isinstance(run.task, TokenClassification):
            found = _tag(run, tokenizer, part, length)
        elif isinstance(run.task, LanguageModelling) and run.task.name == "causal_lm":
            found = _complete(run, tokenizer, part, length, new_tokens)
        elif isinstance(run.task, LanguageModelling):
            found = _fill(run, tokenizer, part, length)
        else:
            found = run.predict(_encode(tokenizer, part, length))
        rows |= dict(zip(indices, found, strict=True))
    shown = ({"text": t.text} if t.pair is None else {"text": t.text, "pair": t.pair} for t in asked)
    return [{**text, **rows[index]} for index, text in enumerate(shown)]


def _encode(tokenizer: Any, part: list[Text], length: int | None) -> Any:
    """Return the texts, or pairs of texts, as one padded batch."""
    pairs = [text.pair for text in part]
    options = {} if pairs[0] is None else {"text_pair": pairs}  # if one has a second text, all have
    return _batch(tokenizer, [text.text for text in part], length, **options)


def _batch(tokenizer: Any, texts: Sequence[Any], length: int | None, **options: Any) -> Any:
    from layerwise.sources.encoding import padding_side

    if length:
        options["max_length"] = length
    side = padding_side(tokenizer)
    return tokenizer(texts, padding=True, padding_side=side, truncation=True, return_tensors="pt", **options)


def _tag(run: Run, tokenizer: Any, part: list[Text], length: int | None) -> list[dict[str, Any]]:
    """Return for each text its words, the tag of each (that of its first piece), and the entities.

    Words that were cut off have no tag, and are counted.
    """
    from layerwise.sources.encoding import as_in_text
    from layerwise.training.entities import spans

    words = [text.text.split() for text in part]
    given = [as_in_text(tokenizer, row) for row in words]
    batch = _batch(tokenizer, given, length, is_split_into_words=True)
    found = []
    for index, decoded in enumerate(run.predict(batch)):
        tags: list[str | None] = [None] * len(words[index])
        seen: set[int] = set()
        for position, word in enumerate(batch.word_ids(index)):
            if word is not None and word not in seen:
                seen.add(word)
                tags[word] = decoded["tags"][position]
        entities = [
            {"type": kind, "text": " ".join(words[index][start:end]), "start": start, "end": end}
            for kind, start, end in spans([tag or "O" for tag in tags])
        ]
        cut = len(tags) - max(seen, default=-1) - 1
        found.append({"words": words[index], "tags": tags, "entities": entities, "cut": cut})
    return found


def _complete(
    run: Run, tokenizer: Any, part: list[Text], length: int | None, new_tokens: int
) -> list[dict[str, Any]]:
    """Return what the model writes after each text, greedily; prompts are written as in training."""
    from layerwise.sources.encoding import encode_givens
    from layerwise.sources.huggingface import max_length_of
    from layerwise.training.text_job import TextOptions

    model: Any = run.model
    limit = max_length_of(model, tokenizer)
    new_tokens = min(new_tokens, limit - 1)
    # Of what the model can take, the new tokens may use what the prompts leave, and half at any rate.
    room = min(length or limit, max(limit - new_tokens, limit // 2))
    options = TextOptions.of(run.table)
    template = options.prompt_template if options.response_column else "{prompt}"
    prompts = [template.replace("{prompt}", text.text) for text in part]
    rows = encode_givens(tokenizer, prompts, max_length=room)
    start = max(map(len, rows))
    padding = [start - len(ids) for ids in rows]  # at the left: generation goes on from the last position
    written = model.generate(
        input_ids=torch.tensor(
            [[tokenizer.pad_token_id] * n + ids for n, ids in zip(padding, rows, strict=True)]
        ),
        attention_mask=torch.tensor([[0] * n + [1] * (start - n) for n in padding]),
        max_new_tokens=min(new_tokens, limit - start),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(written[:, start:], skip_special_tokens=True)
    return [{"completion": text} for text in texts]


def _fill(run: Run, tokenizer: Any, part: list[Text], length: int | None) -> list[dict[str, Any]]:
    """Return the most likely token at each mask of each text, with its probability.

    Masks that were cut off are counted.
    """
    batch = _encode(tokenizer, part, length)
    masks = batch["input_ids"] == tokenizer.mask_token_id
    found = []
    for text, row, decoded in zip(part, masks, run.predict(batch), strict=True):
        at = row.nonzero().flatten().tolist()
        fillers = [
            {"token": tokenizer.decode([decoded["tokens"][i]]), "probability": decoded["probabilities"][i]}
            for i in at
        ]
        found.append({"fillers": fillers, "cut": text.text.count(tokenizer.mask_token) - len(at)})
    return found
