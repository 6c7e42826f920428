"""Run a model's own forward with part of its module calls watched, stopped early, or answered from a cache.

For the time of one forward pass, some modules carry an instance attribute ``_call_impl``, which
``nn.Module.__call__`` looks up. It sees a call as hooks see it (arguments before the module's own hooks,
output after them), yet is no hook: modules that take another path when hooks are attached, such as
``nn.TransformerEncoderLayer``, do not notice. State-dict keys, classes and the module tree stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerwise.cache.cutting.cut import CallId, Cut, Site
from layerwise.cache.replay.ghost import Ghost, ghost, only_shapes
from layerwise.cache.replay.layout import Layout, copied, find_layout, memory_order
from layerwise.errors import CacheError
from layerwise.layers.memory import collectors
from layerwise.layers.structures import map_tensors, tensors_in

Forward = Callable[..., Any]
_Handler = Callable[[CallId, Forward, tuple[Any, ...], dict[str, Any]], Any]


class _Stop(BaseException):
    """Ends a forward pass of which nothing more is needed; no model catches it by ``except Exception``."""


@contextlib.contextmanager
def _intercepted(modules: Mapping[nn.Module, str], handler: _Handler) -> Iterator[dict[nn.Module, int]]:
    """Send every call of `modules` (module -> path) through `handler`; yields the count of calls."""
    counts: dict[nn.Module, int] = dict.fromkeys(modules, 0)

    def intercept(module: nn.Module, path: str, original: Forward, *args: Any, **kwargs: Any) -> Any:
        nth = counts[module]
        counts[module] = nth + 1
        return handler(CallId(path, nth), original, args, kwargs)

    before = {module: module.__dict__.get("_call_impl") for module in modules}
    try:
        for module, path in modules.items():
            module.__dict__["_call_impl"] = functools.partial(intercept, module, path, module._call_impl)
        yield counts
    finally:
        for module, attribute in before.items():
            if attribute is None:
                module.__dict__.pop("_call_impl", None)
            else:
                module.__dict__["_call_impl"] = attribute


@dataclass
class Skeleton:
    """What a skipped call returned, without the data.

    Attributes:
        output: the structure, with a meta tensor in place of each tensor.
        batch: number of samples when it was taken.
        layouts: for each tensor, how it depends on the batch size; None where it does not.
    """

    output: Any
    batch: int
    layouts: list[Layout | None] = field(default_factory=list)
    _ghosts: dict[Any, Ghost] = field(default_factory=dict)

    def ghost(self, slot: int, batch: int, device: torch.device) -> Ghost:
        """Return what stands for a tensor of the output: the same in each step, as nothing is in it."""
        made = self._ghosts.get((slot, batch, device))
        if made is None or made.was_written:
            layout, meta = self.layouts[slot], tensors_in(self.output)[slot]
            shape = tuple(meta.shape) if layout is None else layout.shape(tuple(meta.shape), batch)
            order = memory_order(meta) if layout is None else layout.order
            made = self._ghosts[slot, batch, device] = ghost(shape, meta.dtype, device, order=order)
        return made


@dataclass
class Captured:
    """What one recording pass saw.

    Attributes:
        values: at each site.
        skeletons: of each skipped call.
        not_come: calls that lead to the values and did not come: the model took another way.
    """

    values: dict[Site, torch.Tensor]
    skeletons: dict[CallId, Skeleton]
    not_come: set[CallId] = field(default_factory=set)


def capture(
    model: nn.Module,
    cuts: Iterable[Cut],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    batch: int,
    skeletons: bool = True,
) -> Captured:
    """Run the model until the values at all sites of all `cuts` are there.

    Args:
        model: the model, in the modes in which it trains.
        cuts: of one phase, or of several: one pass serves them all.
        args: positional arguments of its forward.
        kwargs: keyword arguments.
        batch: number of samples in them.
        skeletons: also note what each skipped call returns (needed once for each shape of input).

    Returns:
        Copies of the values, detached; sites that this pass did not reach are missing.
    """
    cuts = list(cuts)
    wanted: dict[CallId, set[Site]] = {}
    modules: dict[nn.Module, str] = {}
    waiting: set[Any] = set()
    for cut in cuts:
        for site in (*cut.frontier, *cut.constants):
            wanted.setdefault(site.call, set()).add(site)
            waiting.add(site)
        modules |= cut.paths
        if skeletons:
            waiting |= set(cut.skipped)
    shaped = {call for cut in cuts for call in cut.skipped} if skeletons else set()
    found = Captured({}, {}, {call for cut in cuts for call in cut.leading})

    def take(call: CallId, side: str, tensors: list[torch.Tensor]) -> None:
        for site in wanted.get(call, ()):
            if site.side == side and site.slot < len(tensors):
                found.values[site] = copied(tensors[site.slot])
                waiting.discard(site)
        if not waiting:
            raise _Stop

    def watch(call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.not_come.discard(call)
        if call in wanted:
            take(call, "in", tensors_in((args, kwargs)))
        output = original(*args, **kwargs)
        if call in shaped:
            found.skeletons[call] = Skeleton(map_tensors(output, _without_data), batch)
            waiting.discard(call)
        if call in wanted or call in shaped:
            take(call, "out", tensors_in(output))
        return output

    with _intercepted(modules, watch), contextlib.suppress(_Stop):
        model(*args, **kwargs)
    return found


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def compare_skeletons(one: Mapping[CallId, Skeleton], other: Mapping[CallId, Skeleton]) -> None:
    """Fill in the layouts of `one` from what the same calls returned at another batch size.

    Raises:
        CacheError: an output is not made of samples side by side, or holds a number that depends on the
            batch size.
    """
    for call, skeleton in one.items():
        twin = other.get(call)
        if twin is None:
            raise CacheError(f"{call.path} runs at one batch size and not at another.")
        where = f"the output of {call.path}"
        pairs = list(zip(tensors_in(skeleton.output), tensors_in(twin.output)))
        if len(tensors_in(twin.output)) != len(tensors_in(skeleton.output)):
            raise CacheError(f"{where} has a different structure at another batch size.")
        if not _same_constants(skeleton.output, twin.output):
            raise CacheError(
                f"{where} holds a number that depends on the batch size, or what cannot be compared."
            )
        skeleton.layouts = [find_layout(a, skeleton.batch, b, twin.batch, where=where) for a, b in pairs]


def _same_constants(one: Any, other: Any) -> bool:
    """Whether two structures are equal, their tensors left aside."""
    blank = [map_tensors(structure, lambda tensor: None) for structure in (one, other)]
    try:
        return bool(blank[0] == blank[1])
    except (RuntimeError, ValueError, TypeError):  # objects without a usable equality
        return False


@contextlib.contextmanager
def replaying(
    cut: Cut,
    values: Mapping[Site, torch.Tensor],
    skeletons: Mapping[CallId, Skeleton],
    *,
    batch: int,
    device: torch.device,
    answered: Callable[[], None] | None = None,
) -> Iterator[set[CallId]]:
    """Within: one forward pass of the model skips the frozen prefix and takes `values` at the sites.

    Yields the calls that were to be skipped, or to take a value, and did not come so far.

    Args:
        cut: what to skip.
        values: for every site of the cut, frontier and constants.
        skeletons: of every skipped call, with their layouts filled in.
        batch: number of samples.
        device: of the ghosts.
        answered: called whenever a call is skipped, or takes a cached argument.
    """
    expected = {*cut.skipped, *cut.entered}
    entries: dict[CallId, list[Site]] = {}
    for site in cut.frontier:
        if site.side == "in":
            entries.setdefault(site.call, []).append(site)

    def answer(call: CallId, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if answered is not None and call in expected:
            answered()
        expected.discard(call)
        if call in cut.skipped:
            for module, count in cut.inside[call].items():
                counts[module] += count  # calls that did not happen
            output = emit(call, args, kwargs)
            for collect in collectors(cut.skipped[call]):
                collect(cut.skipped[call], args, output)
            return output
        if call in entries:
            replace = {site.slot: values[site] for site in entries[call]}
            args, kwargs = _with_slots((args, kwargs), replace)
        return original(*args, **kwargs)

    def emit(call: CallId, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        skeleton = skeletons[call]
        passes = cut.passes.get(call, {})
        given = tensors_in((args, kwargs)) if passes else []
        slots = iter(range(len(skeleton.layouts)))

        def leaf(_: torch.Tensor) -> torch.Tensor:
            slot = next(slots)
            value = values.get(Site(call, "out", slot))
            if value is not None:
                return value
            if slot in passes and passes[slot] < len(given):
                return given[passes[slot]]
            return skeleton.ghost(slot, batch, device)

        return map_tensors(skeleton.output, leaf)

    with _intercepted(cut.paths, answer) as counts, only_shapes():
        yield expected


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
