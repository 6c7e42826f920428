"""The ``layerwise`` command: global options, and the list of its commands in plain sight."""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from layerwise import __version__
from layerwise.cli import (
    advise,
    audit,
    cache,
    curve,
    demo,
    diagnose,
    evaluate,
    fit,
    inspect,
    output,
    plan,
    predict,
    report,
    runs,
    search,
    signature,
)


class _Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty text, as an unset variable of a shell is; a path would be the current folder."""
        for before, text in zip(["layerwise", *args], args):
            name, equals, value = text.partition("=")
            if not text or (name.startswith("--") and equals and not value):
                raise typer.BadParameter(
                    f"an empty text is given after {name or before!r}; expected a value (a path of . is "
                    "the current folder). Is a variable of the shell unset?"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what typer says of an illegal value lacks the value, which is put in."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            if isinstance(error.__cause__, ValidationError):
                found = error.__cause__.errors()[0]
                message = found["msg"].replace("Input should be", f"{found['input']!r} is given; expected")
                error.message = message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    cls=_Commands,
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
app.command("evaluate")(evaluate.evaluate)
app.command("runs")(runs.runs)
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
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: what a full disk cuts short would be no error
        whole = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(whole, encoding=sys.stdout.encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    gc.set_threshold(10_000, *gc.get_threshold()[1:])  # imports make a million objects, and no garbage
    try:
        app()
    finally:
        _end_output(sys.stdout)


def _end_output(stream: Any) -> None:
    """Write what is left of the output; where that fails, say so and exit with 1.

    Else Python tries it once more at its end, and tells an error that is "ignored".
    """
    try:
        if stream is not None:  # so it is where it was closed before
            stream.flush()
    except OSError as error:
        typer.echo(f"standard output cannot be written: {error.strerror}. Name another place.", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(1) from error
