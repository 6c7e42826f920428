"""`Stillness`: notice that frozen weights move while an epoch runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from layerwise.layers.isolation import buffers_in, parameters_in

_SENTINELS = 8  # tensors whose content is compared
_PROBED = 1024  # numbers of each of them


class Stillness:
    """Tells cheaply that frozen weights move while an epoch runs, as a momentum encoder's do.

    Autograd's version counters show most ways of writing, and the place in memory shows ``p.data = ...``. The
    content of a few small tensors, one in each part of the model, shows ``p.data.mul_``, as what moves the
    weights of a part moves all of them. Of batch-norms in eval mode the buffers are watched: the count of
    batches tells that a pass in train mode has adapted their statistics, whose versions do not show it.

    Args:
        modules: of the model, itself first.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        frozen = [p for p in parameters_in(modules) if not p.requires_grad]
        norms = [m for m in modules if isinstance(m, _NormBase) and not m.training]
        written = (*frozen, *buffers_in(norms))
        self._versioned = [tensor for tensor in written if not tensor.is_inference()]  # those have none
        self._versions = [tensor._version for tensor in self._versioned]
        self._placed = [p for p in frozen if type(p) is nn.Parameter]
        self._places = [p.data_ptr() for p in self._placed]
        self._contents = [(probe, probe.clone()) for probe in map(_probe, _sentinels(frozen, modules[0]))]

    def holds(self) -> bool:
        """Return whether no weight that was frozen has changed since."""
        return (
            [tensor._version for tensor in self._versioned] == self._versions
            and [p.data_ptr() for p in self._placed] == self._places
            and all([torch.equal(now, before) for now, before in self._contents])
        )


def _sentinels(frozen: list[nn.Parameter], model: nn.Module) -> list[nn.Parameter]:
    """Return a few small tensors among the frozen ones: the smallest of each child of the model first."""
    small = sorted((p for p in frozen if p.numel() and p.device.type != "meta"), key=torch.Tensor.numel)
    order = {id(p): number for number, p in enumerate(small)}
    parts = [model]
    while len(parts) == 1:
        parts = list(parts[0].children())
    own = (min((order[id(p)] for p in part.parameters() if id(p) in order), default=None) for part in parts)
    chosen = sorted({number for number in own if number is not None})
    return [small[number] for number in dict.fromkeys((*chosen, 0, 1)) if number < len(small)][:_SENTINELS]


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """Return some of a tensor's numbers, spread evenly."""
    tensor = tensor.detach()
    return tensor if tensor.numel() <= _PROBED else tensor.flatten()[:: tensor.numel() // _PROBED]
