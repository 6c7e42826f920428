"""From units to layer groups: which units learn together at each granularity."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from layerwise.layers.graph import Recording
from layerwise.layers.layermap import Role
from layerwise.layers.order import Order
from layerwise.layers.owners import is_leaf, is_list, is_under, module_of, paths_above
from layerwise.layers.units import Unit


@dataclass(eq=False)
class Group:
    """A layer group in the making.

    Attributes:
        role: as in `LayerGroup`.
        units: its units in order.
        core: path of the unit that it is built around: the block, the convolution.
        stage: path of the module that holds the whole stage, once stages are known.
    """

    role: Role
    units: list[Unit] = field(default_factory=list)
    core: str = ""
    stage: str = ""

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters, in order."""
        return [name for unit in self.units for name in unit.parameters]


def blocks_of(units: list[Unit]) -> list[bool]:
    """Return for each unit whether it is a block of the trunk.

    Units with two or more weighted layers are blocks if most of the network's weighted layers lie in such
    units. Otherwise the network is a sequence of single layers (VGG, a perceptron), and each unit with
    weights counts as a block.
    """
    large = [unit.weights >= 2 for unit in units]
    inside = sum(unit.weights for unit, is_large in zip(units, large) if is_large)
    if 2 * inside >= sum(unit.weights for unit in units) > 0:
        return large
    return [unit.weights >= 1 for unit in units]


def group_blocks(recording: Recording, units: list[Unit]) -> list[Group]:
    """Group the units of the trunk (the head is taken out before): one block a group.

    - What stands before the first block is the stem, one group, except what lies in the first block's
      own stage module. A network of single layers has one where it begins with a table (an embedding).
    - What stands between two blocks joins one of them, so that a step of depth is always one block: the
      one whose module path it shares more of; else a norm joins the block before and a layer with
      weights (a downsampling) the block that it feeds. Units that do not read the block before begin
      another input branch (a decoder's embeddings) and are a group; what ends the branch before them (a
      tower's projection) joins that one's last block.
    - After the last block a norm joins it, and so does what lies in the same stage module; each further
      layer with weights is a group.
    """
    is_block = blocks_of(units)
    if not any(is_block):
        return [Group("trunk", units, units[0].path)] if units else []
    first = is_block.index(True)
    last = len(units) - 1 - is_block[::-1].index(True)
    blocks = [unit for unit, block in zip(units, is_block) if block]
    groups: list[Group] = []
    waiting: list[Unit] = []
    if any(unit.weights >= 2 for unit in units[first:]):
        own = _own_stages(recording, blocks, units[first])
        inside = next((n for n in range(first) if _inside(units[n], own)), first)
        if inside:
            groups.append(Group("stem", units[:inside], units[0].path))
        waiting = units[inside:first]
    elif any(
        recording.model.get_parameter(name).ndim > 1 for unit in units[:first] for name in unit.parameters
    ):
        groups.append(Group("stem", units[:first], units[0].path))
    else:
        waiting = units[:first]
    for place in range(first, last + 1):
        if not is_block[place]:
            waiting.append(units[place])
            continue
        block = units[place]
        if groups and waiting and any(is_block[: place - len(waiting)]):
            waiting = _share_out(recording, groups, waiting, block)
        groups.append(Group("trunk", [*waiting, block], block.path))
        waiting = []
    own = _own_stages(recording, blocks, units[last])
    for unit in units[last + 1 :]:
        if unit.weights and not _inside(unit, own):
            groups.append(Group("trunk", [unit], unit.path))
        else:
            groups[-1].units.append(unit)
    return groups


def _share_out(recording: Recording, groups: list[Group], between: list[Unit], block: Unit) -> list[Unit]:
    """Give the units between two blocks to the group before where they belong there; return the rest."""
    previous = next(unit for unit in reversed(groups[-1].units) if unit.calls)
    joined = 0
    for place, unit in enumerate(between):
        near = _common(unit.path, previous.path), _common(unit.path, block.path)
        leads_to_weights = any(
            later.weights and later.path.rpartition(".")[0] == unit.path.rpartition(".")[0]
            for later in between[place + 1 :]
        )
        if not _reads(recording, unit, previous):
            break
        if near[0] > near[1] or (near[0] == near[1] and not unit.weights and not leads_to_weights):
            joined = place + 1
    groups[-1].units += between[:joined]
    rest = between[joined:]
    fresh = list(itertools.dropwhile(lambda unit: _reads(recording, unit, previous), rest))
    leading = rest[: len(rest) - len(fresh)]
    begins = not any(_reads(recording, unit, previous) for unit in fresh)
    if leading and begins:  # it may feed the block, with positions added (a downsampling), or end a tower
        begins = bool(block.calls) and not _main_input_from(recording, block, previous)
    if begins and any(unit.parameters for unit in fresh):
        groups[-1].units += leading
        groups.append(Group("trunk", fresh, fresh[0].path))
        return []
    return rest


def _reads(recording: Recording, unit: Unit, previous: Unit) -> bool:
    """Whether anything that `unit` computes depends on what `previous` computed."""
    if not unit.calls:
        return True
    reached = {index for call in previous.calls for index in range(call.start, call.end)}
    for op in recording.ops[previous.calls[0].end : unit.calls[0].end]:
        if not reached.isdisjoint(op.sources):
            reached.add(op.index)
    return any(op.index in reached for op in recording.ops[unit.calls[0].start : unit.calls[0].end])


def _own_stages(recording: Recording, blocks: list[Unit], block: Unit) -> list[str]:
    """Return the stage modules that the first or the last of `blocks` lies in.

    These have numbered siblings, one of which feeds the next: members of an ensemble are none.
    """
    containers = _numbered_containers([unit.path for unit in blocks])
    own = []
    for path in containers:
        siblings = [other for other in containers if other != path and _family(other) == _family(path)]
        inside, beside = (
            [unit for unit in blocks if unit.calls and _inside(unit, paths)] for paths in ([path], siblings)
        )
        if block not in inside or not beside:
            continue
        before, after = (inside, beside) if block is blocks[0] else (beside, inside)
        if any(_reads(recording, unit, before[-1]) for unit in after):
            own.append(path)
    return own


def _numbered_containers(blocks: list[str]) -> list[str]:
    """Return the paths above blocks that differ from another such path only in their last number."""
    above = {path for block in blocks for path in paths_above(block)[1:]}
    families = collections.Counter(_family(path) for path in above)
    return [path for path in above if families[_family(path)] > 1]


def _family(path: str) -> str:
    return re.sub(r"_?\d+$", "", path)


def _inside(unit: Unit, containers: list[str]) -> bool:
    return any(is_under(unit.path, path) for path in containers)


def _common(one: str, other: str) -> int:
    """Return how many module path components two paths begin with together.

    >>> _common("encoder.layer.0", "encoder.layer.1")
    2
    """
    levels = zip(one.split("."), other.split("."))
    return sum(1 for _ in itertools.takewhile(lambda level: level[0] == level[1], levels))


def group_stages(recording: Recording, groups: list[Group]) -> list[Group]:
    """Merge the blocks' groups into stages; the stem and single layers stay as they are.

    The blocks' module paths form a tree. Where a path has several numbered children with blocks in them
    (``layer1`` to ``layer4``, ``blocks.0`` to ``blocks.6``), or several children with blocks of one kind,
    each of which reads the one before, these children are the stages. A flat list of blocks
    (``features.1`` to ``features.17``) is cut where the number of positions changes; if it never does,
    the network is a plain transformer or the like and each block is a stage of its own.
    """
    trunk = [group for group in groups if group.role == "trunk"]
    cores = {group.core: group for group in trunk}
    stages = _stages_under("", list(cores), cores, recording)
    merged: list[Group] = []
    for group in groups:
        stage = stages.get(group.core, "") if group.role == "trunk" else ""
        if stage and merged and merged[-1].stage == stage:
            merged[-1].units += group.units
        else:
            merged.append(Group(group.role, list(group.units), group.core, stage))
    return merged


def _stages_under(
    prefix: str, cores: list[str], groups: dict[str, Group], recording: Recording
) -> dict[str, str]:
    """Return core -> path of its stage, for the cores at or below the module path `prefix`."""
    below: dict[str, list[str]] = {}
    for core in cores:
        rest = core[len(prefix) + 1 :] if prefix else core
        child = rest.split(".")[0]
        below.setdefault(f"{prefix}.{child}" if prefix else child, []).append(core)
    nests = {path: inside for path, inside in below.items() if inside != [path]}
    flat = [path for path, inside in below.items() if inside == [path]]
    stages: dict[str, str] = {}
    families: dict[str, list[str]] = {}
    for path in below:
        families.setdefault(_family(path), []).append(path)  # repeat, repeat_1
    numbered = [paths for paths in families.values() if any(path in nests for path in paths)]
    alike = {
        path
        for paths in [*numbered, _of_one_kind(nests, groups)]
        if len(paths) > 1 and _is_chain(paths, below, groups, recording)
        for path in paths
    }
    for path, inside in below.items():
        if path in alike:
            stages |= dict.fromkeys(inside, path)
        elif path in nests:
            stages |= _stages_under(path, inside, groups, recording)
    blocks = [core for core in flat if _block(groups[core]).weights >= 1 and _block(groups[core]).calls]
    sizes = [_positions(_block(groups[core]), recording) for core in blocks]
    if len(blocks) > 1 and len(set(sizes)) > 1 and not alike:
        start = ""
        for place, core in enumerate(blocks):
            chained = place and _reads(recording, _block(groups[core]), _block(groups[blocks[place - 1]]))
            if not chained or sizes[place] != sizes[place - 1]:
                start = core
            stages[core] = start
    return stages


def _block(group: Group) -> Unit:
    return next(unit for unit in group.units if unit.path == group.core)


def _of_one_kind(nests: dict[str, list[str]], groups: dict[str, Group]) -> list[str]:
    """Return the nests if all of them are made, for the most part, of one and the same kind of block."""
    kinds: set[Hashable] = set()
    for inside in nests.values():
        weights: collections.Counter[Hashable] = collections.Counter()
        for core in inside:
            block = _block(groups[core])
            weights[block.kind if block.weights >= 2 else block.path] += block.weights
        kinds.add(weights.most_common(1)[0][0])
    return list(nests) if len(kinds) == 1 else []


def _is_chain(
    paths: list[str], below: dict[str, list[str]], groups: dict[str, Group], recording: Recording
) -> bool:
    """Whether the main input of each nest's first block comes from the nest before it."""
    for one, other in itertools.pairwise(paths):
        before = _block(groups[below[one][-1]])
        after = _block(groups[below[other][0]])
        if not before.calls or not after.calls or not _main_input_from(recording, after, before):
            return False
    return True


def _main_input_from(recording: Recording, unit: Unit, source: Unit) -> bool:
    call = unit.calls[0]
    span = range(source.calls[0].start, source.calls[0].end)
    waiting = [op for op in call.input_ops[:1] if op is not None]
    seen: set[int] = set()
    while waiting:
        index = waiting.pop()
        if index in span:
            return True
        if index not in seen and index > span.start:
            seen.add(index)
            waiting += recording.ops[index].sources
    return False


def _positions(unit: Unit, recording: Recording) -> int:
    """Return the number of positions (pixels, tokens) that a block hands on, judged by its last layer."""
    for op in reversed(recording.ops[unit.calls[0].start : unit.calls[0].end]):
        shape = recording.values[op.writes[-1]].shape if op.writes else ()
        if op.name == "convolution":
            return math.prod(shape[2:])
        if op.name in ("addmm", "mm") and op.parameters:
            return shape[0] // max(recording.batch_size, 1)
    return 0


def group_layers(recording: Recording, order: Order, position: dict[str, int]) -> list[Group]:
    """Group by parametric leaf: one module with parameters of its own a group, in order of use.

    The bare parameters of a module with children (a class token, a layer's scale) join the leaf that ran
    last before they are needed, unless they are applied as a weight (``in_proj_weight`` of an attention).
    """
    model = recording.model
    owner_of = {name: module_of(name) for name in position}
    applied = {name for op in recording.ops for name in order.weights(op)[:1]}
    weighted = {owner_of[name] for name in applied if name in owner_of}
    leaf = {owner: is_leaf(model.get_submodule(owner)) for owner in set(owner_of.values())}
    free = {owner for owner in leaf if not owner or is_list(model.get_submodule(owner))}
    groups: dict[str, Group] = {}
    waiting: list[str] = []
    current: Group | None = None
    for name in sorted(position, key=position.__getitem__):
        owner = owner_of[name]
        if owner not in free and (leaf[owner] or owner in weighted):
            if owner not in groups:
                groups[owner] = Group("trunk", [Unit(owner, owner, [], position[name], 1)], owner)
            groups[owner].units[0].parameters.append(name)
            current = groups[owner]
            current.units[0].parameters[:0] = waiting
            waiting = []
        elif owner in free and name in applied:
            current = groups[name] = Group("trunk", [Unit(name, name, [], position[name], 1, [name])], name)
        elif current is None:
            waiting.append(name)
        else:
            current.units[0].parameters.append(name)
    if waiting and not groups:
        groups[waiting[0]] = Group("trunk", [Unit(waiting[0], waiting[0], [], 0, 1, waiting)], waiting[0])
    return list(groups.values())
