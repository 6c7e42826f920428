"""Fold frozen batch-norms into the convolutions before them, for the time of a recording pass.

A batch-norm that does not train is a scale and a shift of each channel, so it can go into the weights of the
convolution whose output it alone reads. That saves a pass over each activation. The last bits change, so it
is done on request only, and only where the values stay near (`FOLD_TOLERANCE`).

The model is not touched: the folded weights are handed to the convolution's function call, and the
batch-norm's call returns what it is given. So there is nothing to put back, whatever is raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from layerwise.cache.changes.fingerprint import named_tensors
from layerwise.cache.cutting.cut import Cut, Values
from layerwise.errors import CacheError
from layerwise.layers.graph import Op, Recording

FOLD_TOLERANCE = 1e-4
"""Largest difference, relative to a value's largest number, up to which folded weights are used."""

_CONVOLUTIONS: tuple[Callable[..., Any], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_LEADING = ("input", "weight", "bias")


@dataclass(frozen=True)
class Pair:
    """A convolution and the batch-norm that alone reads its output, both frozen.

    Attributes:
        convolution: names of its weight and, if it has one, its bias.
        norm: names of weight, bias, running mean and running variance; ``""`` for what it does not have.
        eps: of the batch-norm.
    """

    convolution: tuple[str, str]
    norm: tuple[str, str, str, str]
    eps: float


def find_pairs(recording: Recording, cuts: Iterable[Cut]) -> list[Pair]:
    """Return the pairs that can be folded while the values of `cuts` are computed.

    Either both of a pair or none of it lie before the sites of each cut; so no stored value is what a
    convolution gave before its batch-norm.

    Args:
        recording: of the model in its present modes.
        cuts: whose values the pass shall give.
    """
    readers = Counter(source for op in recording.ops for source in op.sources)
    uses = Counter(name for op in recording.ops for name in op.parameters)
    handed_out = {recording.values[key].writer for key in recording.output_keys}
    before = [{name for source in cut.sources.values() for name in source.tensors} for cut in cuts]
    found = []
    for op in recording.ops:
        if "batch_norm" not in op.name or op.effect is not None or op.mutates or len(op.sources) != 1:
            continue
        source = recording.ops[op.sources[0]]
        if source.name != "convolution" or readers[source.index] != 1 or source.index in handed_out:
            continue
        pair = _pair(source, op, recording)
        if pair is None or uses[pair.convolution[0]] != 1:
            continue
        if any(pair.norm[2] in names for names in before) and all(
            (pair.convolution[0] in names) == (pair.norm[2] in names) for names in before
        ):
            found.append(pair)
    return found


def _pair(convolution: Op, norm: Op, recording: Recording) -> Pair | None:
    """Return the names of what two operations read; None if they read anything but weights of the model."""
    eps = getattr(norm.call.module, "eps", None) if norm.call is not None else None
    weights = [recording.values[key] for key in convolution.reads[1:]]
    own = [recording.values[key] for key in norm.reads[1:]]  # the first one is the input
    affine = [value.name for value in own if value.kind == "parameter"]
    statistics = [value.name for value in own if value.kind == "buffer"]
    if (
        not isinstance(eps, float)
        or norm.read_ops[0] != convolution.index
        or not 1 <= len(weights) <= 2
        or any(value.kind != "parameter" for value in weights)
        or len(own) != len(affine) + len(statistics)
        or len(affine) not in (0, 2)
        or len(statistics) != 2
    ):
        return None
    bias = weights[1].name if len(weights) > 1 else ""
    scale, shift = affine or ("", "")
    return Pair((weights[0].name, bias), (scale, shift, statistics[0], statistics[1]), eps)


class Folding(TorchFunctionMode):
    """Within: the convolutions of `pairs` run with folded weights, and their batch-norms do nothing.

    Args:
        model: whose weights.
        pairs: see `find_pairs`.

    Raises:
        CacheError: on leaving, if a convolution was folded and its batch-norm did not come.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self._tensors: Mapping[str, torch.Tensor] = named_tensors(model)  # identities stay valid
        self._pairs = {id(self._tensors[pair.convolution[0]]): pair for pair in pairs}
        self._folded: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        """Return how many pairs were folded so far; a transposed convolution is not."""
        return len(self._folded)

    def _fold(self, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return folded weight and bias of a convolution, and the running mean that its batch-norm has."""
        if key not in self._folded:
            tensors, pair = self._tensors, self._pairs[key]
            weight, bias = tensors[pair.convolution[0]], tensors.get(pair.convolution[1])
            scale, shift = (tensors.get(name) for name in pair.norm[:2])
            mean, variance = (tensors[name] for name in pair.norm[2:])
            with torch.no_grad():
                one, other = fuse_conv_bn_weights(weight, bias, mean, variance, pair.eps, scale, shift)
            self._folded[key] = one.detach(), other.detach(), mean
        return self._folded[key]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, or its folded form."""
        kwargs = kwargs or {}
        named = dict(zip(_LEADING, args)) | kwargs
        if func in _CONVOLUTIONS and id(named.get("weight")) in self._pairs:
            weight, bias, mean = self._fold(id(named["weight"]))
            left = {name: value for name, value in kwargs.items() if name not in _LEADING}
            output = func(named["input"], weight, bias, *args[3:], **left)
            self._waiting[id(output)] = output, mean
            return output
        if self._waiting and func in (nn.functional.batch_norm, torch.batch_norm):
            given = named["input"]
            folded = self._waiting.get(id(given))
            if folded is not None and any(part is folded[1] for part in (*args, *kwargs.values())):
                del self._waiting[id(given)]
                return given
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, *error: Any) -> None:
        """Leave the block; raise if a convolution was folded and its batch-norm did not come after it."""
        super().__exit__(kind, *error)  # type: ignore[no-untyped-call]
        waiting, self._waiting = self._waiting, {}
        if waiting and kind is None:
            raise CacheError(
                f"{len(waiting)} batch-norms did not follow their convolutions as they did when the "
                f"model was recorded, so they cannot be folded. Leave fold out."
            )


def relative_difference(one: Values, other: Values) -> float:
    """Return the largest difference at a site, relative to the largest number of its value; NaN of NaN."""
    found = [0.0]
    for site, value in one.items():
        wide = torch.complex128 if value.is_complex() else torch.float64
        a, b = value.cpu().to(wide), other[site].cpu().to(wide)
        gaps, sizes = (a - b).abs()[a != b], a.abs()[a.isfinite()]
        gap, scale = (float(part.max()) if part.numel() else 0.0 for part in (gaps, sizes))
        found.append(gap / scale if scale else gap)
    return float(torch.tensor(found, dtype=torch.float64).max())  # Python's max may pass over NaN
