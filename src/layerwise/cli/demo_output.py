"""What the two demos print: before each arm what it does, at the end the table of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from layerwise.cli.output import pasted, print_json, print_table, say
from layerwise.cli.tables import new_table
from layerwise.errors import percent

if TYPE_CHECKING:
    from layerwise.training.demo import Arm, Row
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText


def describe_arm(arm: Arm, prepared: Prepared | PreparedText) -> None:
    """Say what is frozen, what learns and at which rate."""
    phase, layers = prepared.plan.phases[0], prepared.layers
    rates = {name: phase.rate(name) * arm.lr for name in layers.names}
    frozen = [name for name, rate in rates.items() if rate == 0]
    say(f"\n{arm.name}: {prepared.plan.strategy}")
    for note in prepared.notes:
        say(f"  {note}")
    say(f"  frozen: {', '.join(frozen) or 'nothing'}")
    say("  rates:  " + ", ".join(f"{name} {rate:.2e}" for name, rate in rates.items() if rate > 0))


def show_demo(
    rows: Sequence[Row],
    *,
    about: Mapping[str, Any],
    what: Literal["images", "texts"],
    seconds: float,
    where: str,
    command: str,
    files: Sequence[str] = (),
    as_json: bool,
) -> None:
    """Print the closing table, or everything as JSON.

    Args:
        rows: one for each arm.
        about: model, data, epochs and seed, for JSON.
        what: kind of the data.
        seconds: of the whole demo.
        where: a sentence about the runs' folder.
        command: that predicts with the last run.
        files: to end it with; each is printed on a line of its own, so that a terminal breaks none.
        as_json: JSON in place of the table.
    """
    names = [pasted(_from_here(file)) for file in files]
    if as_json:
        print_json(
            {
                **about,
                "rows": [row.to_dict() for row in rows],
                "seconds": round(seconds, 1),
                "predict": " ".join([command, *names]),
            }
        )
        return
    table = new_table(
        f"Test {what}, weights of the epoch that was best on validation",
        ["strategy", "balanced accuracy", "macro F1", "accuracy", "trained parameters", "seconds"],
    )
    for row in rows:
        share = percent(row.trained_parameters, row.total_parameters)
        scores = (f"{score:.3f}" for score in (row.balanced_accuracy, row.macro_f1, row.accuracy))
        table.add_row(row.arm, *scores, f"{row.trained_parameters:,} ({share}%)", f"{row.seconds:.0f}")
    print_table(table)
    print_table(f"All of it took {seconds:.0f} seconds. {where} Predict with one of them:")
    typer.echo("  " + " \\\n    ".join([command, *names]))


def _from_here(file: str) -> str:
    """Return the path of a file below the current folder as seen from there, of any other as it is."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
