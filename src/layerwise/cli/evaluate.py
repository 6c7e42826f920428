"""``layerwise evaluate``: loss and metrics of a run on labelled data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from layerwise.cli import text
from layerwise.cli.options import refuse
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


@friendly
def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[
        Path, typer.Argument(help="Folder with a folder of images a class, a table of paths, or of texts.")
    ],
    part: Annotated[
        Literal["train", "val", "test"] | None,
        typer.Option(help="Of data that have parts.", show_default="test"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="FILE.py:FUNCTION of a run whose model came from one; it is run."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of one forward pass.")] = 32,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    path_column: text.PathColumn = None,
    label_column: text.LabelColumn = None,
    split_column: text.SplitColumn = None,
    skip_bad_rows: text.SkipBadRows = False,
    text_column: text.TextColumn = None,
    pair_column: text.PairColumn = None,
    response_column: text.ResponseColumn = None,
    encoding: text.Encoding = None,
    label_separator: text.LabelSeparator = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a run on labelled images or texts: loss, metrics, each class.

    Columns and encoding of a table are those of training where they are not named.

    layerwise evaluate runs/a photos-of-2025/

    layerwise evaluate runs/b texts.csv --label-column topic
    """
    from layerwise.cli.tables import scores_tables
    from layerwise.training.labelled import open_labelled
    from layerwise.training.run import load_run

    loaded = load_run(run, model=model)
    if loaded.tokenizer is not None:
        refuse(context, ["skip_bad_images", "path_column"], f"{run} is a run on texts")
    else:
        of_texts = ["text_column", "pair_column", "response_column", "encoding", "label_separator"]
        refuse(context, of_texts, f"{run} is a run on images")
    samples, notes = open_labelled(
        loaded,
        data,
        part=part,
        skip_bad_images=skip_bad_images,
        path_column=path_column,
        label_column=label_column,
        split_column=split_column,
        skip_bad_rows=skip_bad_rows,
        text_column=text_column,
        pair_column=pair_column,
        response_column=response_column,
        encoding=encoding,
        label_separator=label_separator,
    )
    for note in notes:
        say(note)
    scores = loaded.evaluate(samples, batch_size=batch_size)
    if as_json:
        print_json({"samples": len(samples), "metrics": scores.values, "tables": scores.tables})
        return
    for table in scores_tables(scores, len(samples), loaded.classes):
        print_table(table)
