"""``layerwise signature``: a summary of a source domain, to ship beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.diagnose import (
    GranularityOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    SizeOption,
    WeightsOption,
)
from layerwise.cli.output import JsonFlag, friendly, print_json, say


@friendly
def signature(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="Folder of images of the source domain; labels are not used.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")],
    weights: WeightsOption = None,
    input_size: SizeOption = None,
    granularity: GranularityOption = "stages",
    max_samples: SamplesOption = 512,
    seed: SeedOption = 0,
    as_json: JsonFlag = False,
) -> None:
    """Write what a model makes of its source domain at every layer group, in kilobytes.

    layerwise signature timm:vit_tiny_patch16_224 --data source -o source.safetensors
    """
    from layerwise.choosing.named import open_images_alone
    from layerwise.choosing.signature import signature as make
    from layerwise.layers.mapping import layer_map

    opened, images = open_images_alone(
        model, data, weights=None if weights is None else str(weights), input_size=input_size
    )
    layers = layer_map(opened.model, opened.example_input, granularity)
    made = make(opened.model, images, layers=layers, max_samples=max_samples, seed=seed)
    path = made.save(out)
    about = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "samples": made.samples,
        "groups": list(made.groups),
    }
    if as_json:
        print_json(about)
    else:
        say(f"wrote {path}: {made.samples} samples, {len(made.groups)} groups, {about['bytes']:,} bytes")
