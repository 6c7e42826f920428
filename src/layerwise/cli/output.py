"""How every command prints: tables for people, JSON for machines, errors on stderr."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]

_shown_by_python = warnings.showwarning

debug = False
"""Set by ``layerwise --debug``: let errors through with their traceback."""


def print_json(data: Any) -> None:
    """Print `data` as one JSON document on stdout."""
    json.dump(data, sys.stdout, indent=2, default=str, ensure_ascii=False)
    sys.stdout.write("\n")


def say(message: str) -> None:
    """Print one line for people on stderr, so that stdout holds results alone."""
    typer.echo(message, err=True)


def print_table(table: Any) -> None:
    """Print a Rich table (or anything Rich prints) on stdout; 110 columns wide outside of a terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(table)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    from layerwise.errors import LayerwiseWarning

    if issubclass(category, LayerwiseWarning):
        say(f"warning: {message}")
    else:
        _shown_by_python(message, category, *where, **more)


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Turn layerwise's own errors into one message on stderr and exit code 1, Ctrl-C into 130.

    layerwise's warnings become one line each, without the place in the code that gave them.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from layerwise.errors import LayerwiseError

        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except LayerwiseError as error:
            if debug:
                raise
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo(f"Interrupted; {error}" if str(error) else "Interrupted.", err=True)
            raise typer.Exit(130) from error

    return run
