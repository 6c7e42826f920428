"""``layerwise inspect``: the layer map of a model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say

if TYPE_CHECKING:
    from layerwise.layers.layermap import Granularity, LayerMap
    from layerwise.sources.opened import OpenedModel
    from layerwise.sources.preprocessing import Preprocessing


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
    from layerwise.layers.table import trainable_numel

    opened = _open_without_weights(model, input_size)
    if opened.tokenizer is not None and input_size is not None:
        say(f"--input-size is for images; {model} reads texts, so it is not used")
    layers = map_opened(opened, granularity, input_size)
    if as_json:
        trainable = trainable_numel(layers, opened.model)
        groups = [
            {**group, "depth": layers.depth_of(group["name"]), "trainable": trainable[group["name"]]}
            for group in layers.to_dict()["groups"]
        ]
        print_json({"model": model, **layers.to_dict(), "groups": groups})
    else:
        print_table(layers.table(opened.model))


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


def map_opened(opened: OpenedModel, granularity: Granularity, input_size: int | None = None) -> LayerMap:
    """Return the layer map of an opened model; its notes say with which example input.

    Raises:
        RecordingError: the forward pass raised with this input.
    """
    from layerwise.errors import RecordingError
    from layerwise.layers.mapping import layer_map
    from layerwise.layers.structures import tensors_in

    example = _example(opened, input_size)
    try:
        layers = layer_map(opened.model, example, granularity)
    except RecordingError as error:
        if ".py:" not in opened.spec:
            raise
        raise RecordingError(
            f"{error} On the command line: let the function return a pair of the model and its "
            "Preprocessing, whose crop is the size of the images and whose mean has a number for each "
            "channel; any other input is given in Python alone."
        ) from error
    if example is not None:
        sizes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_in(example))
        layers = dataclasses.replace(layers, notes=(*layers.notes, f"example input: {sizes}"))
    return layers


def _example(opened: OpenedModel, input_size: int | None) -> Any:
    """Return the example input of an opened model; None for one to be derived.

    What a function of the user's own returns without a preprocessing may take anything, grey images too. A
    text on meta is token ids without values.
    """
    import torch

    from layerwise.layers.inputs import image_channels
    from layerwise.layers.structures import tensors_in
    from layerwise.sources.models import DEFAULT_PREPROCESSING, GREY_PREPROCESSING

    supposed: tuple[Preprocessing, ...] = (DEFAULT_PREPROCESSING, GREY_PREPROCESSING)
    if input_size is not None:
        supposed = tuple(one.at(input_size) for one in supposed)
    if ".py:" in opened.spec and opened.preprocessing in supposed:
        if input_size is None:
            return None
        return torch.zeros(1, image_channels(opened.model), input_size, input_size)
    example = opened.example_input
    tensors: list[torch.Tensor] = tensors_in(example)
    on_meta = any(t.device.type == "meta" and not t.is_floating_point() for t in tensors)
    return None if on_meta or not tensors else example
