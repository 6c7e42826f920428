"""``layerwise demo``: three ways to fine-tune a real network on real photos, in a few minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from layerwise.cli.demo_output import describe_arm, show_demo
from layerwise.cli.demo_text import demo_text
from layerwise.cli.options import refuse
from layerwise.cli.output import JsonFlag, check_output, friendly, pasted, say, seed_of_all

if TYPE_CHECKING:
    from layerwise.training.demo import Arm
    from layerwise.training.job import Prepared


@friendly
def demo(
    context: typer.Context,
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
    seed: Annotated[int, typer.Option(help="Of split, head and order.", callback=seed_of_all)] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compare a linear probe, full fine-tuning and a selective plan on photos of solar cells, or on texts."""
    from layerwise.errors import plural
    from layerwise.sources.demo import DEMO_MODEL, elpv_sizes
    from layerwise.training.demo import EPOCHS, run_demo

    if what == "text":
        refuse(context, ["train", "val", "test", "image_size"], "it is of the demo on images")
    else:
        refuse(context, ["per_topic", "data", "model"], "it is of the demo on texts (layerwise demo text)")
    began_s = time.monotonic()
    folder = out or _new_folder(Path("runs"), "demo" if what == "images" else "demo-text")
    check_output(folder, "--out", folder=True)
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
    asked = (train, val, test)
    train, val, test = elpv_sizes(asked, seed=seed)  # classes keep their shares, so not quite what is asked
    say(
        f"Model: {DEMO_MODEL}, pretrained on ImageNet. Images: ELPV, electroluminescence photos of solar "
        f"cells, functional or defective; {image_size} px, {train} to train on, {val} to validate, {test} to "
        f"test. Every run: {plural(epochs, 'epoch')}, seed {seed}."
    )
    done = run_demo(
        folder,
        sizes=asked,
        epochs=epochs,
        seed=seed,
        image_size=image_size,
        on_arm=_describe,
    )
    show_demo(
        done.rows,
        about={
            "model": DEMO_MODEL,
            "images": {"data": "ELPV", "size": image_size, "train": train, "val": val, "test": test},
            "epochs": epochs,
            "seed": seed,
        },
        what="images",
        seconds=time.monotonic() - began_s,
        where=f"The runs are in {folder}.",
        command=f"layerwise predict {pasted(done.rows[-1].run)}",
        files=done.examples,
        as_json=as_json,
    )


def _describe(arm: Arm, prepared: Prepared) -> None:
    """Say what is frozen, what learns and at which rate."""
    from layerwise.training.demo import frozen_norms_of

    describe_arm(arm, prepared)
    norms, total = frozen_norms_of(prepared)
    say(f"  batch-norm: {norms} of {total} keep their pretrained statistics")


def _new_folder(parent: Path, name: str) -> Path:
    """Return `parent`/`name`, or with the first number behind it that is free."""
    folder, number = parent / name, 2
    while folder.exists():
        folder, number = parent / f"{name}-{number}", number + 1
    return folder
