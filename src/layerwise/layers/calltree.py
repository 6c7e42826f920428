"""`CallTree`: the tree of module calls, as a layer map sees it: what is alike, what is kept whole.

The tree is opened from the root downwards. A module is *opened* (its children are looked
at one by one) or kept whole, and then it is a *unit*: a residual block, an Inception module, an encoder
layer, or a single convolution of the stem. What decides is what the module computes, not its name:

1. A leaf is a unit.
2. A kind of module that occurs inside itself (a tree of trees, a level of a recursive U-net) is opened if
   it is a sequence, wraps one module, or holds a stack (see 4) or several modules with several layers.
3. A kind that occurs several times is a *block* if, somewhere, it keeps the shape of its input and a
   value of that shape passes by one of its weighted children on the way to the output, by each of its
   stacks (see 4) if it has any: a residual connection. Blocks are units wherever they occur, also where a
   stage's first one has no shortcut.
4. Any other kind that occurs several times is opened if, somewhere, it holds a *stack*, several
   siblings of one kind with two or more weighted layers each, one of which reads another: a ResNet stage, a
   dense block, a cross-stage-partial stage. Branches and experts are none, nor are wrappers of what differs
   (``Residual(Attention)``, ``Residual(MLP)``).
5. A kind that occurs once is kept whole if its path differs only in numbers from a block's (the one
   ``DepthwiseSeparable`` at ``blocks.0.0`` among inverted residuals), or for a list from another list's
   that is kept whole (a first layer that has no norm). Else it is opened if it holds a stack, or is a plain
   chain (no value passes by one of its children), or has two or more children with several weighted layers
   each.

The *kind* of a module is its class; of a plain ``nn.Sequential`` also the classes of its children. A list in
a list counts as a module (``for attention, mlp in self.layers``).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
import re
import weakref
from collections.abc import Hashable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from layerwise.layers.graph import Call, Recording
from layerwise.layers.order import Order
from layerwise.layers.owners import module_of
from layerwise.layers.structures import tensors_in

_CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.Sequential  # their elements are called one by one


class CallTree:
    """What the tree of calls tells about each module, worked out once per recording."""

    def __init__(self, recording: Recording, order: Order) -> None:
        self._recording = recording
        self._order = order
        self._modules = dict(recording.model.named_modules())
        self._applied = [self._applied_layer(order.weights(op)) for op in recording.ops]
        self._parametric: dict[nn.Module, bool] = {}
        self._children: dict[Call, list[Call]] = {}
        self._called = {call.module for call in recording.calls}
        self._kinds: dict[nn.Module, Hashable] = {}
        self._weights: dict[Call, int] = {}
        self._calls = list(self._walk(recording.root))
        composite = {call.module: self.kind(call.module) for call in self._calls if self.children(call)}
        self._instances = collections.Counter(composite.values())
        self._nested = self._kinds_inside_themselves()
        self._stacks = self._stacks_by_call()
        self._stacked_kinds = {self.kind(call.module) for call in self._stacks}
        self._blocks = {
            self.kind(call.module)
            for call in self._calls
            if call.module in composite
            and self._instances[composite[call.module]] > 1
            and self._is_residual(call)
        } - self._nested
        self._block_paths = {
            _numberless(call.path)
            for call in self._calls
            if "." in call.path and self.kind(call.module) in self._blocks and self.weights(call) >= 2
        }

        self._list_paths = {
            _numberless(call.path)
            for call in self._calls
            if _is_list(call.module)
            and self._instances[self.kind(call.module)] > 1
            and len(self.children(call)) > 1
            and self.kind(call.module) not in self._stacked_kinds | self._nested
        }

    def _walk(self, call: Call) -> Iterator[Call]:
        yield call
        for child in self.children(call):
            yield from self._walk(child)

    def opens(self, call: Call) -> bool:
        """Whether the module of `call` is looked into, by the rules at the top of this file."""
        children = self.children(call)
        if not children:
            return call.parent is None and not is_itself_a_layer(self._recording, self._order)
        if call.parent is None:
            return True
        kind = self.kind(call.module)
        stacked = call in self._stacks
        several = sum(self.weights(child) >= 2 for child in children) >= 2
        if kind in self._nested:
            return stacked or several or len(children) == 1 or _is_sequence(call.module)
        if kind in self._blocks:
            return False
        if self._instances[kind] > 1:
            wraps_one = _is_sequence(call.module) and len(children) == 1
            return kind in self._stacked_kinds or wraps_one
        if _is_list(call.module) and not stacked and _numberless(call.path) in self._list_paths:
            return False
        if _is_sequence(call.module) or stacked:
            return True
        if _numberless(call.path) in self._block_paths:
            return False
        if self._is_residual(call):
            return False
        return several or not self._passes_by(call, children, any_shape=True)

    def children(self, call: Call) -> list[Call]:
        """Return the calls directly inside that have parameters and run at least one operation.

        Calls inside a module that was itself not called are put together again: of ``layer.forward(x)``, and
        of lists in a list (``for attention, mlp in self.layers``).
        """
        if call not in self._children:
            self._children[call] = self._regrouped(
                call, [c for c in call.children if c.end > c.start and self._is_layer(c.module)]
            )
        return self._children[call]

    def _regrouped(self, call: Call, children: list[Call]) -> list[Call]:
        regrouped: list[Call] = []
        for child in children:
            path = self._skipped_module(call, child)
            last = regrouped[-1] if regrouped else None
            if path is None:
                regrouped.append(child)
            elif last is not None and last.path == path:
                last.children.append(child)
                last.end = child.end
                last.output, last.output_keys, last.output_ops = (
                    child.output,
                    child.output_keys,
                    child.output_ops,
                )
            else:
                module = self._modules[path]
                regrouped.append(
                    dataclasses.replace(
                        child, path=path, module=module, made_in=weakref.ref(call), children=[child]
                    )
                )
        return regrouped

    def _skipped_module(self, call: Call, child: Call) -> str | None:
        """Return the outermost module between a call and a call inside it that was never called itself."""
        prefix = f"{call.path}." if call.path else ""
        if not child.path.startswith(prefix):
            return None
        parts = child.path[len(prefix) :].split(".")
        for depth in range(1, len(parts)):
            path = prefix + ".".join(parts[:depth])
            module = self._modules.get(path)
            if module is None or module in self._called:
                continue
            in_a_list = isinstance(self._modules.get(path.rpartition(".")[0]), nn.ModuleList)
            if in_a_list or not isinstance(module, _CONTAINERS):
                return path
        return None

    def kind(self, module: nn.Module) -> Hashable:
        """Return what makes two modules alike."""
        if module not in self._kinds:
            inside = tuple(type(child) for child in module.children()) if _is_sequence(module) else ()
            self._kinds[module] = (type(module), inside)
        return self._kinds[module]

    def weights(self, call: Call) -> int:
        """Return the number of weighted layers in a call: distinct first weights of its products.

        A recurrent module has one for each of its layers and directions, and two at the least: whether its
        weights enter one product or several depends on the kernel.
        """
        if call not in self._weights:
            layers = {layer for layer in self._applied[call.start : call.end] if layer is not None}
            self._weights[call] = sum(
                1 if isinstance(layer, str) else _recurrences(layer) for layer in layers
            )
        return self._weights[call]

    def _applied_layer(self, weights: tuple[str, ...]) -> str | nn.RNNBase | None:
        """Return what a product with `weights` counts for: its first weight, or a recurrent module."""
        owner = self._modules.get(module_of(weights[0])) if weights else None
        return owner if isinstance(owner, nn.RNNBase) else next(iter(weights), None)

    def _is_layer(self, module: nn.Module) -> bool:
        """Whether a module has parameters, and is none that only makes another's weight."""
        if module not in self._parametric:
            is_part = isinstance(module, parametrize.ParametrizationList)
            self._parametric[module] = not is_part and next(module.parameters(), None) is not None
        return self._parametric[module]

    def _kinds_inside_themselves(self) -> set[Hashable]:
        nested: set[Hashable] = set()
        to_visit: list[tuple[Call, tuple[Hashable, ...]]] = [(self._recording.root, ())]
        while to_visit:
            call, above = to_visit.pop()
            kind = self.kind(call.module)
            if kind in above:
                nested.add(kind)
            to_visit += [(child, (*above, kind)) for child in self.children(call)]
        return nested

    def _stacks_by_call(self) -> dict[Call, list[list[Call]]]:
        """Return the calls that hold, at any depth, siblings of one kind with several layers each.

        A stack is several children, or one in which there is a stack.
        """
        found: dict[Call, list[list[Call]]] = {}
        for call in reversed(self._calls):  # children come before their parent
            families: dict[Hashable, list[Call]] = collections.defaultdict(list)
            for child in self.children(call):
                if self.weights(child) >= 2:
                    family = re.sub(r"\d+$", "#", child.path)
                    families[family, self.kind(child.module)].append(child)
            stacks = [
                calls for calls in families.values() if self._are_alike(calls) and self._is_in_series(calls)
            ]
            stacks += [[child] for child in self.children(call) if child in found]
            if stacks:
                found[call] = stacks
        return found

    def _are_alike(self, calls: list[Call]) -> bool:
        """Whether calls of one kind are of several modules, and not each of them wraps something else."""
        wrapped = {call.module: self._wrapped(call) for call in calls}
        return len(wrapped) >= 2 and (None in wrapped.values() or len(set(wrapped.values())) < len(wrapped))

    def _is_in_series(self, calls: list[Call]) -> bool:
        """Whether something in one of the calls depends on another: branches and experts do not."""
        calls = sorted(calls, key=lambda call: call.start)
        starts = [call.start for call in calls]
        made_by: dict[int, set[nn.Module]] = {}  # operation -> those of the modules that it depends on
        for op in self._recording.ops[starts[0] : calls[-1].end]:
            behind = {module for source in op.sources for module in made_by.get(source, ())}
            around = calls[bisect.bisect_right(starts, op.index) - 1]
            if op.index < around.end:
                if behind - {around.module}:
                    return True
                behind = {around.module}
            if behind:
                made_by[op.index] = behind
        return False

    def _wrapped(self, call: Call) -> type[nn.Module] | None:
        """Return the class of what a call wraps, where one child has all its weighted layers, and so on."""
        found = None
        while len(inside := [child for child in self.children(call) if self.weights(child)]) == 1:
            call = inside[0]
            found = type(call.module)
        return found

    def _is_residual(self, call: Call) -> bool:
        """Whether the call keeps the shape of its input and a value of that shape passes by a layer.

        Where it holds stacks it must pass by each of them: to pass by a side branch is no shortcut.
        """
        received = [tuple(tensor.shape) for tensor in _main_input(call)]
        returned = [tuple(tensor.shape) for tensor in tensors_in(call.output)]
        parts = self._stacks.get(call) or [[c for c in self.children(call) if self.weights(c)]]
        return (
            bool(received)
            and received == returned[: len(received)]
            and all(self._passes_by(call, part, any_shape=False) for part in parts)
        )

    def _passes_by(self, call: Call, children: list[Call], *, any_shape: bool) -> bool:
        """Whether some operation reads a value that was made before one of the call's `children` ran.

        The children are intervals of operations, one after the other, so an edge from operation `s` to
        operation `i` passes by those with ``s < start`` and ``end <= i``. Without `any_shape` only values
        count that have as many elements as the call's output. Values from outside count if they are the
        call's main input (masks and memories do not).
        """
        recording = self._recording
        starts = [child.start for child in children]
        ends = [child.end for child in children]
        main = set(_main_keys(call))
        main_ops = {op for key, op in zip(call.input_keys, call.input_ops, strict=True) if key in main}
        sizes = {tensor.numel() for tensor in tensors_in(call.output)}
        depends = recording.input_dependent
        for op in recording.ops[call.start : call.end]:
            last = bisect.bisect_right(ends, op.index) - 1
            if last < 0:
                continue
            for key, source in zip(op.reads, op.read_ops, strict=True):
                outside = source is None or source < call.start
                if outside and not (key in main and source in main_ops):
                    continue
                if source is not None and not depends[source]:
                    continue
                if not any_shape and math.prod(recording.values[key].shape) not in sizes:
                    continue
                first = 0 if outside or source is None else bisect.bisect_right(starts, source)
                if first <= last:
                    return True
        return False


def is_itself_a_layer(recording: Recording, order: Order) -> bool:
    """Return whether the model is one layer: it is torch's, or applies one weight, and holds no modules."""
    weights = {name for op in recording.ops for name in order.weights(op)[:1]}
    of_torch = type(recording.model).__module__.startswith("torch.nn.")
    return not recording.root.children and (of_torch or len(weights) < 2)


def _recurrences(module: nn.RNNBase) -> int:
    return max(2, module.num_layers * (1 + module.bidirectional))


def _numberless(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and (
        type(module).forward in (nn.Sequential.forward, nn.Module.forward)
    )


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and _is_sequence(module)


def _main_input(call: Call) -> list[torch.Tensor]:
    """Return the tensors of the first argument that holds any."""
    args, kwargs = call.arguments
    return next((found for value in (*args, *kwargs.values()) if (found := tensors_in(value))), [])


def _main_keys(call: Call) -> tuple[int, ...]:
    return call.input_keys[: len(_main_input(call))]
