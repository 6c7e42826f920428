"""Compare what a replay gives with what the plain model does: outputs, and how gradients flow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.outlines import outline
from layerwise.cache.comparing import same_bits
from layerwise.layers.structures import tensors_in

_CAST = "ToCopyBackward0"


@dataclass(frozen=True)
class Flow:
    """How gradients flow back from a model's output.

    Attributes:
        learning: ids of the parameters that they reach.
        operations: how often each kind of backward operation is passed, casts left out: autocast may cast a
            weight that is used twice once or twice.
    """

    learning: frozenset[int]
    operations: Counter[str]

    @classmethod
    def of(cls, output: Any) -> Flow:
        """Walk the backward graph of an output."""
        tensors = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        learning = {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}
        nodes = dict.fromkeys(tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)
        waiting = list(nodes)
        while waiting:
            behind = dict.fromkeys(node for node, _ in waiting.pop().next_functions if node is not None)
            found = [node for node in behind if node not in nodes]
            nodes |= dict.fromkeys(found)
            waiting += found
        variables = (getattr(node, "variable", None) for node in nodes)
        learning |= {id(variable) for variable in variables if isinstance(variable, nn.Parameter)}
        return cls(frozenset(learning), Counter(name for node in nodes if (name := node.name()) != _CAST))

    def difference(self, output: Any) -> str:
        """Return what is not the same in another output of the model; ``""`` if nothing is."""
        other = Flow.of(output)
        if self.learning != other.learning:
            return (
                f"gradients reach {len(self.learning)} parameters, and {len(other.learning)} in the plain one"
            )
        gone, extra = other.operations - self.operations, self.operations - other.operations
        names = ", ".join(dict.fromkeys([*gone, *extra]))
        return f"gradients take another way ({names})" if names else ""


@dataclass(frozen=True)
class Result:
    """What a replay gave.

    Attributes:
        tensors: in its output, detached.
        rest: what else is in it, as text.
        flow: of its gradients.
    """

    tensors: list[torch.Tensor]
    rest: list[str]
    flow: Flow

    @classmethod
    def of(cls, output: Any) -> Result:
        """Return that of a model's output."""
        tensors = [tensor.detach() for tensor in tensors_in(output)]
        return cls(tensors, _told(output), Flow.of(output))

    def difference(self, output: Any) -> str:
        """Return what is not the same, bit for bit, in the plain model's output; ``""`` if nothing is."""
        found = tensors_in(output)
        if len(found) != len(self.tensors):
            return f"{len(self.tensors)} tensors in its output, and {len(found)} in the plain one"
        for mine, plain in zip_longest(self.rest, _told(output), fillvalue="nothing more"):
            if mine != plain:
                return f"its output holds {mine}, and the plain one {plain}"
        for number, (one, other) in enumerate(zip(self.tensors, found)):
            if one.shape != other.shape or one.dtype != other.dtype:
                return (
                    f"output {number} is {tuple(one.shape)} {one.dtype}, not {tuple(other.shape)} "
                    f"{other.dtype}"
                )
            if not same_bits(one, other.detach()):
                gap = float((one.double() - other.detach().double()).abs().max())
                return f"output {number} differs by up to {gap:.3g}"
        return self.flow.difference(output)


def _told(output: Any) -> list[str]:
    """Return what an output is made of, as text; of what cannot be compared (a function) the class."""
    return list(outline(output, lambda tensor: "a tensor", lambda thing: type(thing).__name__))
