"""``layerwise demo text``: three ways to fine-tune a sentence encoder on real topics, in a few minutes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from layerwise.cli.demo_output import describe_arm, show_demo
from layerwise.cli.output import pasted, say

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
    from layerwise.errors import DataError, plural
    from layerwise.sources.tables import read_rows
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
        f"Model: {name}, classified by the mean of its tokens. Texts: {texts}. "
        f"Every run: {plural(epochs, 'epoch')}, seed {seed}."
    )
    if data is not None and data.is_file():
        read_rows(data, ("text", "label"))  # what misses here, fit would tell with options of its own
    try:
        done = run_text_demo(
            folder,
            per_topic=per_topic,
            epochs=epochs,
            seed=seed,
            data=None if data is None else str(data.resolve()),
            model=model,
            on_arm=describe_arm,
        )
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}\n{NO_LISTS}") from error
    example = done.examples[0] if done.examples else "a text"
    show_demo(
        done.rows,
        about={
            "model": name,
            "texts": {"data": str(data or "Debian package descriptions"), "per_topic": per_topic},
            "epochs": epochs,
            "seed": seed,
        },
        what="texts",
        seconds=time.monotonic() - began_s,
        where=f"The runs are in {folder}; in each lies transformers/, a folder that transformers loads.",
        command=f"echo {shlex.quote(example)} | layerwise predict {pasted(done.rows[-1].run)}",
        as_json=as_json,
    )
