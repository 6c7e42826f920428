"""``layerwise signature``: a summary of a source domain, to ship beside a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerwise.cli.options import SamplesOption, TaskOptions, with_task
from layerwise.cli.output import JsonFlag, check_output, friendly, print_json, say
from layerwise.errors import plural


@friendly
@with_task
def signature(
    task: TaskOptions,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")],
    max_samples: SamplesOption = 512,
    as_json: JsonFlag = False,
) -> None:
    """Write what a model makes of its source domain at every layer group, in kilobytes.

    --data is the source here. Labels are not used: any folder of images will do, or any table of texts.

    layerwise signature timm:vit_tiny_patch16_224 --data source -o source.safetensors
    """
    check_output(out, "-o")
    from layerwise.choosing.signature import signature as make

    opened, samples, layers = task.open_inputs()
    made = make(opened.model, samples, layers=layers, max_samples=max_samples, seed=task.seed)
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
        counts = f"{plural(made.samples, 'sample')}, {plural(len(made.groups), 'group')}"
        say(f"wrote {path}: {counts}, {about['bytes']:,} bytes")
