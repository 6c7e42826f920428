"""What two layer maps have in common and where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import shorten
from layerwise.shown import Shown

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap

_SHOWN = 5


@dataclass(frozen=True)
class MapDifference(Shown):
    """What changes from one layer map to another; false if nothing does.

    Attributes:
        granularity: both granularities, where they differ.
        groups_gone, groups_new: names of groups that only the first, only the second has.
        reordered: whether the groups that both have come in another order.
        parameters_gone, parameters_new: names of parameters that only the first, only the second has.
        moved: parameter -> (its group in the first map, in the second).
        resized: group of the same parameters -> (number of scalars in the first map, in the second).
    """

    granularity: tuple[str, str] | None
    groups_gone: tuple[str, ...]
    groups_new: tuple[str, ...]
    reordered: bool
    parameters_gone: tuple[str, ...]
    parameters_new: tuple[str, ...]
    moved: dict[str, tuple[str, str]]
    resized: dict[str, tuple[int, int]]

    def __bool__(self) -> bool:
        return any(bool(value) for value in vars(self).values())

    def __str__(self) -> str:
        lines = []
        if self.granularity:
            lines.append(f"granularity: {self.granularity[0]} -> {self.granularity[1]}")
        for what, names in (
            ("groups only in the first", self.groups_gone),
            ("groups only in the second", self.groups_new),
            ("parameters only in the first", self.parameters_gone),
            ("parameters only in the second", self.parameters_new),
        ):
            if names:
                lines.append(f"{what}: {shorten(names, _SHOWN)}")
        if self.reordered:
            lines.append("the groups that both have come in another order")
        if self.moved:
            moves = tuple(f"{name} ({old} -> {new})" for name, (old, new) in self.moved.items())
            lines.append(f"parameters in another group: {shorten(moves, _SHOWN)}")
        if self.resized:
            sizes = tuple(f"{name} ({old:,} -> {new:,})" for name, (old, new) in self.resized.items())
            lines.append(f"groups of another size: {shorten(sizes, _SHOWN)}")
        return "\n".join(lines) or "no difference"


def difference(first: LayerMap, second: LayerMap) -> MapDifference:
    """Return what changes from `first` to `second`; notes and costs are not compared."""
    ours = {name: group.name for group in first for name in group.parameters}
    theirs = {name: group.name for group in second for name in group.parameters}
    common = [name for name in first.names if name in second.names]
    return MapDifference(
        granularity=None
        if first.granularity == second.granularity
        else (first.granularity, second.granularity),
        groups_gone=tuple(name for name in first.names if name not in second.names),
        groups_new=tuple(name for name in second.names if name not in first.names),
        reordered=common != [name for name in second.names if name in first.names],
        parameters_gone=tuple(name for name in ours if name not in theirs),
        parameters_new=tuple(name for name in theirs if name not in ours),
        moved={
            name: (group, theirs[name])
            for name, group in ours.items()
            if name in theirs and theirs[name] != group
        },
        resized={
            name: (first[name].numel, second[name].numel)
            for name in common
            if set(first[name].parameters) == set(second[name].parameters)
            and first[name].numel != second[name].numel
        },
    )
