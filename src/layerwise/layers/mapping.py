"""`layer_map`: from a live model to its `LayerMap`."""

from __future__ import annotations

from typing import Any

from torch import nn

from layerwise.errors import ModelError, did_you_mean
from layerwise.layers.graph import Call, Recording
from layerwise.layers.grouping import Group, group_blocks, group_layers, group_stages
from layerwise.layers.grouping import blocks_of as find_blocks
from layerwise.layers.inputs import larger_images, record_example
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import GRANULARITIES, Granularity, LayerGroup, LayerMap
from layerwise.layers.norms import norm_parameters
from layerwise.layers.order import Order, order_of
from layerwise.layers.outputs import head_parameters, output_layers
from layerwise.layers.owners import is_under, paths_above
from layerwise.layers.recording import record_without_data
from layerwise.layers.units import Unit, filled_forward, find_units, neighbours_of_unread, together

_MOST_GROWN = 4  # a pass on larger images that takes so many times the operations loops over positions


def layer_map(model: nn.Module, example_input: Any = None, granularity: Granularity = "blocks") -> LayerMap:
    """Return the layer groups of any model, in the order in which its input flows through them.

    One forward pass is recorded on tensors without data (`layerwise.layers.recording.record`), so it costs
    neither floating-point work nor memory and the model is left exactly as it was. The order is that of
    the recorded dependencies; registration order and names play no part. ``docs/guide/layer-maps.md``
    says what one group is at each granularity.

    Args:
        model: any module: on any device (meta as well), in any precision, compiled, in DDP or FSDP, with
            PEFT adapters, partly frozen or not. Names in the map are those of the unwrapped model.
        example_input: a tensor, a tuple of positional arguments, or a dict of keyword arguments, batch
            dimension first. None derives one and says so in `LayerMap.notes`.
        granularity: ``"stages"`` (a resolution of a convolutional network, an encoder layer of a plain
            transformer), ``"blocks"`` (a residual block, an encoder layer) or ``"layers"`` (a module with
            parameters of its own; weight and bias never part).

    Returns:
        The map: plain data that keeps no reference to `model`.

    Raises:
        ModelError: the model has no parameters or uninitialised lazy modules, or is TorchScript; the
            granularity is unknown.
        RecordingError: the forward pass raised with this input.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> layers = layer_map(net)
    >>> layers.names, layers.head.name, layers.depth_of("0.weight")
    (('0', '2', '4'), '4', 2)
    """
    if granularity not in GRANULARITIES:
        raise ModelError(
            f"granularity {granularity!r} is unknown; expected one of {', '.join(GRANULARITIES)}."
            f"{did_you_mean(str(granularity), GRANULARITIES, count=1)}"
        )
    model = unwrap(model)
    if next(model.parameters(), None) is None:
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to group.")
    recording, arguments, notes = record_example(model, example_input, mode="eval")
    larger = larger_images(arguments)
    most_ops = _MOST_GROWN * len(recording.ops)
    telling = None if larger is None else record_without_data(model, *larger, most_ops=most_ops)
    return map_recording(recording, granularity, notes=notes, telling=telling)


def map_recording(
    recording: Recording,
    granularity: Granularity,
    *,
    notes: tuple[str, ...] = (),
    telling: Recording | None = None,
) -> LayerMap:
    """Return the layer map of a recording that was made in evaluation mode; see `layer_map`.

    Args:
        recording: of the model.
        granularity: of the map.
        notes: of the map.
        telling: a recording on larger images, which tells the head where the maps of this one are single
            positions before they are pooled.

    Raises:
        ModelError: the pass reads no parameter.
    """
    order = order_of(recording)
    if not order.position:
        raise ModelError(
            f"the forward pass of {type(recording.model).__name__} reads none of its {len(recording.names)} "
            "parameters, so nothing tells their order. Check the example input, and what forward uses."
        )
    units = find_units(recording, order)
    outputs = output_layers(recording, order)
    if telling is None:
        head = _head(recording, order, units)
    else:
        theirs = order_of(telling)
        head = _head(telling, theirs, find_units(telling, theirs))
    idle = _leading_nowhere(recording, order, head)
    if idle:
        order = order.without(idle)
        units, head = find_units(recording, order), [name for name in head if name not in idle]
    neighbours = neighbours_of_unread(recording, order.position)
    head += [name for name, neighbour in neighbours.items() if neighbour in head]
    groups = _trunk(recording, order, _without(units, set(head)), set(head), granularity)
    if head:
        aliases = {alias for name in head for alias in recording.names[name]}
        output = next((path for path in outputs if any(is_under(alias, path) for alias in aliases)), head[0])
        groups.append(Group("head", [Unit(output, output, [], 0, 1, head)], output))
    groups = [group for group in groups if group.parameters]
    layers = _Finished(recording, order, groups).layer_groups()
    unread = (*recording.unread, *(name for name in recording.names if name in idle))
    extra = _head_note(outputs, bool(head), recording)
    return LayerMap(
        groups=tuple(layers),
        granularity=granularity,
        model_class=f"{type(recording.model).__module__}.{type(recording.model).__qualname__}",
        aliases={alias: names[0] for names in recording.names.values() for alias in names[1:]},
        unused=unread,
        outputs=outputs,
        notes=(*notes, *recording.notes, *extra),
        norms=norm_parameters(recording.model, recording.names),
    )


def _head(recording: Recording, order: Order, units: list[Unit]) -> list[str]:
    """Return the parameters of the head, in order of use."""
    outputs = output_layers(recording, order)
    return list(head_parameters(recording, order, outputs, units, find_blocks(units)))


def _leading_nowhere(recording: Recording, order: Order, names: list[str]) -> set[str]:
    """Return those of `names` on which nothing depends that the model returns or keeps: an idle pooler's."""
    made_by = {key: op.index for op in recording.ops for key in op.writes}
    leaving = (*recording.output_keys, *recording.kept_keys)
    waiting = [made_by[key] for key in leaving if key in made_by]
    reached: set[int] = set()
    while waiting:
        index = waiting.pop()
        if index not in reached:
            reached.add(index)
            waiting += recording.ops[index].sources
    alive = {name for index in reached for name in (*recording.ops[index].parameters, *order.needed[index])}
    return set(names) - alive if reached else set()


def _head_note(outputs: tuple[str, ...], has_head: bool, recording: Recording) -> tuple[str, ...]:
    if has_head:
        return ()
    if outputs:
        tied = [
            names[0]
            for names in recording.names.values()
            if len(names) > 1 and any(is_under(name, path) for name in names for path in outputs)
        ]
        return (
            f"the output layer {', '.join(outputs)} has no weights of its own: it is tied to "
            f"{', '.join(tied) or 'an earlier layer'}, so there is no head group",
        )
    return ("no output layer was found: the model ends in a norm or a block, so there is no head group",)


def _without(units: list[Unit], names: set[str]) -> list[Unit]:
    """Return the units without the parameters `names`, those that have none left dropped."""
    kept = []
    for unit in units:
        rest = [name for name in unit.parameters if name not in names]
        if rest:
            weights = unit.weights if len(rest) == len(unit.parameters) else min(unit.weights, 1)
            kept.append(Unit(unit.path, unit.kind, unit.calls, unit.start, weights, rest))
    return kept


def _trunk(
    recording: Recording, order: Order, units: list[Unit], head: set[str], granularity: Granularity
) -> list[Group]:
    if granularity == "layers":
        position = {name: at for name, at in together(recording, order).items() if name not in head}
        groups = group_layers(recording, order, position)
        home = {name: group for group in groups for name in group.parameters}
        spare = {name for unit in units for name in unit.parameters} - home.keys()
        for name, neighbour in neighbours_of_unread(recording, position).items():
            if name in spare:
                home[neighbour].units[0].parameters.append(name)
        return groups
    groups = group_blocks(recording, units)
    return group_stages(recording, groups) if granularity == "stages" else groups


class _Finished:
    """Names, modules and costs of finished groups."""

    def __init__(self, recording: Recording, order: Order, groups: list[Group]) -> None:
        self._recording = recording
        self._order = order
        self._groups = groups
        self._modules = dict(recording.model.named_modules())
        self._numel = {name: recording.model.get_parameter(name).numel() for name in recording.names}
        self._group_of = {name: n for n, group in enumerate(groups) for name in group.parameters}
        self._inside = self._groups_inside()
        self._at = self._groups_of_operations()

    def layer_groups(self) -> list[LayerGroup]:
        modules = self._top_modules()
        flops, handed_on = self._costs()
        position, last = self._order.position, len(self._recording.ops)
        registered = {name: number for number, name in enumerate(self._recording.names)}
        result: list[LayerGroup] = []
        for number, group in enumerate(self._groups):
            names = sorted(group.parameters, key=lambda name: (position.get(name, last), registered[name]))
            name = self._name(group, names, modules[number])
            if any(name == other.name for other in result):
                name = names[0]  # an output layer's own weight, whose module holds another group too
            result.append(
                LayerGroup(
                    name=name,
                    role=group.role,
                    modules=tuple(modules[number]),
                    parameters=tuple(names),
                    numel=sum(self._numel[name] for name in names),
                    flops=flops[number],
                    activation_bytes=handed_on[number],
                    sizes=tuple(self._numel[name] for name in names),
                )
            )
        return result

    def _groups_inside(self) -> dict[str, set[int]]:
        """Return for each module path the groups of the parameters at and below it."""
        inside: dict[str, set[int]] = {path: set() for path in self._modules}
        for first, names in self._recording.names.items():
            for name in names:
                for path in paths_above(name):
                    if path in inside:
                        inside[path].add(self._group_of[first])
        return inside

    def _groups_of_operations(self) -> list[int]:
        """Return the group that each operation belongs to; glue belongs to the group before it."""
        recording = self._recording
        at = [-1] * len(recording.ops)
        first_use: dict[str, bool] = {}
        for call in recording.calls:
            groups = self._inside.get(call.path, set())
            if len(groups) != 1:
                continue
            if call.path not in first_use:  # a tied output layer runs long after its weight's group
                names = [name for name, _ in call.module.named_parameters(prefix=call.path)]
                positions = [self._order.position.get(name, -1) for name in names]
                first_use[call.path] = any(call.start <= place < call.end for place in positions)
            if first_use[call.path]:
                at[call.start : call.end] = list(groups) * (call.end - call.start)
        for op in recording.ops:
            if at[op.index] < 0 and (needed := self._order.needed[op.index]):
                groups = {self._group_of[n] for n in needed if self._order.position[n] == op.index}
                at[op.index] = max(groups, default=-1)
        return [max(group, 0) for group in filled_forward(at)]

    def _top_modules(self) -> list[list[str]]:
        """Return for each group the top-most modules that lie wholly in it, in order of execution."""
        inside = {path: set(groups) for path, groups in self._inside.items()}
        earliest: dict[str, int] = {}  # of the calls at and below a path
        seen: set[str] = set()
        for number, call in enumerate(self._recording.calls):
            if call.path in seen:
                continue
            seen.add(call.path)
            around = (*paths_above(call.path), call.path)
            for path in around:
                earliest.setdefault(path, number)
            if not self._inside.get(call.path) and not call.children:
                group = self._group_of_plain(call)
                for path in around:
                    inside[path].add(group)
        tops: list[list[str]] = [[] for _ in self._groups]
        whole: set[str] = set()
        for path in self._modules:
            if path and len(inside[path]) == 1 and path.rpartition(".")[0] not in whole:
                tops[next(iter(inside[path]))].append(path)
            if path and (len(inside[path]) == 1 or path.rpartition(".")[0] in whole):
                whole.add(path)
        last = len(self._recording.calls)
        return [sorted(paths, key=lambda path: earliest.get(path, last)) for paths in tops]

    def _group_of_plain(self, call: Call) -> int:
        """Return the group of a module without parameters: where it runs, a head's dropout in the head."""
        above = call.parent
        while above is not None and not self._inside.get(above.path):
            above = above.parent
        if above is not None and len(groups := self._inside[above.path]) == 1:
            return next(iter(groups))
        last = len(self._at) - 1
        before = (
            self._at[min(call.start, last)] if call.end > call.start else self._at[max(call.start - 1, 0)]
        )
        after = self._at[min(call.end, last)]
        is_dropout = "drop" in type(call.module).__name__.lower()
        if is_dropout and self._groups[after].role == "head":
            return after
        return before

    def _costs(self) -> tuple[list[int], list[int]]:
        """Return FLOPs and the bytes handed on to later groups or the output, per sample and group."""
        recording = self._recording
        flops = [0] * len(self._groups)
        sizes = [0] * len(self._groups)
        counted: set[tuple[int, int]] = set()

        def hand_on(key: int, source: int | None, to: int) -> None:
            if source is None or not recording.input_dependent[source]:
                return
            group = self._at[source]
            if group < to and (group, key) not in counted:
                counted.add((group, key))
                sizes[group] += recording.values[key].nbytes

        for op in recording.ops:
            flops[self._at[op.index]] += op.flops
            for key, source in zip(op.reads, op.read_ops, strict=True):
                hand_on(key, source, self._at[op.index])
        for key in recording.output_keys:
            hand_on(key, recording.values[key].writer, len(self._groups))
        batch = max(recording.batch_size, 1)
        return [total // batch for total in flops], [total // batch for total in sizes]

    def _name(self, group: Group, names: list[str], modules: list[str]) -> str:
        """Return the stage's or block's path; else the first module or parameter.

        A stem, bare parameters, and a model that is one layer as a whole have no such path.
        """
        if group.role != "stem" and modules and group.core:
            return group.stage or group.core
        return next((path for name in names for path in modules if is_under(name, path)), names[0])
