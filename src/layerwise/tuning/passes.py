"""Go through data again and again in the same way: same samples, same order, same random draws."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, named_kind
from layerwise.layers.randomness import RandomState, random_state, restore_random_state
from layerwise.layers.recording import described, one_line
from layerwise.tuning.processes import distributed

Forward = Callable[[nn.Module, Any], Any]


class Enough(BaseException):
    """Ends a forward pass early; not an Exception, so that no ``except Exception`` of a model eats it."""


@contextmanager
def before_forward(module: nn.Module, look: Callable[[Tensor], object]) -> Iterator[None]:
    """Call ``look(input)`` before each forward pass of `module`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Passes:
    """The data of a calibration or an audit, gone through again and again in the same way."""

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], samples: int | None, forward: Forward
    ) -> None:
        self.model = model
        self.loader = loader
        self.samples = samples
        self.forward = forward
        self.passes = 0
        self.seen = 0
        self._generators = generators_of(loader)
        self._state: tuple[Any, ...] = ()

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Note the state of all random generators, and put it back on leaving."""
        self._state = self._read()
        try:
            yield
        finally:
            self._write()

    def begin_pass(self, *, counted: bool = True) -> None:
        """Go back to the noted random state: a shuffling loader then gives the same order again."""
        self._write()
        self.passes += counted
        self.seen = 0

    def forward_all(self) -> None:
        """Run the model over the data; `Enough` ends the pass of one batch."""
        for batch in self.batches():
            self._forward(batch)

    def forward_first(self) -> bool:
        """Run the model over the first batch only; return whether there is no second one."""
        batches = self.batches()
        self._forward(next(batches))
        return next(batches, None) is None

    def samples_seen(self) -> int:
        """Return the number of samples of a pass, over all processes."""
        if not distributed():
            return self.seen
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.seen)
        return sum(parts)

    def run(self, batch: Any) -> Any:
        """Return what the model makes of a batch.

        Raises:
            DataError: its forward fails on it, and not for want of memory.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return self.forward(self.model, batch)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            if should_reduce_batch_size(error):
                raise
            raise DataError(
                f"the forward of {type(self.model).__name__} fails on a batch of {described(batch)}: "
                f"{one_line(error)}. Expected batches as it takes them in training: samples first, then "
                "channels for torch's convolutions and norms. Give such a loader, or pass "
                "forward=lambda model, batch: ... that feeds yours."
            ) from error

    def _forward(self, batch: Any) -> None:
        try:
            self.run(batch)
        except Enough:
            return

    def batches(self) -> Iterator[Any]:
        """Yield the batches on the model's device, the last one cut to the number of samples."""
        from accelerate.utils import send_to_device, slice_tensors

        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        empty = True
        for batch in self.loader:
            empty = False
            size = _size_of(batch)
            left = size if self.samples is None else min(size, self.samples - self.seen)
            if left < size:
                batch = slice_tensors(batch, slice(0, left))
            self.seen += left
            yield send_to_device(batch, device)
            if self.samples is not None and self.seen >= self.samples:
                return
        if empty:
            raise DataError(
                "the loader gives no batch; expected one at least. Give it more samples: an empty data set "
                "gives none, nor do fewer than batch_size with drop_last."
            )

    def _read(self) -> tuple[RandomState, list[torch.Tensor]]:
        return random_state(), [generator.get_state() for generator in self._generators]

    def _write(self) -> None:
        drawn, loaders = self._state
        restore_random_state(drawn)
        for generator, state in zip(self._generators, loaders, strict=True):
            generator.set_state(state)


def _size_of(batch: Any) -> int:
    from accelerate.utils import find_batch_size

    try:
        return find_batch_size(batch) or 0
    except (TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"a batch is {named_kind(batch)} ({reprlib.repr(batch)}), and no batch size can be read from it; "
            "expected a tensor with the samples in its first dimension, a tuple that begins with one, or a "
            "mapping of them. Let the loader give tensors: a DataLoader makes them of numbers and arrays, a "
            "tokenizer of texts."
        ) from error


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators that a data loader and its samplers draw from."""
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[2], "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


def feed(model: nn.Module, batch: Any) -> Any:
    """Run `model` on the input part of `batch`; what is no input (labels) is left out.

    A mapping gives keyword arguments (those that ``forward`` takes, labels never), a tuple or list its
    first item, which may again be a mapping, or a tuple of positional arguments; a tensor is the input.
    """
    if isinstance(batch, tuple | list):
        batch = batch[0]
        if isinstance(batch, tuple | list):
            return model(*batch)
    if not isinstance(batch, Mapping):
        return model(batch)
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return model(
        **{
            name: value
            for name, value in batch.items()
            if name not in ("label", "labels") and (anything or name in parameters)
        }
    )
