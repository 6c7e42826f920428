"""``layerwise report``: a page to look at, about a run or a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.output import JsonFlag, check_output, friendly, print_json


@friendly
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a run or of a search.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write; report.html in the folder.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write one HTML page about a run or a search: rates, curves, tables, settings.

    layerwise report runs/a
    """
    check_output(out, "-o")
    from layerwise.report.page import write_report

    written = write_report(path, out)
    if as_json:
        print_json({"path": str(written), "bytes": written.stat().st_size})
    else:
        typer.echo(str(written))
