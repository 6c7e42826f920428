"""Compare what a replay gives with what the plain model does: outputs, and how gradients flow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from layerwise.cache.comparing import outline, same_bits
from layerwise.layers.structures import tensors_in

_CAST = "ToCopyBackward0"


@dataclass(frozen=True)
class Result:
    """What a replay gave.

    Attributes:
        tensors: in its output, detached.
        rest: what else is in it, as text.
        learning: ids of the parameters that its gradients reach.
        operations: how often each kind of backward operation is passed, casts left out: autocast may cast a
            weight that is used twice once or twice.
    """

    tensors: list[torch.Tensor]
    rest: list[str]
    learning: frozenset[int]
    operations: Counter[str]

    @classmethod
    def of(cls, output: Any) -> Result:
        """Return that of a model's output."""
        return cls([tensor.detach() for tensor in tensors_in(output)], _told(output), *_flow(output))

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
                gap = float((one.cpu().double() - other.detach().cpu().double()).abs().max())
                return f"output {number} differs by up to {gap:.3g}"
        learning, operations = _flow(output)
        if self.learning != learning:
            return f"gradients reach {len(self.learning)} parameters, and {len(learning)} in the plain one"
        names = dict.fromkeys([*(operations - self.operations), *(self.operations - operations)])
        return f"gradients take another way ({', '.join(names)})" if names else ""


def _flow(output: Any) -> tuple[frozenset[int], Counter[str]]:
    """Walk the backward graph of an output; return `Result.learning` and `Result.operations`."""
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
    return frozenset(learning), Counter(name for node in nodes if (name := node.name()) != _CAST)


def _told(output: Any) -> list[str]:
    """Return what an output is made of, as text; of what cannot be compared (a function) the class."""
    return list(outline(output, lambda tensor: "a tensor", lambda thing: type(thing).__name__))
