"""``layerwise advise``: a plan for a model and its data, with reasons."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from layerwise.cli.options import (
    BatchSizeOption,
    SamplesOption,
    SignatureOption,
    SourceOption,
    TaskOptions,
    ValFracOption,
    with_task,
)
from layerwise.cli.output import JsonFlag, check_output, friendly, print_json, print_table, say

if TYPE_CHECKING:
    from layerwise.choosing.advice import Advice


@friendly
@with_task
def advise(
    task: TaskOptions,
    source: SourceOption = None,
    signature: SignatureOption = None,
    pretraining: Annotated[
        Literal["supervised", "self_supervised", "unknown"],
        typer.Option(
            metavar="<kind>", help="supervised, self_supervised or unknown: sets the decay of the rates."
        ),
    ] = "unknown",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Length of the plan; by the number of samples.")
    ] = None,
    batch_size: BatchSizeOption = 32,
    val_frac: ValFracOption = 0.2,
    max_samples: SamplesOption = 512,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which layers to train and how, with every reason, its figure and its confidence.

    layerwise advise timm:resnet18 --data photos -o plan.yaml
    """
    check_output(out, "-o", new=True)
    from layerwise.choosing.advice import advise as ask
    from layerwise.choosing.named import check_source, open_source

    known = check_source(source, signature)
    prepared = task.open(val_frac=val_frac)
    found = ask(
        prepared.opened.model,
        prepared.data.train,
        open_source(prepared.opened, source, known, text=task.text),
        layers=prepared.layers,
        epochs=epochs,
        batch_size=batch_size,
        pretraining=pretraining,
        max_samples=max_samples,
        seed=task.seed,
    )
    if out is not None:
        found.plan.save(out)
        given = {"batch_size": (batch_size, 32), "val_frac": (val_frac, 0.2)}  # the advice is for these
        options = {**found.fit_options, **{key: now for key, (now, usual) in given.items() if now != usual}}
        more = "".join(f" --{key.replace('_', '-')} {value}" for key, value in options.items())
        say(f"wrote {out}; train with it: {task.fit_command()} --plan {shlex.quote(str(out))} --lr "
            f"{found.lr:g}{more} --out RUN")  # fmt: skip
    if as_json:
        print_json(found.to_dict())
        return
    show(found)


def show(found: Advice) -> None:
    """Print advice: what, why, what else, and the plan."""
    from layerwise.cli.choosing_tables import transfer_table
    from layerwise.cli.tables import new_table

    print_table(transfer_table(found.transfer))
    table = new_table("Reasons", ["", "confidence", "finding"], left=3)
    for reason in found.reasons:
        table.add_row(reason.about, reason.confidence, reason.text)
    print_table(table)
    options = "".join(f", {key} {value}" for key, value in found.fit_options.items())
    typer.echo(f"Advice: {found.described} at lr {found.lr:g}{options} (confidence: {found.confidence})")
    typer.echo(f"{found.why}\n")
    table = new_table("Alternatives", ["strategy", "lr", "why"], left=1)
    table.columns[2].justify = "left"
    for other in found.alternatives:
        table.add_row(other.described, f"{other.lr:g}", other.why)
    print_table(table)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(str(found.plan))
