"""``layerwise demo``: three ways to fine-tune a real network on real photos, in a few minutes."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli.demo_text import demo_text
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say

if TYPE_CHECKING:
    from layerwise.training.demo import Arm, Row
    from layerwise.training.job import Prepared


@friendly
def demo(
    what: Annotated[
        Literal["images", "text"],
        typer.Argument(help="Solar cells and an image network, or topics and a sentence encoder."),
    ] = "images",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: a new one below runs/.")
    ] = None,
    train: Annotated[int, typer.Option(min=8, help="Training images.")] = 800,
    val: Annotated[int, typer.Option(min=4, help="Validation images.")] = 300,
    test: Annotated[int, typer.Option(min=4, help="Test images.")] = 600,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each run; 4.")] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Side of the images in pixels.")] = 128,
    per_topic: Annotated[int, typer.Option(min=8, help="text: texts of each of the 20 topics.")] = 60,
    data: Annotated[Path | None, typer.Option(help="text: a table with the columns text and label.")] = None,
    model: Annotated[str | None, typer.Option(help="text: another encoder, as hf:FOLDER.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of split, head and order.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compare a linear probe, full fine-tuning and a selective plan on photos of solar cells, or on texts."""
    from layerwise.sources.demo import DEMO_MODEL
    from layerwise.training.demo import EPOCHS, run_demo

    began_s = time.monotonic()
    folder = out or _new_folder(Path("runs"), "demo" if what == "images" else "demo-text")
    if what == "text":
        demo_text(
            folder,
            per_topic=per_topic,
            epochs=epochs,
            seed=seed,
            data=data,
            model=model,
            as_json=as_json,
        )
        return
    epochs = epochs or EPOCHS
    say(
        f"Model: {DEMO_MODEL}, pretrained on ImageNet. Images: ELPV, electroluminescence photos of solar "
        f"cells, functional or defective; {image_size} px, {train} to train on, {val} to validate, {test} to "
        f"test. Every run: {epochs} epochs, seed {seed}."
    )
    done = run_demo(
        folder,
        sizes=(train, val, test),
        epochs=epochs,
        seed=seed,
        image_size=image_size,
        on_arm=_describe,
    )
    seconds = time.monotonic() - began_s
    images = " ".join(map(shlex.quote, done.examples))
    command = f"layerwise predict {shlex.quote(done.rows[-1].run)} {images}"
    if as_json:
        print_json(
            {
                "model": DEMO_MODEL,
                "images": {"data": "ELPV", "size": image_size, "train": train, "val": val, "test": test},
                "epochs": epochs,
                "seed": seed,
                "rows": [row.to_dict() for row in done.rows],
                "seconds": round(seconds, 1),
                "predict": command,
            }
        )
        return
    print_table(_table(done.rows))
    print_table(f"All of it took {seconds:.0f} seconds. The runs are in {folder}. Predict with one of them:")
    typer.echo(f"  {command}")


def _describe(arm: Arm, prepared: Prepared) -> None:
    """Say what is frozen, what learns and at which rate."""
    from layerwise.training.demo import frozen_norms_of

    phase, layers = prepared.plan.phases[0], prepared.layers
    rates = {name: phase.rate(name) * arm.lr for name in layers.names}
    frozen = [name for name, rate in rates.items() if rate == 0]
    norms, total = frozen_norms_of(prepared)
    say(f"\n{arm.name}: {prepared.plan.strategy}")
    say(f"  frozen: {', '.join(frozen) or 'nothing'}")
    say("  rates:  " + ", ".join(f"{name} {rate:.2e}" for name, rate in rates.items() if rate > 0))
    say(f"  batch-norm: {norms} of {total} keep their pretrained statistics")


def _table(rows: tuple[Row, ...]) -> Any:
    from layerwise.cli.tables import new_table

    title = "Test images, weights of the epoch that was best on validation"
    table = new_table(
        title, ["strategy", "balanced accuracy", "macro F1", "accuracy", "trained parameters", "seconds"]
    )
    for row in rows:
        share = row.trained_parameters / row.total_parameters
        scores = (f"{score:.3f}" for score in (row.balanced_accuracy, row.macro_f1, row.accuracy))
        table.add_row(row.arm, *scores, f"{row.trained_parameters:,} ({share:.1%})", f"{row.seconds:.0f}")
    return table


def _new_folder(parent: Path, name: str) -> Path:
    """Return `parent`/`name`, or with the first number behind it that is free."""
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder
