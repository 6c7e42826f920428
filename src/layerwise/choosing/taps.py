"""Hooks on a network: what each layer group hands on, and what its normalisation layers receive."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from layerwise.choosing.pooling import pool_all
from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.layers.norms import find_norms
from layerwise.layers.owners import is_under
from layerwise.layers.structures import tensors_in

Floats = npt.NDArray[np.float32]
CHUNKS = 64
"""Statistics of norm inputs are kept for so many parts of the sample, which a bootstrap re-draws."""
OUTPUT = "\0output"  # no module path holds a NUL


@dataclass(frozen=True)
class NormInputs:
    """What went into one normalisation layer, next to what its running statistics say of the source.

    Attributes:
        group: name of its layer group.
        sizes: samples of each chunk, int64[chunks].
        mean: per chunk of samples and channel, float64[chunks, channels].
        square: mean of the squares, likewise; of an InstanceNorm the mean of the samples' own unbiased
            variances, as its running variance is.
        running_mean: of the source domain, float32[channels].
        running_var: likewise.
        instance: whether it is an InstanceNorm.
    """

    group: str
    sizes: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float64]
    square: npt.NDArray[np.float64]
    running_mean: Floats
    running_var: Floats
    instance: bool = False


class Taps:
    """Hooks that keep the last output of each group, and sums of what each norm receives, of one pass.

    Args:
        model: the network, looked through its wrappers.
        layers: its map.
        norms: also watch norm layers with running statistics.
    """

    def __init__(self, model: nn.Module, layers: LayerMap, *, norms: bool) -> None:
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        self._widths = {
            group.name: {parameters[p].shape[0] for p in group.parameters if p in parameters}
            for group in layers
        }
        self._outputs = {
            group.name: [modules[path] for path in _handing_on(group, layers, modules)]
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
        self._place = {name: i for i, name in enumerate(layers.names)}
        self._inside = 0
        self._furthest = 0
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
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave(name)).remove)
            if self._head is not None:
                name, module = self._head
                hook = module.register_forward_pre_hook(self._keep_input(name), with_kwargs=True)
                stack.callback(hook.remove)
            for name in self._norms:
                hook = self._modules[name].register_forward_pre_hook(self._count(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def run(self, model: nn.Module, args: Any, kwargs: Any, *, size: int) -> dict[str, Tensor]:
        """Run one batch and return the pooled features of each group, float32[size, d] on the CPU."""
        self._seen, self._size, self._inside, self._furthest = {}, size, 0, 0
        mask = kwargs.get("attention_mask") if isinstance(kwargs, Mapping) else None
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        first = tensors_in((args, kwargs))[0]
        self._ratio = first.shape[-2] / first.shape[-1] if first.ndim == 4 else 1.0
        result = next(iter(tensors_in(_logits(model(*args, **kwargs)))), None)
        if result is not None and result.ndim == 2 and len(result) == size and result.is_floating_point():
            self._seen[OUTPUT] = result.float().cpu()
        return self._seen

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            # what is called inside another module hands nothing on; nor does what blocks share (a dropout,
            # say) once a later group has handed on
            if not self._inside and self._place[name] >= self._furthest:
                self._store(name, output)

        return hook

    def _keep_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._store(name, (args, kwargs))

        return hook

    def _store(self, name: str, value: Any) -> None:
        rows = [
            tensor
            for tensor in tensors_in(value)
            if tensor.is_floating_point() and tensor.ndim >= 2 and len(tensor) == self._size
        ]
        if not rows:
            return
        pooled = pool_all(rows, widths=self._widths[name], mask=self._mask, ratio=self._ratio)
        if pooled is not None:
            self._seen[name] = pooled.cpu()
            self._furthest = max(self._furthest, self._place[name])

    def _count(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = tensors_in((args, kwargs))[0]
            rows = value.detach().float().flatten(2) if value.ndim > 2 else value.detach().float()[..., None]
            own = isinstance(module, _InstanceNorm)
            unbiased = int(own and rows.shape[2] > 1)
            variance, mean = (
                part.cpu().double() for part in torch.var_mean(rows, dim=2, correction=unbiased)
            )
            square = variance if own else variance + mean**2  # float32 would lose a variance far from 0
            self._sums[name].append((mean, square))

        return hook

    def norm_inputs(self) -> dict[str, NormInputs]:
        """Return the statistics of every norm that ran, over `CHUNKS` parts of about equal size."""
        found = {}
        for name, group in self._norms.items():
            if not self._sums[name]:
                continue
            mean, square = (_chunks(torch.cat(part)) for part in zip(*self._sums[name]))
            norm = self._modules[name]
            found[name] = NormInputs(
                group=group,
                sizes=np.array([len(part) for part in mean]),
                mean=_means(mean),
                square=_means(square),
                running_mean=cast(Tensor, norm.running_mean).detach().float().cpu().numpy(),
                running_var=cast(Tensor, norm.running_var).detach().float().cpu().numpy(),
                instance=isinstance(norm, _InstanceNorm),
            )
        return found


def _chunks(rows: Tensor) -> list[Tensor]:
    """Return the rows in `CHUNKS` random parts: samples come in order of their classes as a rule."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(rows)))
    return [rows[order[first::CHUNKS]] for first in range(min(CHUNKS, len(rows)))]


def _means(parts: list[Tensor]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = torch.stack([part.mean(0) for part in parts]).numpy()
    return result


def _handing_on(group: LayerGroup, layers: LayerMap, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules whose outputs a group may hand on, the largest that are called.

    A block that holds a module which it shares with other groups is listed in the map by its other parts,
    and yet it is the block that hands on. A list of modules is never called: its entries are.
    """
    foreign = {
        path for other in layers if other.name != group.name for path in (*other.modules, *other.parameters)
    }
    found: dict[str, None] = {}
    for path in group.modules:
        above = path.rpartition(".")[0]
        while above and not any(name.startswith(above + ".") for name in foreign):
            path, above = above, above.rpartition(".")[0]
        found.update(dict.fromkeys(_called(path, modules)))
    return list(found)


def _called(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    module = modules.get(path)
    if module is not None and type(module).forward is nn.Module.forward:  # ModuleList and its like
        for name, _ in module.named_children():
            yield from _called(f"{path}.{name}", modules)
    elif module is not None:
        yield path


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
        is_under(path, module) for module in group.modules
    )


def _logits(output: Any) -> Any:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if logits is None else logits
