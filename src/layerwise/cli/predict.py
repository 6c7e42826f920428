"""``layerwise predict``: labels and probabilities of images or texts, from a run."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layerwise.cli import text
from layerwise.cli.options import refuse
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


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
        text.predict_and_print(
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
        _print_csv(found.rows, loaded.classes)
    else:
        print_table(prediction_table(found.rows, loaded.classes))


def _print_csv(rows: Iterable[Mapping[str, Any]], classes: tuple[str, ...]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "label", "probability", *(f"p_{name}" for name in classes)])
    for row in rows:
        numbers = [row["probability"], *(row["probabilities"][name] for name in classes)]
        writer.writerow([row["image"], row["label"], *(f"{number:.6f}" for number in numbers)])
