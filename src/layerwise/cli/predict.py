"""``layerwise predict``: labels and probabilities of images or texts, from a run."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli.options import refuse
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say
from layerwise.errors import plural

if TYPE_CHECKING:
    from layerwise.training.run import Run


@friendly
def predict(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files, folders of them, tables of their paths; files of texts; - is standard input."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION of a run whose model came from one; it is run."),
    ] = None,
    form: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print.")
    ] = "table",
    batch_size: Annotated[int, typer.Option(min=1, help="Images or texts of one forward pass.")] = 32,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    path_column: Annotated[
        str | None, typer.Option(help="Column of the image files in tables; default: as in training.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text in tables; default: as in training.")
    ] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column of the second text.")] = None,
    encoding: Annotated[
        str | None,
        typer.Option(help="Of text files; default: as in training, utf-8 of standard input alone."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that a causal language model writes at most.")
    ] = 64,
    as_json: JsonFlag = False,
) -> None:
    """Print what a run says of images or texts: labels and probabilities, numbers, entities, text.

    layerwise predict runs/a photo.jpg folder/

    layerwise predict runs/b texts.csv

    echo "a text" | layerwise predict runs/b
    """
    from layerwise.cli.tables import prediction_table
    from layerwise.training.predict import predict_images
    from layerwise.training.run import load_run

    loaded = load_run(run, model=model)
    if loaded.tokenizer is not None:
        refuse(context, ["skip_bad_images", "path_column"], f"{run} is a run on texts")
        _predict_texts(
            loaded,
            inputs or [],
            form="json" if as_json else form,
            batch_size=batch_size,
            text_column=text_column,
            pair_column=pair_column,
            encoding=encoding,
            new_tokens=new_tokens,
        )
        return
    refuse(context, ["text_column", "pair_column", "encoding", "new_tokens"], f"{run} is a run on images")
    if not inputs:
        raise typer.BadParameter(
            "give the images to predict: files, folders of them, or tables with a column of paths."
        )
    found = predict_images(
        loaded, inputs, batch_size=batch_size, skip_bad_images=skip_bad_images, path_column=path_column
    )
    for image, reason in found.skipped:
        say(f"left out {image}: {reason}")
    if as_json or form == "json":
        print_json({"predictions": found.rows, "skipped": [list(pair) for pair in found.skipped]})
    elif form == "csv":
        _print_csv(found.rows)
    else:
        print_table(prediction_table(found.rows, loaded.classes))


def _predict_texts(
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
        _print_csv(rows)
    else:
        print_table(_text_table([_flat(row, digits=3) for row in rows]))


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
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(sys.stdout, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def _text_table(rows: Sequence[Mapping[str, Any]], *, limit: int = 9) -> Any:
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
