"""``layerwise advise``: a plan for a model and its data, with reasons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from layerwise.cli import text
from layerwise.cli.diagnose import (
    DataOption,
    GranularityOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    SignatureOption,
    SizeOption,
    SourceOption,
    WeightsOption,
)
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say

if TYPE_CHECKING:
    from layerwise.choosing.advice import Advice


@friendly
def advise(
    model: ModelArgument,
    data: DataOption,
    source: SourceOption = None,
    signature: SignatureOption = None,
    text_column: text.TextColumn = None,
    label_column: text.LabelColumn = None,
    pair_column: text.PairColumn = None,
    max_length: text.MaxLength = None,
    weights: WeightsOption = None,
    input_size: SizeOption = None,
    granularity: GranularityOption = "stages",
    pretraining: Annotated[
        Literal["supervised", "self_supervised", "unknown"], typer.Option(help="Sets the decay of the rates.")
    ] = "unknown",
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of the plan.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="That training will use.")] = 32,
    val_frac: Annotated[float, typer.Option(help="Share that fit will validate on.")] = 0.2,
    max_samples: SamplesOption = 512,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan to this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which layers to train and how, with every reason, its figure and its confidence.

    layerwise advise timm:resnet18 --data photos -o plan.yaml
    """
    from layerwise.choosing.advice import advise as ask
    from layerwise.choosing.named import open_source, open_task

    prepared = open_task(
        model,
        data,
        weights=None if weights is None else str(weights),
        input_size=input_size,
        granularity=granularity,
        val_frac=val_frac,
        seed=seed,
        text=text.text_options(
            text_column=text_column, label_column=label_column, pair_column=pair_column, max_length=max_length
        ),
    )
    for note in prepared.notes:
        say(note)
    found = ask(
        prepared.opened.model,
        prepared.data.train,
        open_source(prepared.opened, source, None if signature is None else str(signature)),
        layers=prepared.layers,
        epochs=epochs,
        batch_size=batch_size,
        pretraining=pretraining,
        max_samples=max_samples,
        seed=seed,
    )
    if out is not None:
        found.plan.save(out)
        say(f"wrote {out}; train with it: layerwise fit --model {model} --data {data} --plan {out} --lr "
            f"{found.lr:g}")  # fmt: skip
    if as_json:
        print_json(found.to_dict())
        return
    show(found)


def show(found: Advice) -> None:
    """Print advice: what, why, what else, and the plan."""
    from layerwise.cli.choosing_tables import transfer_table
    from layerwise.cli.tables import new_table
    from layerwise.plans.storage import to_yaml

    print_table(transfer_table(found.transfer))
    table = new_table("Reasons", ["", "confidence", "finding"], left=3)
    for reason in found.reasons:
        table.add_row(reason.about, reason.confidence, reason.text)
    print_table(table)
    options = "".join(f", {key} {value}" for key, value in found.fit_options.items())
    typer.echo(f"Advice: {found.strategy} at lr {found.lr:g}{options} (confidence: {found.confidence})\n")
    table = new_table("Alternatives", ["strategy", "lr", "why"], left=1)
    table.columns[2].justify = "left"
    for other in found.alternatives:
        table.add_row(other.strategy, f"{other.lr:g}", other.why)
    print_table(table)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(to_yaml(found.plan))
