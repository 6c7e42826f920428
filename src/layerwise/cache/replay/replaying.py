"""`Replay`: one forward pass of a model's own forward, without its frozen prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.capturing import Skeleton
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.replay.handed import OnlyShapes
from layerwise.cache.replay.intercepting import Forward, Intercepted
from layerwise.errors import CacheError
from layerwise.layers.memory import collectors
from layerwise.layers.structures import map_tensors, tensors_in


class Replay(Intercepted):
    """Within: one forward pass of the model skips the frozen prefix and takes `values` at the sites.

    Args:
        cut: what to skip.
        values: for every site of the cut, frontier and constants.
        skeletons: of every skipped call, with their layouts filled in.
        batch: number of samples.
        device: of the ghosts.
        answered: called whenever a call is skipped, or takes a cached argument.

    Attributes:
        not_come: calls that were to be skipped, or to take a value, and did not come so far.
    """

    def __init__(
        self,
        cut: Cut,
        values: Mapping[Site, torch.Tensor],
        skeletons: Mapping[CallId, Skeleton],
        *,
        batch: int,
        device: torch.device,
        answered: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(cut.paths)
        self.not_come: set[CallId] = {*cut.skipped, *cut.entered}
        self._cut, self._values, self._skeletons = cut, values, skeletons
        self._batch, self._device, self._answered = batch, device, answered
        self._only_shapes = OnlyShapes()

    def __enter__(self) -> Self:
        """Begin."""
        super().__enter__()
        self._only_shapes.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the model as it was."""
        self._only_shapes.__exit__()
        super().__exit__()

    def answer(self, call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what stands for the output of a call that is skipped; make any other."""
        cut = self._cut
        if self._answered is not None and call in self.not_come:
            self._answered()
        self.not_come.discard(call)
        module = cut.skipped.get(call)
        if module is not None:
            for inside, count in cut.inside[call].items():
                self.counts[inside] += count  # calls that did not happen
            output = self._output(call, args, kwargs)
            for collect in collectors(module):
                collect(module, args, output)
            return output
        sites = cut.entries.get(call)
        if sites is not None:
            args, kwargs = _with_slots((args, kwargs), {site.slot: self._values[site] for site in sites})
        return original(*args, **kwargs)

    def _output(self, call: CallId, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        skeleton, passes = self._skeletons[call], self._cut.passes.get(call, {})
        given = tensors_in((args, kwargs)) if passes else []
        slots = iter(range(len(skeleton.layouts)))

        def leaf(_: torch.Tensor) -> torch.Tensor:
            slot = next(slots)
            value = self._values.get(Site(call, "out", slot))
            if value is not None:
                return value
            if slot in passes and passes[slot] < len(given):
                return given[passes[slot]]
            return skeleton.ghost(slot, self._batch, self._device)

        return map_tensors(skeleton.output, leaf)


def _with_slots(arguments: Any, replace: dict[int, torch.Tensor]) -> Any:
    """Return the arguments with some of their tensors, counted as `tensors_in` does, replaced."""
    number = -1

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal number
        number += 1
        return replace.get(number, tensor)

    return map_tensors(arguments, leaf)


def check_replayed(output: Any, not_come: set[CallId]) -> None:
    """Raise if a replayed pass went another way than the recorded one.

    Args:
        output: of the model; must not hold a ghost: something that was skipped was needed after all.
        not_come: calls that were to be skipped, or to take a value, and did not come.

    Raises:
        CacheError: so it did.
    """
    if not_come:
        path = min(not_come).path
        raise CacheError(
            f"the model took another way than on the first batch: {path!r} was not called, though no tensor "
            f"with floating-point numbers decides that. Use storage='off'."
        )
    found = next((tensor for tensor in tensors_in(output) if isinstance(tensor, Ghost)), None)
    if found is not None:
        raise CacheError(
            f"the model's output holds a tensor of shape {tuple(found.shape)} that was not computed: the "
            f"cut is wrong. Use storage='off' and report the model."
        )
