"""`Cut`: which module calls a replay skips, and where the values that it needs enter."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn

from layerwise.errors import CacheError, percent


class NothingToSkipError(CacheError):
    """No part of the forward pass stays the same: no fault, there is just nothing to cache."""


class CallId(NamedTuple):
    """One module call, by name: module path, and how many calls of that module came before."""

    path: str
    nth: int


class Site(NamedTuple):
    """Where a cached value enters: the `slot`-th tensor among the outputs or arguments of a call."""

    call: CallId
    side: Literal["out", "in"]
    slot: int

    def __str__(self) -> str:
        nth = f"#{self.call.nth}" if self.call.nth else ""
        slot = f"[{self.slot}]" if self.slot else ""
        return f"{'input of ' if self.side == 'in' else ''}{self.call.path}{nth}{slot}"


Values = Mapping[Site, torch.Tensor]
"""What is at some sites, for one batch."""


@dataclass(frozen=True)
class Source:
    """What the value at a site is made of: the basis of its fingerprint.

    Attributes:
        tensors: names of the parameters and buffers that it depends on.
        structure: hash of the operations that it depends on, with their order, inputs and module calls.
    """

    tensors: tuple[str, ...]
    structure: str


@dataclass(frozen=True)
class Cut:
    """How to replay a forward pass without its frozen prefix.

    Attributes:
        skipped: the calls whose modules do not run -> the module.
        entered: the calls that run and take a cached argument -> the module.
        inside: for each skipped call, how many calls of modules that are skipped or entered elsewhere
            happen within it (they must be counted although they do not happen).
        passes: for a skipped call, output slot -> argument slot that it hands through untouched.
        frontier: sites of the cached values that depend on the input, in order of execution.
        constants: sites of needed values that do not depend on the input: the same for all batches.
        inputs: the model's inputs that are still read.
        sources: of each site.
        outlines: what each skipped call returned, all but what its tensors hold, as text.
        bytes_per_sample: size of `frontier`, as recorded.
        returned_bytes_per_sample: how much less it would be if the model returned and kept no frozen values.
        flops: of the recorded pass; `skipped_flops`: of the operations that are not run any more.
        frozen_flops: of the operations that nothing which learns feeds; some may not be skipped for all that.
        first_dirty: a sentence about the first dirty operation.
        leading: the skipped calls that begin before the last cached value is there.
    """

    skipped: dict[CallId, nn.Module]
    entered: dict[CallId, nn.Module]
    inside: dict[CallId, dict[nn.Module, int]]
    passes: dict[CallId, dict[int, int]]
    frontier: tuple[Site, ...]
    constants: tuple[Site, ...]
    inputs: frozenset[int]
    sources: dict[Site, Source] = field(repr=False)
    outlines: dict[CallId, str] = field(repr=False)
    bytes_per_sample: int = 0
    returned_bytes_per_sample: int = 0
    flops: int = 0
    skipped_flops: int = 0
    frozen_flops: int = 0
    first_dirty: str = ""
    leading: frozenset[CallId] = frozenset()

    def lost(self, *, cached: bool) -> str:
        """Return what speed is lost by frozen operations that run in every epoch; ``""`` if hardly any."""
        return lost_speed(self.flops, self.frozen_flops, self.skipped_flops if cached else 0)

    @functools.cached_property
    def paths(self) -> dict[nn.Module, str]:
        """The modules whose calls are skipped, or take a cached argument -> their paths."""
        return {module: call.path for call, module in (self.skipped | self.entered).items()}

    @functools.cached_property
    def entries(self) -> dict[CallId, list[Site]]:
        """The calls that take a cached argument -> which."""
        found: defaultdict[CallId, list[Site]] = defaultdict(list)
        for site in self.frontier:
            if site.side == "in":
                found[site.call].append(site)
        return dict(found)


def lost_speed(flops: int, frozen: int, skipped: int) -> str:
    """Return what speed frozen operations cost that are not skipped, for people; ``""`` if less than 5 %.

    Forward and backward of what learns count three times its operations, of what is frozen once.

    >>> lost_speed(100, 80, 20)
    '; 75% of the frozen operations run in every epoch, without which a step would be about 2.0x faster'
    """
    learns = 3 * (flops - frozen)
    speedup = (learns + frozen - skipped) / max(learns, 1)
    if speedup < 1.05:
        return ""
    gain = f"about {speedup:.1f}x faster" if speedup < 10 else "over 10x faster"
    share = percent(frozen - skipped, frozen, digits=0)
    return f"; {share}% of the frozen operations run in every epoch, without which a step would be {gain}"
