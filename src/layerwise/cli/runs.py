"""``layerwise runs``: what several runs came to, side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json, print_table


@friendly
def runs(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or with runs in them.")],
    as_json: JsonFlag = False,
) -> None:
    """List runs and what they came to, the best on validation first.

    layerwise runs runs/
    """
    from layerwise.cli.tables import runs_tables
    from layerwise.training.run_list import list_runs

    found = list_runs(folders)
    if as_json:
        print_json([{**dataclasses.asdict(run), "path": str(run.path)} for run in found])
    else:
        for table in runs_tables(found):
            print_table(table)
