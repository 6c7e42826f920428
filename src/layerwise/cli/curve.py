"""``layerwise curve``: what each depth of a pretrained network is worth, by training on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.options import (
    BatchSizeOption,
    MetricOption,
    TaskOptions,
    ValFracOption,
    numbers,
    with_task,
)
from layerwise.cli.output import JsonFlag, above_zero, check_output, friendly, print_json, print_table, say


@friendly
@with_task
def curve(
    task: TaskOptions,
    out: Annotated[Path, typer.Option(help="JSON file of all values; an interrupted curve goes on from it.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the curve (.png, .svg, .html).")] = None,
    depths: Annotated[
        str | None, typer.Option(help="Numbers of groups that start anew, like 1,2,4; about six.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of every training.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every point.")] = 1,
    lr: Annotated[float, typer.Option(help="Base rate of all trainings.", callback=above_zero)] = 1e-3,
    metric: MetricOption = None,
    batch_size: BatchSizeOption = 32,
    val_frac: ValFracOption = 0.2,
    as_json: JsonFlag = False,
) -> None:
    """Train on top of each depth, with the groups below frozen and fine-tuned (Yosinski et al. 2014).

    layerwise curve timm:resnet18 --data photos --out curve.json --plot curve.png
    """
    check_output(out, "--out")
    check_output(plot, "--plot")
    from layerwise.choosing.curve import read_values, transfer_curve
    from layerwise.choosing.named import fit_options
    from layerwise.report.pictures import check_picture, depth_picture, save_picture

    if plot is not None:
        check_picture(plot)
    counts = None if depths is None else numbers(depths, "--depths", least=1)
    read_values(out)  # so that another file's place is told first
    prepared = task.open(val_frac=val_frac)
    try:
        found = transfer_curve(
            prepared.opened.model,
            prepared.data.train,
            prepared.data.val,
            depths=counts,
            epochs=epochs,
            seeds=seeds,
            lr=lr,
            metric=metric,
            layers=prepared.layers,
            batch_size=batch_size,
            fit_options=fit_options(prepared),
            out=out,
            say=say,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished trainings are kept; the same command goes on.") from None
    if plot is not None:
        points = found.to_dict()["points"]
        picture = depth_picture(points, metric=found.metric, counted="groups that start anew")
        say(f"wrote {save_picture(picture, plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    from layerwise.cli.tables import new_table

    table = new_table(
        "Training on top of each depth",
        ["kept groups", "new groups", "from", found.metric.replace("_", " "), "error", "seeds"],
    )
    for p in found.points:
        table.add_row(*p.cells())
    print_table(table)
