"""`Fixed`: what skipped calls give for every batch alike, in some circumstances."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.link import Link
from layerwise.cache.replay.passes import Skeleton


@dataclass(frozen=True)
class Circumstances:
    """In which a frozen part ran.

    Attributes:
        link: how the model was called.
        awake: its modules in train mode.
    """

    link: Link
    awake: frozenset[nn.Module]

    def agree(self, other: Circumstances, around: Set[nn.Module]) -> bool:
        """Return whether modules, autocast, gradients and kernels are the same; of modules only `around`."""
        return self.link.is_called_as(other.link) and (self.awake ^ other.awake).isdisjoint(around)


@dataclass
class Fixed:
    """What skipped calls give for every batch alike.

    A number or a table that a frozen module returns may follow an attribute or its mode. What of the values
    depends on the input has its own name for the operations behind it; this has the state of the modules.

    Attributes:
        settings: of the modules, as a number.
        circumstances: in which they ran.
        skeletons: of the calls.
        constants: values that do not depend on the input, with `quick_state` of the weights behind them.
    """

    settings: int
    circumstances: Circumstances
    skeletons: dict[CallId, Skeleton] = field(default_factory=dict)
    constants: dict[Site, tuple[torch.Tensor, tuple[Any, ...]]] = field(default_factory=dict)

    def has_constants(self, cut: Cut) -> bool:
        """Return whether all constants of a cut are known."""
        return all(site in self.constants for site in cut.constants)

    def has_all(self, cut: Cut) -> bool:
        """Return whether a cut can be replayed, as far as it is the same for every batch."""
        return self.has_constants(cut) and all(call in self.skeletons for call in cut.skipped)
