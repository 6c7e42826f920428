"""``layerwise diagnose``: how far data lie from what a model was pretrained on, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from layerwise.cli import text
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say

ModelArgument = Annotated[str, typer.Argument(help="timm:NAME, torchvision:NAME, hf:ID or file.py:function.")]
DataOption = Annotated[
    str, typer.Option(help="Folder with a folder of images a class, a table of paths, or of texts.")
]
WeightsOption = Annotated[Path | None, typer.Option(help="Weights file instead of the library's own.")]
SizeOption = Annotated[int | None, typer.Option(min=1, help="Side of the images in pixels.")]
SourceOption = Annotated[str | None, typer.Option(help="Folder of images of the source domain.")]
SignatureOption = Annotated[
    Path | None, typer.Option(help="Signature of the source domain, from layerwise signature.")
]
SamplesOption = Annotated[int, typer.Option(min=2, help="Measure so many images at most.")]
GranularityOption = Annotated[Literal["stages", "blocks", "layers"], typer.Option(help="What one group is.")]
SeedOption = Annotated[int, typer.Option(help="Of sampling and intervals.")]


@friendly
def diagnose(
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
    max_samples: SamplesOption = 512,
    seed: SeedOption = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the shift: .png, .svg or .html.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure domain shift per layer group, and how well frozen features separate the classes.

    layerwise diagnose timm:resnet18 --data photos

    layerwise diagnose timm:vit_tiny_patch16_224 --data photos --signature source.safetensors
    """
    from layerwise.choosing.named import open_source, open_task
    from layerwise.choosing.shift import shift
    from layerwise.cli.choosing_tables import shift_tables

    prepared = open_task(
        model,
        data,
        weights=_text(weights),
        input_size=input_size,
        granularity=granularity,
        seed=seed,
        text=text.text_options(
            text_column=text_column, label_column=label_column, pair_column=pair_column, max_length=max_length
        ),
    )
    for note in prepared.notes:
        say(note)
    found = shift(
        prepared.opened.model,
        prepared.data.train,
        open_source(prepared.opened, source, _text(signature)),
        layers=prepared.layers,
        max_samples=max_samples,
        seed=seed,
    )
    if plot is not None:
        from layerwise.report.pictures import save_picture, shift_picture

        say(f"wrote {save_picture(shift_picture(found.to_dict()), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    for table in shift_tables(found, prepared.data.classes):
        print_table(table)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
