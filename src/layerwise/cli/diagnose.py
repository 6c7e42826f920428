"""``layerwise diagnose``: how far data lie from what a model was pretrained on, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.options import SamplesOption, SignatureOption, SourceOption, TaskOptions, with_task
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


@friendly
@with_task
def diagnose(
    task: TaskOptions,
    source: SourceOption = None,
    signature: SignatureOption = None,
    max_samples: SamplesOption = 512,
    plot: Annotated[Path | None, typer.Option(help="Also draw the shift: .png, .svg or .html.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure domain shift per layer group, and how well frozen features separate the classes.

    layerwise diagnose timm:resnet18 --data photos

    layerwise diagnose timm:vit_tiny_patch16_224 --data photos --signature source.safetensors
    """
    from layerwise.choosing.named import open_source
    from layerwise.choosing.shift import shift
    from layerwise.cli.choosing_tables import shift_tables

    prepared = task.open()
    found = shift(
        prepared.opened.model,
        prepared.data.train,
        open_source(prepared.opened, source, signature),
        layers=prepared.layers,
        max_samples=max_samples,
        seed=task.seed,
    )
    if plot is not None:
        from layerwise.report.pictures import save_picture, shift_picture

        say(f"wrote {save_picture(shift_picture(found.to_dict()), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    for table in shift_tables(found, prepared.data.classes):
        print_table(table)
