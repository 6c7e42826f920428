"""The example input of a recording: the caller's, or one derived from what the model says of itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from layerwise.errors import ModelError, RecordingError, named_kind
from layerwise.layers.graph import Recording
from layerwise.layers.isolation import check_ready
from layerwise.layers.recording import record
from layerwise.layers.structures import Arguments, map_tensors, tensors_in

_TIMM = "timm's pretrained_cfg"
_TOKENS = 8  # length of a made-up text
_AUDIO_S = 1  # length of a made-up waveform
_SMALL_SIDE, _LARGE_SIDE = 64, 128  # pixels: networks halve an image five times


def record_example(
    model: nn.Module, example_input: Any = None, *, mode: Literal["keep", "eval"]
) -> tuple[Recording, Arguments, tuple[str, ...]]:
    """Return a recording of `model`, the arguments that it was called with, and notes on what was made up.

    Args:
        model: unwrapped.
        example_input: as `example_arguments` takes it. Where a derived example does not do, others are tried.
        mode: as `layerwise.layers.recording.record` takes it.

    Raises:
        ModelError: as `example_arguments` and `record`.
        RecordingError: the forward pass raised, with `example_input` or with each derived example.
    """
    check_ready(model)
    arguments, notes = example_arguments(model, example_input)
    try:
        return record(model, *arguments, mode=mode), arguments, notes
    except RecordingError:
        if example_input is not None:
            raise
        for arguments, notes in other_arguments(model):
            with contextlib.suppress(RecordingError):
                return record(model, *arguments, mode=mode), arguments, notes
        raise


def example_arguments(model: nn.Module, example_input: Any = None) -> tuple[Arguments, tuple[str, ...]]:
    """Return ``(args, kwargs)`` to call `model` with, and notes on what was made up.

    Args:
        model: unwrapped.
        example_input: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments (a tokenizer's ``BatchEncoding`` is one). None derives one: timm's
            ``pretrained_cfg``, transformers' ``dummy_inputs`` and configuration, the input size of a
            first linear layer, or an image of 3 x 224 x 224.

    Raises:
        ModelError: `example_input` is of another type.
    """
    if isinstance(example_input, torch.Tensor):
        return ((example_input,), {}), ()
    if isinstance(example_input, Mapping):
        return ((), {str(name): value for name, value in example_input.items()}), ()
    if isinstance(example_input, tuple | list):
        return (tuple(example_input), {}), ()
    if example_input is not None:
        raise ModelError(
            f"example_input is {named_kind(example_input)}; expected a tensor, a tuple of positional "
            f"arguments, or a dict of keyword arguments. Leave it out to have one derived."
        )
    return _with_note(*_derived(model))


def other_arguments(model: nn.Module) -> Iterator[tuple[Arguments, tuple[str, ...]]]:
    """Yield what else to call `model` with, and notes: where the example that was derived did not do.

    timm's configuration is that of the weights; a model may be made with other channels or another size.
    One of videos takes several images a sample. A vision transformer may begin with a linear layer on
    patches, which tells no size of an image; a model of texts may register its output layer before its
    embedding.
    """
    (args, kwargs), source = _derived(model)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if source == _TIMM and first is not None:
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or args[0].shape[2:]
        own = _floats(model, 2, first.in_channels, *size)
        yield _with_note(((own,), {}), f"{source} and the model's own channels and size")
    config: Any = getattr(model, "config", None)
    frames = _first(_first(config, "vision_config") or config, "num_frames")
    if frames and "pixel_values" in kwargs:
        video = kwargs["pixel_values"][:, None].repeat(1, frames, 1, 1, 1)
        yield _with_note((args, {**kwargs, "pixel_values": video}), source)
    yield _with_note(*_image(model, 3))
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)), None)
    if embedding is not None:
        yield _with_note(((_tokens(embedding.num_embeddings),), {}), "the first embedding")


def larger_images(arguments: Arguments) -> Arguments | None:
    """Return arguments with larger images: at the end of a network small ones are maps of a single position.

    None where there is anything but one batch of images, or these are large enough.
    """
    tensors = tensors_in(arguments)
    if len(tensors) != 1 or tensors[0].dim() != 4 or not tensors[0].is_floating_point():
        return None
    side = min(tensors[0].shape[2:])
    if not 0 < side < _SMALL_SIDE:
        return None
    factor = -(-_LARGE_SIDE // side)
    height, width = (length * factor for length in tensors[0].shape[2:])
    enlarged: Arguments = map_tensors(arguments, lambda t: t.new_zeros((*t.shape[:2], height, width)))
    return enlarged


def image_channels(model: nn.Module) -> int:
    """Return how many channels the first convolution of a model of images reads; 3 where that is none."""
    first = _first_with_size(model)
    return first.in_channels if isinstance(first, nn.Conv2d) else 3


def _with_note(arguments: Arguments, source: str) -> tuple[Arguments, tuple[str, ...]]:
    described = ", ".join(_describe(name, value) for name, value in _named(arguments))
    return arguments, (f"example input made up from {source}: {described}",)


def _derived(model: nn.Module) -> tuple[Arguments, str]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        return ((_floats(model, 2, *config["input_size"]),), {}), _TIMM
    base = getattr(model, "base_model", None)
    holder = next((m for m in (model, base) if hasattr(getattr(m, "config", None), "model_type")), None)
    if holder is not None:
        return _for_transformers(holder)
    first = _first_with_size(model)
    if isinstance(first, nn.Linear):
        return ((_floats(model, 2, first.in_features),), {}), "the first linear layer"
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        return ((_tokens(first.num_embeddings),), {}), "the first embedding"
    if isinstance(first, nn.LSTM | nn.GRU | nn.RNN):
        return ((_floats(model, 2, _TOKENS, first.input_size),), {}), "the first recurrent layer"
    if isinstance(first, nn.Conv1d):
        return ((_floats(model, 2, first.in_channels, 1024),), {}), "the first convolution"
    if isinstance(first, nn.Conv3d):
        return ((_floats(model, 2, first.in_channels, 16, 112, 112),), {}), "the first convolution"
    return _image(model, image_channels(model))


def _first_with_size(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if isinstance(m, _WITH_INPUT_SIZE)), None)


def _image(model: nn.Module, channels: int) -> tuple[Arguments, str]:
    size = getattr(model, "image_size", 224)
    side = size if isinstance(size, int) else 224
    if any("Inception3" in kind.__name__ for kind in type(model).__mro__):
        side = 299  # torchvision's Inception v3 says so in its documentation only
    return ((_floats(model, 2, channels, side, side),), {}), "the usual image size"


_WITH_INPUT_SIZE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LSTM,
    nn.GRU,
    nn.RNN,
)


def _for_transformers(model: nn.Module) -> tuple[Arguments, str]:
    """Build the inputs that the forward of a transformers model asks for, from its configuration."""
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    text = _first(config, "text_config", "text_encoder", "encoder", "decoder") or config
    vision = _first(config, "vision_config") or config
    inputs: dict[str, Any] = {}
    if "pixel_values" in accepted:
        side = _first(vision, "image_size") or 224
        height, width = (side, side) if isinstance(side, int) else tuple(side)[:2]
        inputs["pixel_values"] = _floats(model, 2, _first(vision, "num_channels") or 3, height, width)
    if "input_ids" in accepted:
        inputs["input_ids"] = _tokens(_first(config, "vocab_size") or _first(text, "vocab_size") or 2, config)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "input_values" in accepted:
        if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
            inputs["input_values"] = _floats(model, 2, config.max_length, config.num_mel_bins)
        else:
            inputs["input_values"] = _floats(model, 2, 16_000 * _AUDIO_S)
    if "input_features" in accepted:
        frames = 2 * (_first(config, "max_source_positions") or 1500)
        inputs["input_features"] = _floats(model, 2, _first(config, "num_mel_bins") or 80, frames)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(_first(config, "vocab_size") or _first(text, "vocab_size") or 2)
    if inputs:
        return ((), inputs), f"the configuration of {type(config).__name__}"
    dummy = dict(getattr(model, "dummy_inputs", {}))
    return ((), dummy), "transformers' dummy_inputs"


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _floats(model: nn.Module, *shape: int) -> torch.Tensor:
    """Return zeros in the precision of the model's weights."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() >= 2]
    return torch.zeros(shape, dtype=dtypes[0] if dtypes else torch.get_default_dtype())


def _tokens(vocabulary: int, config: Any = None) -> torch.Tensor:
    """Return two texts of ordinary token numbers, ended by the end token where there is one."""
    ids = torch.arange(2 * _TOKENS).reshape(2, _TOKENS) % max(min(vocabulary - 4, 100), 1)
    ids = ids + (3 if vocabulary > 4 else 0)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[ids == end] = (end + 1) % vocabulary
        ids[:, -1] = end  # BART and CLIP read the sequence's vector there
    return ids


def _named(arguments: Arguments) -> list[tuple[str, Any]]:
    args, kwargs = arguments
    return [("", value) for value in args] + list(kwargs.items())


def _describe(name: str, value: Any) -> str:
    text = "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
    return f"{name} {text}".strip()
