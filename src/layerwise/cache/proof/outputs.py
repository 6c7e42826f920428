"""Compare what a replay gives with what the plain model does: outputs, and how gradients flow."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.outlines import outline
from layerwise.cache.comparing import same_bits
from layerwise.cache.replay.ghost import Ghost
from layerwise.errors import CacheError
from layerwise.layers.structures import tensors_in

logger = logging.getLogger("layerwise.cache")

_CHECKPOINT = "torch.utils.checkpoint"
_TOGETHER = (
    "gradient checkpointing runs frozen and learning layers together again in the backward pass, and there "
    "nothing can be skipped. Checkpoint them apart."
)


def is_checkpointed() -> bool:
    """Return whether the caller runs inside a function that `torch.utils.checkpoint` will run again.

    Raises:
        CacheError: it is a reentrant one, and what it gets learns.
    """
    frame, found = sys._getframe().f_back, False
    while frame is not None:
        if frame.f_globals.get("__name__") == _CHECKPOINT:
            found = True
            if any(getattr(frame.f_locals.get("ctx"), "needs_input_grad", ())):
                raise CacheError(_TOGETHER)
        frame = frame.f_back
    return found


def check_backward(output: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Try the backward pass of a replay in which a checkpoint was around something that was skipped.

    What a checkpoint runs again in the backward pass runs outside of the replay, so that nothing is skipped
    then. That is no harm, unless learning layers in the same checkpoint need it.

    Raises:
        CacheError: they do.
    """
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        found = torch.autograd.grad(
            outputs, learning, list(map(torch.zeros_like, outputs)), allow_unused=True
        )
    except CacheError as error:
        raise CacheError(_TOGETHER) from error
    except RuntimeError as error:  # with a reentrant one, in which nothing was skipped, it cannot be tried
        logger.debug("prefix cache: the backward pass was not tried: %s", error)
    else:
        if any(isinstance(gradient, Ghost) for gradient in found):  # the last layer itself does not run again
            raise CacheError(_TOGETHER)


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
