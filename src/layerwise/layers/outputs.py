"""The head of a network: its output layers, found by walking back from the output, and what is theirs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from layerwise.layers.calltree import is_itself_a_layer
from layerwise.layers.graph import Call, Op, Recording
from layerwise.layers.order import Order
from layerwise.layers.owners import is_leaf, is_under, module_of, paths_above
from layerwise.layers.structures import tensors_in
from layerwise.layers.units import Unit

_MAIN_OUTPUTS = ("logits", "pred_boxes", "pred_masks")
_FEW = 4  # a layer that reads fewer than so many values per feature of the map before it reads a pooled map


def output_layers(recording: Recording, order: Order) -> tuple[str, ...]:
    """Return the module paths of the output layers, in order of execution; empty without a head.

    From each output tensor the operations are followed backwards, on every path up to the first product
    with a parameter. Those are the output layers, unless

    - an operation with other parameters comes first (a network that ends in a norm), or
    - one of them feeds another (a residual stream that ends the network): then that tensor has none.

    A layer that feeds another output's layer (features returned beside the logits) is left out. Of a
    ``transformers`` output only ``logits`` and detection outputs count, else its first tensor: the rest
    are by-products.
    """
    found: dict[int, tuple[str, ...]] = {}
    for tensor_key in _main_keys(recording):
        writer = recording.values[tensor_key].writer
        if writer is not None:
            found |= _last_products(recording, order, writer)
    feeding = _ancestors(recording, found)
    paths: dict[str, None] = {}
    for index in sorted(found):
        if index not in feeding:
            paths.setdefault(_applied_by(recording, order, recording.ops[index], found[index]))
    return tuple(paths)


def _main_keys(recording: Recording) -> list[int]:
    output = recording.output
    tensors = tensors_in(output)
    main = tensors
    if isinstance(output, Mapping) and type(output) not in (dict, OrderedDict):
        named = [output[name] for name in _MAIN_OUTPUTS if isinstance(output.get(name), torch.Tensor)]
        main = named or tensors[:1]
    chosen = {id(tensor) for tensor in main}
    return [key for tensor, key in zip(tensors, recording.output_keys, strict=True) if id(tensor) in chosen]


def _last_products(recording: Recording, order: Order, start: int) -> dict[int, tuple[str, ...]]:
    """Return the weighted products met first on the paths back from `start`, by operation."""
    found: dict[int, tuple[str, ...]] = {}
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        op = recording.ops[index]
        weights = order.weights(op)
        if weights:
            found[index] = weights
        elif _is_norm(op) and order.needed[index]:
            return {}
        else:
            waiting += [source for source in op.sources if recording.input_dependent[source]]
    return {} if _ancestors(recording, found) & found.keys() else found


def _is_norm(op: Op) -> bool:
    return "norm" in op.name


def _ancestors(recording: Recording, of: Mapping[int, Any]) -> set[int]:
    seen: set[int] = set()
    waiting = [source for index in of for source in recording.ops[index].sources]
    while waiting:
        index = waiting.pop()
        if index not in seen:
            seen.add(index)
            waiting += recording.ops[index].sources
    return seen


def _descendants(recording: Recording, of: Set[int]) -> set[int]:
    """Return the operations that are fed by one of `of`."""
    fed: set[int] = set()
    for op in recording.ops:
        if not fed.isdisjoint(op.sources) or not of.isdisjoint(op.sources):
            fed.add(op.index)
    return fed


def _applied_by(recording: Recording, order: Order, op: Op, weights: tuple[str, ...]) -> str:
    """Return the path of the module that applies the weight; the name of a bare parameter if none does.

    A tied weight is called after the module that uses it here, not after its first name. A module in which
    other layers run as well (CLIP's ``visual``, whose ``proj`` comes last) is no output layer.
    """
    call: Call | None = op.call
    names = [name for weight in weights for name in recording.names[weight]]
    while call is not None:
        for name in names:
            if call.path and module_of(name) == call.path and _is_one_layer(recording, order, call):
                return call.path
        call = call.parent
    largest = max(weights, key=lambda name: recording.model.get_parameter(name).ndim)
    owner = module_of(largest)
    if owner and is_leaf(recording.model.get_submodule(owner)):
        return owner
    return largest


def _is_one_layer(recording: Recording, order: Order, call: Call) -> bool:
    """Return whether all weights that are applied within a call are its module's own."""
    applied = {name for op in recording.ops[call.start : call.end] for name in order.weights(op)}
    return all(call.path in map(module_of, recording.names[name]) for name in applied)


def head_parameters(
    recording: Recording, order: Order, outputs: tuple[str, ...], units: list[Unit], is_block: list[bool]
) -> tuple[str, ...]:
    """Return the parameters of the head, in order of use: what a linear probe should train.

    These are the output layers' own parameters (a weight that is tied to an earlier layer is not one),
    and of what comes after the last block

    - the layers that stand after the last pooling, where a map or a sequence has become one vector, and
    - the layers that share a module of the user's own making with the output layer
      (``classifier.dense`` beside ``classifier.out_proj``).

    In a network of single layers, where each of them is a block, only the first of the two holds. What is
    needed later than all of these (a temperature of the logits), or reads what an output layer gave (the
    weights of several classifiers' votes), belongs to the head as well.

    Args:
        recording: of the model.
        order: of its parameters.
        outputs: the output layers' paths.
        units: in order.
        is_block: for each of them whether it is a block.
    """
    own = set(outputs)
    if recording.root.path in {module_of(name) for name in outputs} and is_itself_a_layer(recording, order):
        own |= set(recording.names)
    belonging = {
        name
        for unit in units
        for name in unit.parameters
        if any(alias in own or module_of(alias) in own for alias in recording.names[name])
    }
    borrowed = {name for name in belonging if is_borrowed(recording, order, name, outputs)}
    belonging -= borrowed
    last_block = max((n for n, unit in enumerate(units) if is_block[n] and unit.weights >= 2), default=-1)
    holding = [n for n, unit in enumerate(units) if not belonging.isdisjoint(unit.parameters)]
    while holding and last_block == holding[-1]:  # an output layer's own module is no block
        del holding[-1]
        last_block = max((n for n in range(last_block) if is_block[n] and units[n].weights >= 2), default=-1)
    before = {name for unit in units[: last_block + 1] for name in unit.parameters}
    after = [name for unit in units[last_block + 1 :] for name in unit.parameters if name in order.position]
    head = {name for name in after if name in belonging}
    if not head:
        return ()
    head |= belonging & order.position.keys()  # another tower's output layer may run before the last block
    if last_block >= 0:
        for output in outputs:
            container = _own_container(recording.model, output, before)
            head |= {name for name in after if container and is_under(name, container)}
    if borrowed and all(recording.model.get_parameter(name).ndim < 2 for name in head):
        return ()  # the bias of an output layer is none without its weight
    fed = _descendants(recording, {order.position[name] for name in head if name in order.position})
    head |= set(_after_pooling(recording, after, head))
    last = max(order.position.get(name, -1) for name in head)
    head |= {name for name in after if order.position.get(name, -1) >= last}
    known = [name for unit in units for name in unit.parameters if name in order.position]
    return tuple(name for name in known if name in head or order.position[name] in fed)


def is_borrowed(recording: Recording, order: Order, name: str, outputs: tuple[str, ...]) -> bool:
    """Return whether an output layer's parameter is an earlier layer's, where it is used first."""
    if name not in order.position:
        return False
    first = order.position[name]
    if len({module_of(alias) for alias in recording.names[name]}) < 2:  # F.linear(x, self.embedding.weight)
        last = max((op.index for op in recording.ops if name in order.weights(op)), default=first)
        own = [call for call in recording.calls if call.path and call.path == module_of(name)]
        return _in_any(own, first) and not _in_any(own, last)
    return not _in_any([call for call in recording.calls if call.path in outputs], first)


def _in_any(calls: Sequence[Call], index: int) -> bool:
    """Return whether the operation number `index` runs in one of `calls`."""
    return any(call.start <= index < call.end for call in calls)


def _own_container(model: nn.Module, output: str, earlier: set[str]) -> str:
    """Return the outermost module above `output` that starts after the last block and is no plain list."""
    container = ""
    for path in reversed(paths_above(output)[1:]):
        if any(is_under(name, path) for name in earlier):
            break
        if type(model.get_submodule(path)) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            container = path
    return container


def _after_pooling(recording: Recording, names: list[str], own: set[str]) -> list[str]:
    """Return the parameters among `names` whose layers see one position per sample, after a pooling.

    Walks back from the last layer while layers see one position. If the layer before those sees several
    and the first of them reads about as many values as that one has features, the map was pooled; if it
    reads many more, the map was flattened, and these layers still read positions (VGG's ``classifier.0``).
    """
    positions = {call.path: sizes for call in recording.calls if (sizes := _sizes(recording, call))}
    collapsed: list[str] = []
    first_reads = 0
    for name in reversed(names):
        sizes = positions.get(module_of(name))
        if sizes is None:
            if name in own:
                collapsed.append(name)
                continue
            return []
        seen, reads, _ = sizes
        if seen > 1:
            break
        collapsed.append(name)
        first_reads = reads
    before = _features_before(recording, collapsed[-1] if collapsed else "", positions)
    return collapsed if before and first_reads < _FEW * before else []


def _features_before(recording: Recording, name: str, positions: dict[str, tuple[int, int, int]]) -> int:
    """Return how many features the last layer has that sees several positions and runs before `name`."""
    features = 0
    for call in recording.calls:
        if name and call.path == module_of(name):
            return features
        sizes = positions.get(call.path)
        if sizes and sizes[0] > 1:
            features = sizes[2]
    return 0


def _sizes(recording: Recording, call: Call) -> tuple[int, int, int] | None:
    """Return (positions per sample, values read per position, features made) of a leaf's call."""
    weights = list(call.module.parameters())
    if not weights or not is_leaf(call.module):
        return None
    received = tensors_in(call.arguments)
    returned = tensors_in(call.output)
    if not received or not returned:
        return None
    largest, made = max(weights, key=lambda weight: weight.ndim), returned[0]
    is_factor = largest.ndim < 2 and largest.numel() == 1  # one number for all features
    features = (made.shape[1] if made.ndim > 1 else 1) if is_factor else largest.shape[0]
    positions = made.numel() // max(recording.batch_size * int(features), 1)
    if positions < 1:
        return None
    return positions, received[0].numel() // max(recording.batch_size * positions, 1), int(features)
