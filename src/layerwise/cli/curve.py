"""``layerwise curve``: what each depth of a pretrained network is worth, by training on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.diagnose import DataOption, GranularityOption, ModelArgument, SizeOption, WeightsOption
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


@friendly
def curve(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="JSON file of all values; an interrupted curve goes on from it.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the curve (.png, .svg, .html).")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of every training.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every point.")] = 1,
    lr: Annotated[float, typer.Option(help="Base rate of all trainings.")] = 1e-3,
    metric: Annotated[str, typer.Option(help="Of the validation data.")] = "balanced_accuracy",
    weights: WeightsOption = None,
    input_size: SizeOption = None,
    granularity: GranularityOption = "stages",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    val_frac: Annotated[float, typer.Option(help="Share to validate on, without a val folder.")] = 0.2,
    as_json: JsonFlag = False,
) -> None:
    """Train on top of each depth, with the groups below frozen and fine-tuned (Yosinski et al. 2014).

    layerwise curve timm:resnet18 --data photos --out curve.json --plot curve.png
    """
    from layerwise.choosing.curve import transfer_curve
    from layerwise.choosing.named import open_task

    prepared = open_task(
        model,
        data,
        weights=None if weights is None else str(weights),
        input_size=input_size,
        granularity=granularity,
        val_frac=val_frac,
    )
    for note in prepared.notes:
        say(note)
    found = transfer_curve(
        prepared.opened.model,
        prepared.data.train,
        prepared.data.val,
        epochs=epochs,
        seeds=seeds,
        lr=lr,
        metric=metric,
        layers=prepared.layers,
        batch_size=batch_size,
        fit_options={"classes": prepared.data.classes},
        out=out,
        say=say,
    )
    if plot is not None:
        from layerwise.report.pictures import depth_picture, save_picture

        say(f"wrote {save_picture(depth_picture(found.to_dict()['points'], metric=metric), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    from layerwise.cli.tables import new_table

    table = new_table(
        "Training on top of each depth", ["kept groups", "new", "from", metric, "error", "seeds"]
    )
    for p in found.points:
        table.add_row(
            p.series, str(p.trained_groups), p.first, f"{p.mean:.4f}", f"{p.error:.4f}", str(p.seeds)
        )
    print_table(table)
