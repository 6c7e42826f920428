"""One pass over data through the frozen model: what each layer group makes of it, pooled per sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from layerwise.choosing.inputs import measure_images
from layerwise.choosing.samples import dataset_of, open_sample, split_inputs, tensors, to_device
from layerwise.choosing.tokens import measure_tokens
from layerwise.errors import DataError, ModelError
from layerwise.layers.isolation import untouched
from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.tuning.modes import held_modes
from layerwise.tuning.norm_layers import find_norms
from layerwise.tuning.norms import look_through

Floats = npt.NDArray[np.float32]
CHUNKS = 64
"""Statistics of norm inputs are kept for so many parts of the sample, which a bootstrap re-draws."""


@dataclass(frozen=True)
class NormInputs:
    """What went into one normalisation layer, next to what its running statistics say of the source.

    Attributes:
        group: name of its layer group.
        mean: per chunk of samples and channel, float32[chunks, channels].
        square: mean of the squares, likewise.
        running_mean: of the source domain, float32[channels].
        running_var: likewise.
    """

    group: str
    mean: Floats
    square: Floats
    running_mean: Floats
    running_var: Floats


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
        seed: of the draw.

    Raises:
        DataError: no samples, batches of an unknown kind, or labels that are no integers.
        ModelError: no layer group hands on one tensor with a row for each sample, or the map is of another
            model.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(dataset_of(data), "tokenizer", None)
    loader, total = open_sample(data, max_samples, batch_size, collate, seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    root = look_through(model, layers)
    taps = _Taps(root, layers, norms=norms)
    rows: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    measured: list[dict[str, Any]] = []
    shape: tuple[int, ...] = ()
    modality, samples = "values", 0
    with untouched(root), held_modes(root), taps.hooked(), torch.no_grad():
        root.eval()
        for batch in loader:
            args, kwargs, given = split_inputs(batch)
            args, kwargs = to_device(args, device), to_device(kwargs, device)
            first = next(tensors((args, kwargs)), None)
            if first is None:
                raise DataError("a batch holds no tensor; the model has nothing to run on.")
            if not samples:
                shape, modality = tuple(first.shape[1:]), _modality(first)
                shape = () if modality == "tokens" else shape  # texts have lengths of their own
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
    if not samples:
        raise DataError("the data holds no samples. Give at least one batch.")
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
    """
    if layers is not None:
        return layers
    from layerwise.layers.mapping import layer_map

    if example_input is None:
        loader, _ = open_sample(data, 2, batch_size, collate, 0)
        if isinstance(loader, DataLoader):
            args, kwargs, _labels = split_inputs(next(iter(loader)))
            example_input = kwargs or args
    return layer_map(model, example_input, granularity="stages")


def _gather(
    layers: LayerMap,
    taps: _Taps,
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
        outputs=stacked(_OUTPUT),
        inputs={name: np.concatenate([m[name] for m in measured]) for name in measured[0]}
        if measured
        else {},
        norms=taps.norm_inputs(),
        samples=samples,
        total=total,
        shape=shape,
        modality=modality,
        notes=(f"no features of {', '.join(missing)}: no module of theirs returns one row a sample",)
        if missing
        else (),
    )


_OUTPUT = "\0output"  # no module path holds a NUL


class _Taps:
    """Hooks that keep the last output of each group, and sums of what each norm receives, of one pass."""

    def __init__(self, model: nn.Module, layers: LayerMap, *, norms: bool) -> None:
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        self._widths = {
            group.name: {parameters[p].shape[0] for p in group.parameters if p in parameters}
            for group in layers
        }
        self._outputs = {
            group.name: [modules[path] for path in group.modules if path in modules]
            for group in layers
            if group.role != "head"
        }
        head = layers.head
        self._head = (
            (head.name, modules[layers.outputs[0]])
            if head is not None and layers.outputs and layers.outputs[0] in modules
            else None
        )
        self._norms = _norm_groups(layers, modules) if norms else {}
        self._modules = modules
        self._seen: dict[str, Tensor] = {}
        self._sums: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self._norms}
        self._mask: Tensor | None = None
        self._ratio = 1.0
        self._size = 0

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks for the body."""
        with contextlib.ExitStack() as stack:
            for name, modules in self._outputs.items():
                for module in modules:
                    stack.callback(module.register_forward_hook(self._keep(name)).remove)
            if self._head is not None:
                name, module = self._head
                stack.callback(module.register_forward_pre_hook(self._keep_input(name)).remove)
            for name in self._norms:
                hook = self._modules[name].register_forward_pre_hook(self._count(name))
                stack.callback(hook.remove)
            yield

    def run(self, model: nn.Module, args: Any, kwargs: Any, *, size: int) -> dict[str, Tensor]:
        """Run one batch and return the pooled features of each group, float32[size, d] on the CPU."""
        self._seen, self._size = {}, size
        mask = kwargs.get("attention_mask") if isinstance(kwargs, Mapping) else None
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        first = next(tensors((args, kwargs)))
        self._ratio = first.shape[-2] / first.shape[-1] if first.ndim == 4 else 1.0
        result = next(tensors(_logits(model(*args, **kwargs))), None)
        if result is not None and result.ndim == 2 and len(result) == size and result.is_floating_point():
            self._seen[_OUTPUT] = result.float().cpu()
        return self._seen

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._store(name, output)

        return hook

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._store(name, args)

        return hook

    def _store(self, name: str, value: Any) -> None:
        tensor = next(tensors(value), None)
        if tensor is None or not tensor.is_floating_point() or tensor.ndim < 2 or len(tensor) != self._size:
            return
        self._seen[name] = pool(
            tensor, widths=self._widths.get(name, set()), mask=self._mask, ratio=self._ratio
        ).cpu()

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            value = next(tensors(args), None)
            if value is None or value.ndim < 2:
                return
            rows = value.detach().float().flatten(2) if value.ndim > 2 else value.detach().float()[..., None]
            self._sums[name].append((rows.mean(2).cpu(), (rows**2).mean(2).cpu()))

        return hook

    def norm_inputs(self) -> dict[str, NormInputs]:
        """Return the statistics of every norm that ran, over `CHUNKS` parts of equal size."""
        found = {}
        for name, group in self._norms.items():
            if not self._sums[name]:
                continue
            mean, square = (torch.cat(part) for part in zip(*self._sums[name]))
            norm = self._modules[name]
            found[name] = NormInputs(
                group=group,
                mean=_chunked(mean),
                square=_chunked(square),
                running_mean=cast(Tensor, norm.running_mean).detach().float().cpu().numpy(),
                running_var=cast(Tensor, norm.running_var).detach().float().cpu().numpy(),
            )
        return found


def pool(value: Tensor, *, widths: set[int], mask: Tensor | None = None, ratio: float = 1.0) -> Tensor:
    """Return one vector a sample: the mean of a tensor over its positions, float32[N, channels].

    Which axis holds the channels is told by the sizes of the group's own parameters (a bias or a norm has
    one entry a channel). Where several axes fit: of four axes, those two are positions whose sides have the
    ratio of the input image, and (N, C, H, W) wins a tie; of three axes the last one is the channels.

    Args:
        value: float[N, ...].
        widths: sizes of the first axes of the group's parameters.
        mask: float or int[N, T], 0 for padding; used where the positions are one axis of length T.
        ratio: height / width of the input image.
    """
    value = value.detach().float()
    if value.ndim == 2:
        return value
    axis = _channel_axis(value.shape, widths, ratio)
    value = value.movedim(axis, -1)
    if mask is not None and value.ndim == 3 and value.shape[1] == mask.shape[1]:
        weights = mask.to(value.dtype)[..., None]
        return (value * weights).sum(1) / weights.sum(1).clamp(min=1)
    return value.flatten(1, -2).mean(1)


def _channel_axis(shape: Sequence[int], widths: set[int], ratio: float) -> int:
    axes = range(1, len(shape))
    fitting = [axis for axis in axes if shape[axis] in widths] or list(axes)
    if len(shape) != 4:
        return fitting[-1] if len(shape) == 3 else fitting[0]

    def misfit(axis: int) -> float:
        height, width = (shape[other] for other in axes if other != axis)
        return abs(float(np.log(height / width / ratio)))

    return min(fitting, key=lambda axis: (round(misfit(axis), 2), axis != 1))


def _chunked(rows: Tensor) -> Floats:
    parts = min(CHUNKS, len(rows))
    usable = rows[: len(rows) // parts * parts]  # chunks of equal size; the few samples over are left out
    result: Floats = usable.reshape(-1, parts, rows.shape[1]).mean(0).numpy()
    return result


def _norm_groups(layers: LayerMap, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return norm layer with running statistics -> its layer group, in order of the map."""
    root = modules[""]
    named = [norm.name for norm in find_norms(root) if norm.kind == "running"]
    found: dict[str, str] = {}
    for group in layers:
        for path in named:
            if path not in found and _holds(group, path):
                found[path] = group.name
    return found


def _holds(group: LayerGroup, path: str) -> bool:
    return any(p.rpartition(".")[0] == path for p in group.parameters) or any(
        path == module or path.startswith(module + ".") for module in group.modules
    )


def _logits(output: Any) -> Any:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits


def _modality(first: Tensor) -> str:
    if not first.is_floating_point():
        return "tokens"
    return "image" if first.ndim == 4 else "values"
