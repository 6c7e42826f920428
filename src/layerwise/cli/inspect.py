"""``layerwise inspect``: the layer map of a model."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say


@friendly
def inspect(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, torchvision:NAME, hf:FOLDER or hf:ID, or file.py:function.")
    ],
    granularity: Annotated[
        Literal["stages", "blocks", "layers"], typer.Option(help="What one group is.")
    ] = "blocks",
    input_size: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Side of the images in pixels, not the model's own.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the layer groups of a model, input first, with their names, sizes and costs.

    Nothing is downloaded but a configuration, and no weights are made.

    The names are what plans and --strategy take.
    """
    from layerwise.layers.mapping import layer_map
    from layerwise.layers.structures import tensors_in
    from layerwise.layers.table import LayerTable, trainable_numel

    opened = _open_without_weights(model, input_size)
    if opened.tokenizer is not None and input_size is not None:
        say(f"--input-size is for images; {model} reads texts, so it is not used")
    own_function = ".py:" in model and input_size is None  # its input is not known to be an image
    example = None if own_function else _usable(opened.example_input)
    layers = layer_map(opened.model, example, granularity)
    if example is not None:
        sizes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_in(example))
        layers = dataclasses.replace(layers, notes=(*layers.notes, f"example input: {sizes}"))
    if as_json:
        trainable = trainable_numel(layers, opened.model)
        groups = [
            {**group, "depth": layers.depth_of(group["name"]), "trainable": trainable[group["name"]]}
            for group in layers.to_dict()["groups"]
        ]
        print_json({"model": model, **layers.to_dict(), "groups": groups})
    else:
        print_table(LayerTable(layers, opened.model))


def _open_without_weights(spec: str, input_size: int | None) -> Any:
    """Open a model on meta, where weights take no memory; for real if its constructor computes with them."""
    import torch

    from layerwise.errors import LayerwiseError
    from layerwise.sources.models import open_model

    try:
        with torch.device("meta"):
            return open_model(spec, pretrained=False, input_size=input_size)
    except LayerwiseError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return open_model(spec, pretrained=False, input_size=input_size)


def _usable(example: Any) -> Any:
    """Return the example, or None if it holds token ids without values, for one to be derived."""
    import torch

    from layerwise.layers.structures import tensors_in

    tensors: list[torch.Tensor] = tensors_in(example)
    on_meta = any(t.device.type == "meta" and not t.is_floating_point() for t in tensors)
    return None if on_meta or not tensors else example
