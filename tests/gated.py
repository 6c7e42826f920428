"""A model whose last bits depend on the place in a batch, where the processor has two routines for them."""

from __future__ import annotations

import torch
from torch import nn


class Gated(nn.Module):
    """Squeeze and excitation: an activation of few numbers a sample, in the frozen part."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.conv, self.squeeze = nn.Conv2d(3, 8, 3), nn.Conv2d(8, gates, 1)
        self.excite, self.head = nn.Conv2d(gates, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x)
        gate = nn.functional.silu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head((x * self.excite(gate).sigmoid()).mean((2, 3)))


def silu_is_uneven() -> bool:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    singly = [nn.functional.silu(one) for one in x.split(1)]
    return not torch.equal(nn.functional.silu(x), torch.cat(singly))
