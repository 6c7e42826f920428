"""Passes of the cache's own, of which nothing is left in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from layerwise.layers.forms import dense, is_plain
from layerwise.layers.isolation import Before, buffers_in, untouched
from layerwise.layers.snapshot import plain_tensors


class BeforePass(Before):
    """A model as it is now, with what is in its buffers, and in tensors that are attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = list(model.modules())
        tensors = [*buffers_in(modules), *plain_tensors(modules)]
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back(self) -> None:
        """Put everything back."""
        for tensor, content in self._saved:
            _put_back(tensor, content)
        super().put_back()


def traceless(model: nn.Module, before: BeforePass | None = None) -> contextlib.AbstractContextManager[None]:
    """Return a block within which a forward pass leaves the model, and the random numbers, as they were.

    More than `untouched`: what it writes into buffers, and into tensors that are attributes, is undone.

    Args:
        model: whose.
        before: the model as it is now, if that is known.
    """
    return untouched(model, BeforePass(model) if before is None else before)


def _put_back(tensor: torch.Tensor, content: torch.Tensor) -> None:
    """Write `content` into a tensor that holds something else; an earlier pass may still need its backward.

    The version does not tell whether it does: batch-norm's kernel does not count.
    """
    if is_plain(tensor):
        if not torch.equal(tensor, content):
            tensor.data.copy_(content)  # `data` has a version of its own
    elif not all(map(torch.equal, dense(tensor), dense(content))):
        with torch.no_grad(), _unsafe_preserve_version_counter(tensor):
            tensor.copy_(content)


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Within: what is made is no inference tensor, which could not be used in training later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within: a pass of the cache's own amid the loop; hooks of the loop's own see nothing of it."""
    with normal_tensors(), saved_tensors_hooks(_without_history, lambda tensor: tensor):
        yield


def _without_history(tensor: torch.Tensor) -> torch.Tensor:
    """Save a tensor for backward, in place of hooks of the loop's own, such as a checkpoint's.

    An operation that saves its own output as it is would keep itself alive for ever.
    """
    with _disable_current_modes():  # no recording sees it
        return tensor.detach()
