"""The options of ``fit`` that concern texts, and how ``predict`` prints what a run says of texts."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli.output import above_zero, print_json, print_table, say
from layerwise.errors import plural

if TYPE_CHECKING:
    from layerwise.training.run import Run

_TEXT = "Texts (with hf: models)"
_TABLE = "Tables"

TextTask = Literal[
    "text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm"
]
Task = Annotated[
    TextTask | None,
    typer.Option(
        "--task",
        metavar="<kind>",  # all six are too wide for their column
        help="What the labels are: text_classification (one class a text), multi_label, regression, "
        "token_classification, causal_lm or masked_lm.",
        show_default="text_classification",
        rich_help_panel=_TEXT,
    ),
]


def _option(help: str, **limits: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_TEXT, **limits)


TextColumn = Annotated[str | None, _option("Column of the text; text.")]
PairColumn = Annotated[str | None, _option("Column of the second text of a pair.")]
PathColumn = Annotated[
    str | None,
    typer.Option(help="Column of the image files, relative to the table; path.", rich_help_panel=_TABLE),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of the label, the number or the tags; label.", rich_help_panel=_TABLE),
]
ResponseColumn = Annotated[
    str | None, _option("causal_lm: column of what is learned; the text is its prompt.")
]
GroupColumn = Annotated[str | None, _option("Rows with one value in it stay on one side of the split.")]
SplitColumn = Annotated[
    str | None, typer.Option(help="Column that says train, val or test.", rich_help_panel=_TABLE)
]
ValData = Annotated[Path | None, _option("A table to validate on.")]
TestData = Annotated[Path | None, _option("A table to test on.")]
Encoding = Annotated[str | None, _option("Of text files; utf-8.")]
LabelSeparator = Annotated[str | None, _option("multi_label: between the labels of a row; a comma.")]
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows", help="Leave out rows without path, text or label.", rich_help_panel=_TABLE
    ),
]
MaxLength = Annotated[int | None, _option("Tokens of a text at most; 256.", min=2)]
Padding = Annotated[
    Literal["auto", "batch", "all"] | None,
    _option("To one of a few lengths (auto), to the longest text of a batch (not cached), or of all."),
]
Pooling = Annotated[
    Literal["model", "mean"] | None,
    _option("Classify as the model's class does, or by the mean of all tokens (sentence encoders)."),
]
LmEpochs = Annotated[
    int | None, _option("First tune the language model on the texts for so many epochs (ULMFiT).", min=0)
]
LmLr = Annotated[float | None, _option("Base learning rate of that; 5e-5.", callback=above_zero)]
LmStrategy = Annotated[str | None, _option("Strategy of that; discriminative:decay=0.9.")]


def text_options(**given: Any) -> dict[str, Any] | None:
    """Return what was said of a table, as `Job.text` keeps it; None for nothing.

    Relative paths become absolute ones, so that a run can be resumed from another folder.
    """
    found = {name: value for name, value in given.items() if value not in (None, False)}
    for name in ("val", "test"):
        if name in found:
            found[name] = str(Path(found[name]).resolve())
    return found or None


def predict_and_print(
    run: Run,
    inputs: Sequence[Path],
    *,
    form: str,
    batch_size: int,
    text_column: str | None,
    pair_column: str | None,
    encoding: str | None,
    new_tokens: int,
) -> None:
    """Print what a run says of the texts in some files, or on standard input."""
    from layerwise.sources.texttable import default_text_column
    from layerwise.training.text_predict import STDIN, predict_texts, read_texts

    # What is typed or piped is the shell's, whatever the files of training were in.
    typed = all(str(name) == STDIN for name in inputs)
    texts = read_texts(
        inputs,
        text_column=text_column or run.table.get("text_column") or default_text_column(run.task.name),
        pair_column=pair_column or run.table.get("pair_column"),
        encoding=encoding or (None if typed else run.table.get("encoding")) or "utf-8",
    )
    rows = predict_texts(run, texts, batch_size=batch_size, new_tokens=new_tokens)
    if cut := sum(row["cut"] for row in rows if "fillers" in row):
        were = plural(
            cut, "mask was cut off with the end of its text", "masks were cut off with the ends of texts"
        )
        say(f"{were}, of which the run reads {run.about['data']['max_length']} tokens; put masks before that")
    elif all(row.get("fillers") == [] for row in rows):
        mask = run.tokenizer.mask_token
        say(f"no text holds {mask}, so there is nothing to fill in; write it where a word is asked for")
    if form == "json":
        print_json({"predictions": rows})
    elif form == "csv":
        _print_csv([_flat(row) for row in rows])
    else:
        print_table(_table([_flat(row, digits=3) for row in rows]))


def _flat(row: Mapping[str, Any], *, digits: int = 6) -> dict[str, Any]:
    """Return a prediction as cells: probabilities as columns with so many digits, lists as words."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities" and isinstance(value, Mapping):
            cells |= {f"p_{key}": f"{number:.{digits}f}" for key, number in value.items()}
        elif name == "probability":
            cells[name] = f"{value:.{digits}f}"
        elif name == "entities":
            cells[name] = "; ".join(f"{entity['text']} ({entity['type']})" for entity in value)
        elif name == "fillers":
            cells[name] = " ".join(f"{filler['token']} ({filler['probability']:.2f})" for filler in value)
        elif name in ("words", "tags"):
            cells[name] = " ".join(entry or "-" for entry in value)  # words that were cut off have no tag
        elif isinstance(value, float):
            cells[name] = f"{value:.6f}"
        else:
            cells[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return cells


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _table(rows: Sequence[Mapping[str, Any]], *, limit: int = 9) -> Any:
    """Return a table for people: long texts are cut, and probabilities left out that have no room."""
    from layerwise.cli.tables import new_table

    names = [name for name in rows[0] if name != "words"]
    if len(names) > limit:
        names = [name for name in names if not name.startswith("p_")]
    of_classes = [name for name in names if name.startswith("p_")]
    numbers = len(of_classes) + ("probability" in names)
    table = new_table("", names, left=len(names) - numbers, spare=len(of_classes))
    for row in rows:
        table.add_row(*(_short(str(row[name])) for name in names))
    return table


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
