"""``layerwise diagnose``: how far data lie from what a model was pretrained on, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli.options import SamplesOption, SignatureOption, SourceOption, TaskOptions, with_task
from layerwise.cli.output import JsonFlag, check_output, friendly, print_json, print_table, say


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

    --data may lack labels: a folder of images without class folders, or texts without a label column.

    layerwise diagnose timm:resnet18 --data photos

    layerwise diagnose timm:vit_tiny_patch16_224 --data photos --signature source.safetensors
    """
    check_output(plot, "--plot")
    from layerwise.choosing.named import check_source, has_labels, open_source
    from layerwise.choosing.shift import shift
    from layerwise.cli.choosing_tables import shift_tables
    from layerwise.report.pictures import check_picture, save_picture, shift_picture

    if plot is not None:
        check_picture(plot)
    known = check_source(source, signature)
    samples: Any
    classes: Sequence[str] = ()
    if has_labels(task.model, task.data, task.text):
        prepared = task.open(val_frac=0.0)
        opened, samples, layers = prepared.opened, prepared.data.train, prepared.layers
        classes = prepared.data.classes
    else:
        opened, samples, layers = task.open_inputs()
        say(f"{task.data} names no classes: the shift of the inputs is measured, not the label side")
    found = shift(
        opened.model,
        samples,
        open_source(opened, source, known, text=task.text),
        layers=layers,
        max_samples=max_samples,
        seed=task.seed,
    )
    if plot is not None:
        say(f"wrote {save_picture(shift_picture(found.to_dict()), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    for table in shift_tables(found, classes):
        print_table(table)
