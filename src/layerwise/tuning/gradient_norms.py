"""Relative gradient norms of layer groups, measured on the gradients that train (Auto-RGN)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

MEASURED_STEPS = 5
"""So many steps of each epoch are averaged: one batch is noisy, and later ones come too late to help."""


class RelativeGradientNorms:
    """Averages ``|gradient| / |weights|`` of each group over the first steps of an epoch.

    Attributes:
        weights: group -> share of the largest relative gradient norm, in [0, 1]; 1 before the first
            measurement, and for a group whose weights are all zero (a new head may be).
        sums: group -> sum over the measured steps of this epoch.
        counts: group -> number of these in which it learned.
        steps: number of these.

    Source: Lee et al. 2023, section 4.2.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.steps = 0

    def start_epoch(self) -> None:
        """Begin to measure anew; the weights stay until the first measurement."""
        self.sums, self.counts, self.steps = {}, {}, 0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; ``RelativeGradientNorms.from_dict`` is its inverse."""
        return {
            "weights": dict(self.weights),
            "sums": dict(self.sums),
            "counts": dict(self.counts),
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RelativeGradientNorms:
        """Build what `to_dict` was called on."""
        found = cls()
        found.weights, found.sums, found.steps = dict(data["weights"]), dict(data["sums"]), int(data["steps"])
        found.counts = dict(data.get("counts", dict.fromkeys(found.sums, found.steps)))  # older states
        return found

    @torch.no_grad()
    def measure(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> bool:
        """Take in the gradients that `groups` hold now; return whether the weights changed.

        After `MEASURED_STEPS` steps of an epoch nothing is measured any more; a step with an infinite or
        undefined gradient does not count. Costs two norms a parameter.
        """
        if self.steps >= MEASURED_STEPS:
            return False
        gradients = {
            name: _norm([p.grad for p in parameters if p.grad is not None])
            for name, parameters in groups.items()
        }
        if not all(map(math.isfinite, gradients.values())):
            return False  # a loss scale that was too high: the step is left out
        for name, parameters in groups.items():
            weight = _norm(list(parameters))
            ratio = gradients[name] / weight if weight > 0 else math.nan
            self.sums[name] = self.sums.get(name, 0.0) + ratio
            self.counts[name] = self.counts.get(name, 0) + 1
        self.steps += 1
        known = {
            name: total * (self.steps / self.counts[name])
            for name, total in self.sums.items()
            if math.isfinite(total)
        }
        largest = max(known.values(), default=0.0)
        self.weights |= {
            name: known[name] / largest if name in known and largest > 0 else 1.0 for name in self.sums
        }
        return True


def by_layer_group(optimizer: Any) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that `optimizer` holds, by layer group."""
    found: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["layer_group"], []).extend(group["params"])
    return found


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    if not tensors:
        return 0.0
    return math.sqrt(sum(float(tensor.abs().float().square().sum()) for tensor in tensors))
