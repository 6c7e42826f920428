"""Units: the modules that a layer map never splits at block granularity, and which parameters are in them."""

from __future__ import annotations

import bisect
import collections
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch import nn

from layerwise.layers.calltree import CallTree
from layerwise.layers.graph import Call, Recording
from layerwise.layers.order import Order
from layerwise.layers.owners import is_leaf, is_list, module_of, paths_above


@dataclass(eq=False)
class Unit:
    """A module, or a bare parameter of an opened module, that stands in one group as a whole.

    Attributes:
        path: of the module, or the name of the bare parameter.
        kind: of the module, to find units alike; the path itself for a bare parameter.
        calls: the recorded calls of the module; empty for a bare parameter.
        start: index of its first operation, by which units are ordered.
        weights: number of weighted layers in it: parameters that enter products with its input.
        parameters: names, in order of use. Filled by `assign_parameters`.
    """

    path: str
    kind: Hashable
    calls: list[Call]
    start: int
    weights: int
    parameters: list[str] = field(default_factory=list)


def find_units(recording: Recording, order: Order) -> list[Unit]:
    """Return the units of the recorded model in the order in which they first run, parameters assigned."""
    tree = CallTree(recording, order)
    units: dict[nn.Module, Unit] = {}
    opened: set[nn.Module] = set()

    to_visit = [recording.root]
    while to_visit:
        call = to_visit.pop()
        module = call.module
        if module in units:
            units[module].calls.append(call)
        elif module in opened or tree.opens(call):
            opened.add(module)
            to_visit += reversed(tree.children(call))
        else:
            units[module] = Unit(call.path, tree.kind(module), [call], call.start, tree.weights(call))
    found = sorted([*units.values(), *_bare_units(recording, order, units.values())], key=lambda u: u.start)
    assign_parameters(recording, order, found)
    return [unit for unit in found if unit.parameters]


def spans_of(units: Iterable[Unit], length: int) -> list[int]:
    """Return for each operation the position of the unit that it runs in; -1 outside of all units."""
    at = [-1] * length
    for number, unit in enumerate(units):
        for call in unit.calls:
            at[call.start : call.end] = [number] * (call.end - call.start)
        if not unit.calls:
            at[unit.start] = number
    return at


def filled_forward(numbers: list[int]) -> list[int]:
    """Return `numbers` with each negative one replaced by the last one before it that is not.

    >>> filled_forward([-1, 3, -1, -1, 5])
    [-1, 3, 3, 3, 5]
    """
    filled, last = [], -1
    for number in numbers:
        last = number if number >= 0 else last
        filled.append(last)
    return filled


def assign_parameters(recording: Recording, order: Order, units: list[Unit]) -> None:
    """Give each parameter to the unit in which it is first needed, or to the last one begun before that.

    The parameters of one leaf module stay together, at the first of them. A parameter that no operation
    reads follows a used one: the nearest before it in registration order under the closest common parent.
    """
    at = spans_of(units, len(recording.ops))
    before = filled_forward(at)
    position = together(recording, order)
    for name in sorted(position, key=position.__getitem__):
        if units:
            units[max(before[position[name]], 0)].parameters.append(name)
    home = {name: unit for unit in units for name in unit.parameters}
    for name, neighbour in neighbours_of_unread(recording, position).items():
        home[neighbour].parameters.append(name)


def together(recording: Recording, order: Order) -> dict[str, int]:
    """Return the positions with those of one leaf module's own parameters made equal: the smallest."""
    leaves = {path for path, module in recording.model.named_modules() if path and is_leaf(module)}
    first: dict[str, int] = {}
    for name, index in order.position.items():
        owner = module_of(name)
        first[owner] = min(first.get(owner, index), index)
    return {
        name: first[owner] if (owner := module_of(name)) in leaves else index
        for name, index in order.position.items()
    }


def neighbours_of_unread(recording: Recording, position: dict[str, int]) -> dict[str, str]:
    """Return for each parameter without a position the one with a position that it should stand with."""
    names = list(recording.names)
    number = {name: place for place, name in enumerate(names)}
    under: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        if name in position:
            for parent in paths_above(name):
                under[parent].append(name)
    neighbours: dict[str, str] = {}
    for name in names:
        if name in position:
            continue
        candidates = next((under[parent] for parent in reversed(paths_above(name)) if under[parent]), [])
        if candidates:
            place = bisect.bisect_left([number[other] for other in candidates], number[name])
            neighbours[name] = candidates[max(place - 1, 0)]
    return neighbours


def _bare_units(recording: Recording, order: Order, units: Iterable[Unit]) -> list[Unit]:
    """Return units for weights that are applied outside of every unit: ``x @ self.projection``.

    Where the weight belongs to a module of its own (``F.linear(x, self.out.weight)``) the unit is called
    after that module.
    """
    at = spans_of(list(units), len(recording.ops))
    bare: dict[str, Unit] = {}
    claimed: set[str] = {name for unit in units for name in _names_in(recording, order, unit)}
    for op in recording.ops:
        if at[op.index] >= 0:
            continue
        for name in order.weights(op):
            if name in claimed or order.position.get(name) != op.index:
                continue
            owner = module_of(name)
            is_free = not owner or is_list(recording.model.get_submodule(owner))
            called = any(call.path == owner for call in recording.calls)
            path = name if is_free or called else owner
            bare.setdefault(path, Unit(path, path, [], op.index, 1))
    return list(bare.values())


def _names_in(recording: Recording, order: Order, unit: Unit) -> set[str]:
    return {
        name
        for call in unit.calls
        for op in recording.ops[call.start : call.end]
        for name in order.needed[op.index]
    }
