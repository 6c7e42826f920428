"""``layerwise predict``: labels and probabilities of images, from a run."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


@friendly
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    form: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="How to print.")
    ] = "table",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one forward pass.")] = 32,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the label of each image, and its probability."""
    from layerwise.training.predict import predict_images
    from layerwise.training.run import load_run

    loaded = load_run(run)
    found = predict_images(loaded, images, batch_size=batch_size, skip_bad_images=skip_bad_images)
    for image, reason in found.skipped:
        say(f"left out {image}: {reason}")
    if as_json or form == "json":
        print_json({"predictions": found.rows, "skipped": [list(pair) for pair in found.skipped]})
    elif form == "csv":
        _print_csv(found.rows, loaded.classes)
    else:
        print_table(_table(found.rows, loaded.classes))


def _table(rows: list[dict[str, Any]], classes: tuple[str, ...]) -> Any:
    from layerwise.cli.tables import prediction_table

    return prediction_table(rows, classes)


def _print_csv(rows: Iterable[Mapping[str, Any]], classes: tuple[str, ...]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "label", "probability", *(f"p_{name}" for name in classes)])
    for row in rows:
        numbers = [row["probability"], *(row["probabilities"][name] for name in classes)]
        writer.writerow([row["image"], row["label"], *(f"{number:.6f}" for number in numbers)])
