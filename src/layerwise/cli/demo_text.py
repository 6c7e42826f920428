"""``layerwise demo text``: three ways to fine-tune a sentence encoder on real topics, in a few minutes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from layerwise.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from layerwise.training.demo import Arm, Row
    from layerwise.training.text_job import PreparedText

NO_LISTS = (
    "The demo's texts are Debian's package descriptions. Where apt knows them (a Debian machine after "
    "apt-get update) they are read from there; elsewhere give a table with the columns text and label: "
    "layerwise demo text --data FILE.csv"
)


def demo_text(
    folder: Path,
    *,
    per_topic: int,
    epochs: int | None,
    seed: int,
    data: Path | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Compare a linear probe, full fine-tuning and a selective plan on topics of texts, and print it."""
    from layerwise.errors import DataError
    from layerwise.training.text_demo import EPOCHS, run_text_demo

    began_s = time.monotonic()
    epochs = epochs or EPOCHS
    name = model or "MiniLM-L6, a sentence encoder (packaged)"
    texts = f"the table {data}"
    if data is None:
        texts = (
            f"Debian package descriptions, {per_topic} of each of 20 topics, 60% to train on, "
            "15% to validate, 25% to test, packages of one source on one side"
        )
    say(
        f"Model: {name}, classified by the mean of its tokens. Texts: {texts}. Every run: {epochs} epochs, "
        f"seed {seed}."
    )
    try:
        done = run_text_demo(
            folder,
            per_topic=per_topic,
            epochs=epochs,
            seed=seed,
            data=None if data is None else str(data.resolve()),
            model=model,
            on_arm=_describe,
        )
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}\n{NO_LISTS}") from error
    seconds = time.monotonic() - began_s
    example = done.examples[0] if done.examples else "a text"
    command = f"echo {shlex.quote(example)} | layerwise predict {shlex.quote(done.rows[-1].run)}"
    if as_json:
        print_json(
            {
                "model": name,
                "texts": {"data": str(data or "Debian package descriptions"), "per_topic": per_topic},
                "epochs": epochs,
                "seed": seed,
                "rows": [row.to_dict() for row in done.rows],
                "seconds": round(seconds, 1),
                "predict": command,
            }
        )
        return
    print_table(_table(done.rows))
    print_table(
        f"All of it took {seconds:.0f} seconds. The runs are in {folder}; in each lies transformers/,"
    )
    print_table("a folder that transformers loads. Predict with one of them:")
    typer.echo(f"  {command}")


def _describe(arm: Arm, prepared: PreparedText) -> None:
    """Say what is frozen, what learns and at which rate."""
    phase, layers = prepared.plan.phases[0], prepared.layers
    rates = {name: phase.rate(name) * arm.lr for name in layers.names}
    frozen = [name for name, rate in rates.items() if rate == 0]
    say(f"\n{arm.name}: {prepared.plan.strategy}")
    for note in prepared.data.notes:
        say(f"  {note}")
    say(f"  frozen: {', '.join(frozen) or 'nothing'}")
    say("  rates:  " + ", ".join(f"{name} {rate:.2e}" for name, rate in rates.items() if rate > 0))


def _table(rows: tuple[Row, ...]) -> Any:
    from layerwise.cli.tables import new_table

    title = "Test texts, weights of the epoch that was best on validation"
    table = new_table(title, ["strategy", "accuracy", "macro F1", "trained parameters", "seconds"])
    for row in rows:
        share = row.trained_parameters / row.total_parameters
        scores = (f"{score:.3f}" for score in (row.accuracy, row.macro_f1))
        table.add_row(row.arm, *scores, f"{row.trained_parameters:,} ({share:.1%})", f"{row.seconds:.0f}")
    return table
