"""The ``layerwise`` command: global options, and the list of its commands in plain sight."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from layerwise import __version__
from layerwise.cli import (
    advise,
    audit,
    cache,
    curve,
    demo,
    diagnose,
    fit,
    inspect,
    output,
    plan,
    predict,
    report,
    search,
    signature,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Selective fine-tuning: which layers learn, when, how fast, and what their normalisation does.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set what holds for all commands."""
    output.debug = debug


app.command("inspect")(inspect.inspect)
app.command("fit")(fit.fit)
app.command("plan")(plan.plan)
app.command("predict")(predict.predict)
app.command("demo")(demo.demo)
app.command("audit")(audit.audit)
app.add_typer(cache.app, name="cache")
app.command("diagnose")(diagnose.diagnose)
app.command("advise")(advise.advise)
app.command("search")(search.search)
app.command("signature")(signature.signature)
app.command("report")(report.report)
app.command("curve")(curve.curve)


def main() -> None:
    """Run the command line; what the terminal's encoding lacks is printed as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
