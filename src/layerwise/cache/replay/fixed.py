"""`Fixed`: what skipped calls give for every batch alike, where the model is called in some way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from layerwise.cache.changes.fingerprint import quick_state
from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.capturing import Captured, Skeleton
from layerwise.cache.replay.link import Link


@dataclass
class Fixed:
    """What skipped calls give for every batch alike.

    A number or a table that a frozen module returns may follow its mode, or an attribute: then the cut that
    was found tells of another output.

    Attributes:
        link: how the model was called.
        skeletons: of the calls.
        constants: values that do not depend on the input, with `quick_state` of the weights behind them.
        told: what the cut tells of each call's output, and of the operations behind each value.
    """

    link: Link
    skeletons: dict[CallId, Skeleton] = field(default_factory=dict)
    constants: dict[Site, tuple[torch.Tensor, tuple[Any, ...]]] = field(default_factory=dict)
    told: dict[CallId | Site, str] = field(default_factory=dict)

    def has_constants(self, cut: Cut) -> bool:
        """Return whether all constants of a cut are known."""
        return all(site in self.constants for site in cut.constants)

    def has_skeletons(self, cut: Cut) -> bool:
        """Return whether the skeletons of all skipped calls of a cut are known."""
        return all(call in self.skeletons for call in cut.skipped)

    def take(self, known: Fixed, cuts: Iterable[Cut]) -> None:
        """Take what another phase knows and these cuts tell to be the same now."""
        for cut in cuts:
            for call, text in cut.outlines.items():
                if call in known.skeletons and known.told[call] == text:
                    self.skeletons[call], self.told[call] = known.skeletons[call], text
            for site in cut.constants:
                text = cut.sources[site].structure
                if site in known.constants and known.told[site] == text:
                    self.constants[site], self.told[site] = known.constants[site], text

    def note(self, cuts: Iterable[Cut], found: Captured, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note what a pass gave for these cuts.

        Args:
            cuts: whose calls and constants.
            found: by the pass, and proved.
            tensors: of the model, by their names.
        """
        for cut in cuts:
            for call in cut.skipped.keys() & found.skeletons.keys():
                self.skeletons[call], self.told[call] = found.skeletons[call], cut.outlines[call]
            for site in cut.constants:
                source = cut.sources[site]
                self.constants[site] = found.values[site], quick_state(tensors, source.tensors)
                self.told[site] = source.structure
