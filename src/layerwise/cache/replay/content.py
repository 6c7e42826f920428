"""`Content`, `Samples`: what a ghost stands for, and what the loop has made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import _disable_current_modes

from layerwise.cache.comparing import same_bits


class Content:
    """What is known of what a ghost stands for.

    Attributes:
        whole: of a view that was made during a replay: what it is a part of.
        was_written: an operation of a replay wrote into it, so nobody knows what it stands for.
    """

    was_written = False

    def __init__(self, whole: Content | None = None) -> None:
        self.whole = whole

    def spoil(self) -> None:
        """Note that it, and what it is a view of, was written to without data."""
        content: Content | None = self
        while content is not None:
            content.was_written, content = True, content.whole


class Samples(Content):
    """What a ghost of samples and its aliases have in common.

    Attributes:
        tag: see `Handed`.
        load: returns the tensor that they stand for; None where it cannot be had.
        loaded: what `load` returned; None before it was needed.
        memory: the loaded tensor, once the loop has got hold of memory that it may write to.
    """

    loaded: torch.Tensor | None = None

    def __init__(
        self,
        tag: Any = None,
        load: Callable[[], torch.Tensor] | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.tag, self.load, self.memory = tag, load, memory

    @property
    def is_readable(self) -> bool:
        """Whether the value can be had."""
        return not self.was_written and (self.load is not None or self.memory is not None)

    @property
    def is_changed(self) -> bool:
        """Whether it is not what was loaded; bits are compared, since numpy's writes leave no version."""
        if self.was_written or self.memory is None:
            return self.was_written
        return self.loaded is None or not same_bits(self.memory, self.loaded)

    @_disable_dynamo  # a compiled function that reads a ghost would trace the loading
    def original(self) -> torch.Tensor:
        """Return what was loaded, whatever was written since; to be read only."""
        if self.loaded is None:
            assert self.load is not None
            with torch.inference_mode(False), _disable_current_modes():  # torch.export makes all fake
                self.loaded = self.load()
        return self.loaded

    def read(self) -> torch.Tensor:
        """Return what it is now; to be read only."""
        return self.original() if self.memory is None else self.memory

    def writable(self) -> torch.Tensor:
        """Return the memory that the loop may write to."""
        if self.memory is None:
            with torch.inference_mode(False), _disable_current_modes():
                self.memory = self.original().clone()
        return self.memory
