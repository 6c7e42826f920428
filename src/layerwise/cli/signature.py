"""``layerwise signature``: a summary of a source domain, to ship beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerwise.cli import text
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
    data: Annotated[str, typer.Option(help="Images or texts of the source domain; labels are not used.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")],
    text_column: text.TextColumn = None,
    label_column: text.LabelColumn = None,
    pair_column: text.PairColumn = None,
    max_length: text.MaxLength = None,
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
    from layerwise.choosing.named import open_images_alone, open_task
    from layerwise.choosing.signature import signature as make
    from layerwise.layers.mapping import layer_map

    file = None if weights is None else str(weights)
    texts = text.text_options(
        text_column=text_column, label_column=label_column, pair_column=pair_column, max_length=max_length
    )
    samples: Any
    if texts is None:
        opened, samples = open_images_alone(model, data, weights=file, input_size=input_size)
        layers = layer_map(opened.model, opened.example_input, granularity)
    else:
        prepared = open_task(model, data, weights=file, granularity=granularity, seed=seed, text=texts)
        opened, samples, layers = prepared.opened, prepared.data.train, prepared.layers
    made = make(opened.model, samples, layers=layers, max_samples=max_samples, seed=seed)
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
