"""One pass over data through the frozen model: what each layer group makes of it, pooled per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from layerwise.choosing.distances import as_features
from layerwise.choosing.inputs import measure_images
from layerwise.choosing.samples import (
    NO_SAMPLES,
    dataset_of,
    open_sample,
    parts_of,
    reading,
    split_inputs,
    to_device,
)
from layerwise.choosing.taps import OUTPUT, Floats, NormInputs, Taps
from layerwise.choosing.tokens import measure_tokens
from layerwise.errors import DataError, ModelError
from layerwise.layers.isolation import untouched
from layerwise.layers.layermap import LayerMap, check_map
from layerwise.layers.structures import tensors_in
from layerwise.tuning.modes import held_modes
from layerwise.tuning.norms import look_through


@dataclass(frozen=True)
class Features:
    """What `collect_features` found, in order of the layer map.

    Attributes:
        groups: layer group -> features, float32[samples, dimensions]: the group's output, averaged over
            positions; for the head, what its output layer receives.
        depth: layer group -> groups between it and the head, the head 0.
        labels: int64[samples], or None where the data has none.
        outputs: of the whole model, float32[samples, outputs], where they are one vector a sample.
        inputs: figures of `layerwise.choosing.inputs` per image, or of `layerwise.choosing.tokens` per text.
        norms: norm layer -> its inputs' statistics, for layers with running statistics.
        samples: number of samples seen.
        total: number of samples in the data, or None where it does not say.
        shape: of one input, without the batch; empty for text.
        modality: ``"image"`` (float[C, H, W]), ``"tokens"`` (integers) or ``"values"`` (everything else).
        notes: what was left out, for people.
    """

    groups: dict[str, Floats]
    depth: dict[str, int]
    labels: npt.NDArray[np.int64] | None
    outputs: Floats | None
    inputs: dict[str, npt.NDArray[np.float64]]
    norms: dict[str, NormInputs]
    samples: int
    total: int | None
    shape: tuple[int, ...]
    modality: str
    notes: tuple[str, ...] = field(default=())


def collect_features(
    model: nn.Module,
    data: Any,
    layers: LayerMap,
    *,
    max_samples: int | None = 512,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    norms: bool = True,
    tokenizer: Any = None,
    seed: int = 0,
    target: Features | None = None,
) -> Features:
    """Return pooled features of every layer group, from one forward pass over (a sample of) `data`.

    The model runs in eval mode without gradients, on the device where it is. Its weights, buffers, modes
    and hooks, and the global random state, are afterwards as they were.

    Args:
        model: the network; unchanged.
        data: a data set, a `DataLoader`, a tensor of inputs, or a pair (inputs, labels) of tensors. Batches
            are inputs, pairs (inputs, labels), or mappings with or without ``"labels"``. An integer label
            is expected where there is one.
        layers: its layer map.
        max_samples: so many are drawn without replacement, with `seed`, where the data has a length; the
            first so many where it has not. None takes all.
        batch_size: of data that is no loader.
        collate: makes a batch of a list of samples, of data that is no loader.
        norms: also collect what goes into norm layers with running statistics.
        tokenizer: of texts, for fertility and unknown tokens; None takes the data set's own ``tokenizer``.
        seed: of the draw, and of samples that are random.
        target: what these features, a source's, will be compared with; None for nothing.

    Raises:
        DataError: no samples, batches of an unknown kind, labels that are no integers, features that are not
            finite (as those of inputs with NaN are), or inputs of another kind or size than the target's.
        ModelError: no layer group hands on one tensor with a row for each sample, the model is a single
            layer, or the map is of another model.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(dataset_of(data), "tokenizer", None)
    loader, total = open_sample(data, max_samples, batch_size, collate, seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    root = look_through(model, layers)
    taps = Taps(root, layers, norms=norms)
    rows: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    measured: list[dict[str, Any]] = []
    shape: tuple[int, ...] = ()
    modality, samples = "values", 0
    with reading(loader, seed), untouched(root), held_modes(root), taps.hooked(), torch.no_grad():
        root.eval()
        for batch in loader:
            args, kwargs, given = split_inputs(batch)
            args, kwargs = to_device(args, device), to_device(kwargs, device)
            first = next(iter(tensors_in((args, kwargs))), None)
            if first is None:
                raise DataError("a batch holds no tensor; the model has nothing to run on.")
            if not samples:
                shape, modality = tuple(first.shape[1:]), _modality(first)
                shape = () if modality == "tokens" else shape  # texts have lengths of their own
                if target is not None:  # before the model fails at them in its own words
                    require_alike(modality, shape, target)
            rows.append(taps.run(root, args, kwargs, size=len(first)))
            if given is not None:
                labels.append(given)
            if modality == "image" and min(first.shape[2:]) >= 3:
                measured.append(measure_images(first))
            elif modality == "tokens" and first.ndim == 2:
                measured.append(measure_tokens(first, kwargs.get("attention_mask"), tokenizer))
            samples += len(first)
            if max_samples is not None and samples >= max_samples:
                break
        else:
            total = samples if total is None else total  # a stream that has ended
    if not samples:
        raise DataError(NO_SAMPLES)
    return _gather(layers, taps, rows, labels, measured, shape, modality, samples, total)


def map_for(
    model: nn.Module,
    data: Any,
    layers: LayerMap | None,
    example_input: Any,
    *,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
) -> LayerMap:
    """Return `layers`, or a layer map by stages made from `example_input` or else from the data itself.

    Args:
        model: the network; unchanged.
        data: two samples of it are the example where none is given; not touched if it can be gone through
            only once.
        layers: returned as it is, if there is one.
        example_input: as for `layerwise.layer_map`.
        batch_size: of data that is no loader.
        collate: makes a batch of samples.

    Raises:
        PlanError: `layers` is something else.
        DataError: there are no samples to make an example of.
    """
    if layers is not None:
        check_map(layers)
        return layers
    from layerwise.layers.mapping import layer_map

    if example_input is None:
        loader, _ = open_sample(data, 2, batch_size, collate, 0)
        if not isinstance(loader, Iterator):
            with reading(loader, 0):
                batch = next(iter(loader), None)
            if batch is None:
                raise DataError(NO_SAMPLES)
            args, kwargs, _ = parts_of(batch)
            example_input = kwargs or args
    return layer_map(model, example_input, granularity="stages")


def mapped_features(
    model: nn.Module,
    data: Any,
    layers: LayerMap | None,
    example_input: Any,
    *,
    max_samples: int | None,
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None,
    norms: bool,
    seed: int,
) -> tuple[Features, LayerMap]:
    """Return what `collect_features` finds, and the map it was collected with, made by `map_for`."""
    layers = map_for(model, data, layers, example_input, batch_size=batch_size, collate=collate)
    found = collect_features(
        model,
        data,
        layers,
        max_samples=max_samples,
        batch_size=batch_size,
        collate=collate,
        norms=norms,
        seed=seed,
    )
    return found, layers


def _gather(
    layers: LayerMap,
    taps: Taps,
    rows: list[dict[str, Tensor]],
    labels: list[Tensor],
    measured: list[dict[str, Any]],
    shape: tuple[int, ...],
    modality: str,
    samples: int,
    total: int | None,
) -> Features:
    def stacked(name: str) -> Floats | None:
        parts = [row[name] for row in rows if name in row]
        if sum(map(len, parts)) != samples or len({part.shape[1] for part in parts}) != 1:
            return None
        return torch.cat(parts).numpy()

    groups, missing = {}, []
    for group in layers:
        found = stacked(group.name)
        if found is None:
            missing.append(group.name)
        else:
            groups[group.name] = found
    for name, values in groups.items():
        as_features(values, f"features of group {name!r}")  # refuses NaN: no figure of them means anything
    if not groups and not any(group.modules for group in layers):
        name = layers.model_class.rpartition(".")[2] or "this model"
        raise ModelError(
            f"{name} has no modules inside, so there is no place at which to look at features. "
            "Put a single layer into a model: nn.Sequential(layer)"
        )
    if not groups:
        raise ModelError(
            "no layer group of this model hands on a tensor with a row for each sample, so there are no "
            "features to look at. The batch must be the first axis."
        )
    if labels and sum(map(len, labels)) != samples:
        raise DataError(f"{sum(map(len, labels))} labels came with {samples} samples; expected one for each.")
    return Features(
        groups=groups,
        depth={group.name: layers.depth_of(group.name) for group in layers},
        labels=torch.cat(labels).numpy().astype(np.int64) if labels else None,
        outputs=stacked(OUTPUT),
        inputs={name: np.concatenate([m[name] for m in measured]) for name in measured[0]}
        if measured
        else {},
        norms=taps.norm_inputs(),
        samples=samples,
        total=total,
        shape=shape,
        modality=modality,
        notes=(
            f"no features of {', '.join(missing)}: no module of theirs returns one row a sample with "
            "channels that can be told from positions",
        )
        if missing
        else (),
    )


def require_alike(modality: str, shape: tuple[int, ...], target: Features) -> None:
    """Refuse a source whose inputs are of another modality or, of all but texts, of another shape.

    Raises:
        DataError: they are.
    """
    if modality != target.modality:
        raise DataError(
            f"the source is {_kind(modality, shape)} and the target {_kind(target.modality, target.shape)}; "
            "a shift between them has no meaning. Give a source of the same kind, or a signature of one: "
            "layerwise signature MODEL --data SOURCE"
        )
    if modality != "tokens" and shape != target.shape:
        raise DataError(
            f"the source's inputs have the shape {_sides(shape)}, the target's {_sides(target.shape)}; "
            "features of another size differ for that reason alone. Bring both to one size: the model's own "
            "preprocessing, or the same --input-size for both."
        )


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _kind(modality: str, shape: tuple[int, ...]) -> str:
    """Return what inputs are, in words."""
    words = {"tokens": "texts (token ids)", "image": "images", "values": "tensors"}[modality]
    return f"{words} of shape {_sides(shape)}" if shape else words


def _modality(first: Tensor) -> str:
    if not first.is_floating_point():
        return "tokens"
    return "image" if first.ndim == 4 else "values"
