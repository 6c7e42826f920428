"""``layerwise cache``: what is in a folder of cached prefixes, and how to be rid of it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json

app = typer.Typer(no_args_is_help=True, help="List or remove cached outputs of frozen layers.")

Folder = Annotated[Path, typer.Argument(help="Folder that was given as PrefixCache(folder=...).")]


@app.command("ls")
@friendly
def list_columns(folder: Folder, as_json: JsonFlag = False) -> None:
    """List the cached values in FOLDER: what they are, for how many samples, how large, how old."""
    from layerwise.cache.store.room import format_bytes
    from layerwise.cache.store.shelf import entries
    from layerwise.errors import plural

    _check(folder)
    found = entries(folder)
    if as_json:
        print_json(
            [
                {"key": e.key, "what": e.what, "rows": e.rows, "bytes": e.nbytes, "modified_s": e.modified_s}
                for e in found
            ]
        )
        return
    for entry in found:
        when = datetime.datetime.fromtimestamp(entry.modified_s).strftime("%Y-%m-%d %H:%M")
        size = format_bytes(entry.nbytes)
        typer.echo(f"{entry.key[:12]}  {when}  {size:>9}  {entry.rows:>8} samples  {entry.what}")
    total = format_bytes(sum(entry.nbytes for entry in found))
    typer.echo(f"{plural(len(found), 'cached value')}, {total}")


@app.command("rm")
@friendly
def remove_columns(
    folder: Folder,
    keys: Annotated[list[str] | None, typer.Argument(help="Beginnings of the keys to remove.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove cached values from FOLDER: those whose keys begin with KEYS, or all of them."""
    from layerwise.cache.store.room import format_bytes
    from layerwise.cache.store.shelf import remove
    from layerwise.errors import plural

    _check(folder)
    if bool(keys) == everything:
        typer.echo("Name the keys to remove, or pass --all.", err=True)
        raise typer.Exit(2)
    gone = remove(folder, None if everything else keys)
    if as_json:
        print_json([entry.key for entry in gone])
        return
    freed = format_bytes(sum(entry.nbytes for entry in gone))
    typer.echo(f"removed {plural(len(gone), 'cached value')}, {freed}")


def _check(folder: Path) -> None:
    from layerwise.errors import CacheError

    if not folder.is_dir():
        raise CacheError(
            f"there is no folder {folder}. Name the one that was given to PrefixCache(folder=...)."
        )
