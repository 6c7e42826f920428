"""`pool`: one vector a sample of whatever a layer group hands on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FORESHORTENED = 1.5
"""Factor up to which the sides of positions may depart from the input image's, where nothing else tells."""


def pool_all(
    values: Sequence[Tensor], *, widths: set[int], mask: Tensor | None = None, ratio: float = 1.0
) -> Tensor | None:
    """Return the pooled values of one group side by side, float32[N, channels]; None where one has none.

    Networks with several branches hand on several tensors. Only those with as many axes as the first count:
    a mask or a table of attention weights beside the features is no feature.

    Args:
        values: float[N, ...] each.
        widths: as for `pool`.
        mask: as for `pool`.
        ratio: as for `pool`.
    """
    alike = [value for value in values if value.ndim == values[0].ndim]
    found = [pool(value, widths=widths, mask=mask, ratio=ratio) for value in alike]
    if not found or any(part is None for part in found):
        return None
    return torch.cat([part for part in found if part is not None], dim=1)


def pool(value: Tensor, *, widths: set[int], mask: Tensor | None = None, ratio: float = 1.0) -> Tensor | None:
    """Return one vector a sample: the mean of a tensor over its positions, float32[N, channels].

    Which axis holds the channels is told by the sizes of the group's own parameters (a bias or a norm has
    one entry a channel). Where several axes fit: of four axes, those two are positions whose sides have the
    ratio of the input image, and (N, C, H, W) wins a tie; of three axes the last one is the channels. None
    where no axis fits and no two sides have that ratio: attention heads, say, taken for channels would be
    worse than nothing.

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
    if axis is None:
        return None
    value = value.movedim(axis, -1)
    if mask is not None and value.ndim == 3 and value.shape[1] == mask.shape[1]:
        weights = mask.to(value.dtype)[..., None]
        return (value * weights).sum(1) / weights.sum(1).clamp(min=1)
    return value.flatten(1, -2).mean(1)


def _channel_axis(shape: Sequence[int], widths: set[int], ratio: float) -> int | None:
    axes = range(1, len(shape))
    # an axis of one entry is a channel by itself only where there is no other
    fitting = [axis for axis in axes if shape[axis] in widths and (shape[axis] > 1 or max(shape[1:]) == 1)]
    if len(shape) != 4:
        candidates = fitting or list(axes)
        return candidates[-1] if len(shape) == 3 else candidates[0]

    def misfit(axis: int) -> float:
        height, width = (shape[other] for other in axes if other != axis)
        return abs(float(np.log(height / width / ratio)))

    best = min(fitting or axes, key=lambda axis: (round(misfit(axis), 2), axis != 1))
    return best if fitting or misfit(best) <= np.log(FORESHORTENED) else None
