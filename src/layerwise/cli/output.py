"""How every command prints: tables for people, JSON for machines, errors on stderr."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from layerwise.errors import LayerwiseError, LayerwiseWarning, first_line
from layerwise.files import FULL, is_special, with_nulls

P = ParamSpec("P")
R = TypeVar("R")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]

_shown_by_python = warnings.showwarning

debug = False
"""Set by ``layerwise --debug``: let errors through with their traceback."""


def print_json(data: Any) -> None:
    """Print `data` as one JSON document on stdout; numbers that are not finite are null.

    Escaped where stdout is not UTF-8 or a name is no text.
    """
    data = with_nulls(data)
    text = json.dumps(data, indent=2, default=str, ensure_ascii=False)
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    if not utf8 or any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(data, indent=2, default=str)
    sys.stdout.write(text + "\n")


def pasted(path: str | Path) -> str:
    """Return a path as a shell takes it for an argument: quoted, and a dash at its start is no option.

    >>> pasted("my run"), pasted("-run")
    ("'my run'", './-run')
    """
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def say(message: str) -> None:
    """Print one line for people on stderr, so that stdout holds results alone."""
    typer.echo(message, err=True)


def print_table(table: Any) -> None:
    """Print a Rich table (or anything Rich prints) on stdout; 110 columns wide outside of a terminal."""
    from rich.console import Console

    plain: Any = {"markup": False, "emoji": False}  # names of classes and texts may hold [red] or :x:
    console = Console(**plain)
    if not console.is_terminal:
        console = Console(width=110, **plain)
    console.print(table)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, LayerwiseWarning):
        say(f"warning: {message}")
    elif category.__name__ != "DecompressionBombWarning":  # Pillow's; `read_image` names the file
        _shown_by_python(message, category, *where, **more)


def given_options(ctx: typer.Context) -> dict[str, str]:
    """Return the options that the command line names: parameter -> option."""
    found = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT":
            names = parameter.opts if ctx.params.get(parameter.name) else parameter.secondary_opts
            found[str(parameter.name)] = (names or parameter.opts)[0]
    return found


def above_zero(value: float | None) -> float | None:
    """Return the number of an option.

    Raises:
        BadParameter: it is not above 0, or infinite.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is given; expected a finite number above 0.")
    return value


def seed_of_all(value: int) -> int:
    """Return the number of ``--seed``; numpy takes no others.

    Raises:
        BadParameter: it is below 0, or not below 2**32.
    """
    if not 0 <= value < 2**32:
        raise typer.BadParameter(f"{value} is given; expected a whole number from 0 to 2**32 - 1.")
    return value


def share(value: float) -> float:
    """Return the number of an option that is a share of the data.

    Raises:
        BadParameter: it is below 0, or not below 1.
    """
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is given; expected a share of at least 0 and below 1.")
    return value


def check_output(
    path: Path | None, option: str, *, new: bool = False, folder: bool = False, outside: str | None = None
) -> None:
    """Look whether a file can be written to `path`, before any long work.

    Args:
        path: of the file; None is none.
        option: that names it.
        new: nothing may be there yet.
        folder: a folder is to be made there, with those above it.
        outside: folder of the data, in which it may not lie.

    Raises:
        BadParameter: it cannot be written.
    """
    if path is None:
        return
    if outside is not None and path.resolve().is_relative_to(Path(outside).resolve()):
        raise typer.BadParameter(
            f"{option} {path} lies in the data {outside}, so its files would be taken for data. Name a "
            "folder outside of the data."
        )
    above = path.absolute().parent
    if folder:
        above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not folder and path.is_dir():
        raise typer.BadParameter(f"{option} {path} is a folder; name a file in it.")
    if folder and path.is_symlink() and not path.exists():
        raise typer.BadParameter(f"{option} {path} is a link to nothing. Name another place.")
    if is_special(path):
        raise typer.BadParameter(f"{option} {path} is a device or a pipe; name a file.")
    if new and path.exists():
        raise typer.BadParameter(f"{path} is there already; give another name to {option}, or remove it.")
    if not above.is_dir():
        what = "is a file" if above.exists() else "does not exist"
        raise typer.BadParameter(f"{option} {path} cannot be written: {above} {what}. Name another place.")
    if not os.access(above, os.W_OK):
        raise typer.BadParameter(f"{option} {path} cannot be written: no right to write in {above}.")


def _told(error: Exception) -> str:
    """Return what to tell of an error of layerwise, of the system or of memory; ``""`` for all others."""
    if isinstance(error, LayerwiseError):
        return f"{type(error).__name__}: {error}"
    if _too_large(error):
        return (
            f"memory does not suffice ({first_line(error)}). Take a smaller model, or smaller numbers: of "
            "pixels, classes, samples of a batch."
        )
    cause: BaseException = error
    if str(error).startswith("Symlink loop") and isinstance(error.__context__, OSError):
        cause = error.__context__  # of Path.resolve, before Python 3.13
    if type(cause).__name__ == "SafetensorError":
        return str(cause)
    if not isinstance(cause, OSError):
        return ""
    where = f"{cause.filename} cannot be read or written: " if cause.filename else ""
    what_next = ". Make room, or name another place." if cause.errno in FULL else ""
    return f"{where}{cause.strerror or cause}{what_next}"


def _too_large(error: Exception) -> bool:
    """Return whether Python or torch says that something does not fit into memory, or into any."""
    told = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(reason in str(error) for reason in told)
    )


def friendly(command: Callable[P, R]) -> Callable[P, R]:
    """Turn layerwise's own errors, the system's and a want of memory into one message and exit code 1.

    Ctrl-C is exit code 130.

    layerwise's warnings become one line each, without the place in the code that gave them.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of stdout has enough: typer's own affair
        except Exception as error:
            told = "" if debug else _told(error)
            if not told:
                raise
            say(told)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            say(f"Interrupted; {error}" if str(error) else "Interrupted.")
            raise typer.Exit(130) from error

    return run
