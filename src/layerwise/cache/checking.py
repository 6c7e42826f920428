"""Prove on one batch that a cut is exact: samples do not touch each other, nothing is secretly random."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from layerwise.cache.cut import Cut, Site
from layerwise.cache.layout import Layout, find_layout
from layerwise.cache.reading import same_bits
from layerwise.errors import CacheError
from layerwise.layers.snapshot import plain_tensors
from layerwise.layers.structures import tensors_in

logger = logging.getLogger("layerwise.cache")

_NEAR = 1e-3  # relative difference up to which two results are the same but for rounding
_TINY = 1e-30  # below it numbers have few bits left
_CHECKPOINT = "torch.utils.checkpoint"
_TELLING = 256  # numbers of each value to compare: two routines round only some of them differently


class PlaceError(CacheError):
    """A sample's last bits depend on its place in the batch: in another order the plain loop differs too."""


class MixedError(CacheError):
    """The value at a site depends on several samples of the batch."""

    def __init__(self, message: str, site: Site) -> None:
        super().__init__(message)
        self.site = site


Run = Callable[[list[int], int], Mapping[Site, torch.Tensor]]
"""Runs the prefix on some samples of the batch (by position), under a seed; returns values by site."""


class ContentGuard(contextlib.AbstractContextManager["ContentGuard"]):
    """Within: what a forward pass writes into buffers, and tensors that are plain attributes, is undone."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> ContentGuard:
        """Save the tensors."""
        tensors = [*self._model.buffers(), *plain_tensors(self._model)]
        tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_quantized]
        self._saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back those that were written to."""
        for tensor, content in self._saved:
            if not torch.equal(tensor, content):  # batch-norm's kernel does not bump `_version`
                tensor.data.copy_(content)  # nor may this: an earlier pass may still need its backward
        self._saved = []


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Within: what is made is no inference tensor, which could not be used in training later."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def find_layouts(
    sites: Iterable[Site],
    full: Mapping[Site, torch.Tensor],
    batch: int,
    part: Mapping[Site, torch.Tensor],
    part_batch: int,
    chosen: list[int],
) -> dict[Site, Layout]:
    """Return how each site's value is made of samples, from two batch sizes.

    Args:
        sites: where.
        full: values of a whole batch.
        batch: its number of samples.
        part: values of some samples.
        part_batch: their number.
        chosen: positions in the batch of the first of them.

    Raises:
        MixedError: a value does not grow with the batch although it depends on the input, or is not made
            of samples side by side.
    """
    layouts = {}
    for site in sites:
        if site not in full:
            continue
        if site not in part:
            raise CacheError(f"{site} runs at one batch size and not at another.")
        try:
            layout = find_layout(full[site], batch, part[site], part_batch, where=f"the value at {site}")
        except CacheError as error:
            raise MixedError(str(error), site) from error
        if layout is None:
            raise MixedError(
                f"the value at {site} depends on the input and has the shape {tuple(full[site].shape)} for "
                f"{batch} and for {part_batch} samples: it mixes the samples of a batch.",
                site,
            )
        apart = dataclasses.replace(layout, apart=True)
        if layout.per_sample > 1 and not _fits(layout, full[site], part[site], chosen):
            layout = apart if _fits(apart, full[site], part[site], chosen) else layout
        layouts[site] = layout
    return layouts


def _fits(layout: Layout, full: torch.Tensor, part: torch.Tensor, chosen: list[int]) -> bool:
    return is_near(layout.to_rows(full)[chosen], layout.to_rows(part)[: len(chosen)])


def size_sensitive(
    layouts: Mapping[Site, Layout],
    full: Mapping[Site, torch.Tensor],
    batch: int,
    part: Mapping[Site, torch.Tensor],
    chosen: list[int],
    run: Run,
    indices: Sequence[int],
) -> bool:
    """Return whether a sample's bits depend on how many samples are computed with it.

    Compares the values of a whole batch with those of some of its samples, which were computed on their
    own, in another order and under another seed. Equal bits prove that no sample reads another, that the
    place in the batch does not matter, and that nothing draws random numbers that the recording cannot
    see (numpy's, Python's). Where these samples have few numbers (a pooled vector of a last, small batch),
    equal bits can be luck: others of the batch are then computed in the same number. Differences that are
    only rounding are traced to the batch size: the whole batch, backwards and under yet another seed, must
    give the same bits.

    Args:
        layouts: of the sites to compare.
        full: values of the whole batch.
        batch: its number of samples.
        part: values of the samples `chosen`, computed on their own.
        chosen: positions in the batch.
        run: to compute more.
        indices: of the batch's samples in the data set: one that stands in it twice tells nothing new.

    Raises:
        PlaceError: their last bits depend on the place in the batch.
        MixedError: the values depend on the other samples.
        CacheError: they are random.
    """
    unequal = _unequal(layouts, full, chosen, part)
    compared, rest = list(chosen), [position for position in range(batch) if position not in chosen]
    size = len(chosen)
    while not unequal and len(rest) >= size and _few_numbers(layouts, full, _distinct(compared, indices)):
        chosen, rest = rest[:size], rest[size:]
        part = run(chosen, 1)
        unequal = _unequal(layouts, full, chosen, part)
        compared += chosen
    if not unequal:
        return False
    everything = list(range(batch))
    moved = _unequal(layouts, full, everything[::-1], run(everything[::-1], 3))
    again = run(everything, 2) if moved else full
    for site in moved:
        if not same_bits(full[site], again[site]):
            raise CacheError(
                f"the value at {site} differs when the same batch is computed again: the frozen part draws "
                f"random numbers that torch does not know of (numpy's or Python's)."
            )
    for site in unequal:
        layout = layouts[site]
        if not is_near(layout.to_rows(full[site])[chosen], layout.to_rows(part[site])):
            raise MixedError(
                f"the value at {site} of one sample depends on the other samples of its batch.", site
            )
    if moved:
        raise PlaceError(f"the value at {moved[0]}")
    return True


def _unequal(
    layouts: Mapping[Site, Layout],
    full: Mapping[Site, torch.Tensor],
    positions: list[int],
    part: Mapping[Site, torch.Tensor],
) -> list[Site]:
    """Return the sites at which samples of the batch have other bits than `part`, computed from them."""
    return [
        site
        for site, layout in layouts.items()
        if not same_bits(layout.to_rows(full[site])[positions], layout.to_rows(part[site]))
    ]


def _distinct(positions: list[int], indices: Sequence[int]) -> list[int]:
    return list({indices[position]: position for position in positions}.values())


def _few_numbers(
    layouts: Mapping[Site, Layout], full: Mapping[Site, torch.Tensor], positions: list[int]
) -> bool:
    """Return whether some site has too few numbers at these positions; zeros have no bits to differ in."""
    return any(
        full[site].is_floating_point()
        and int(layout.to_rows(full[site])[positions].count_nonzero()) < _TELLING
        for site, layout in layouts.items()
    )


def is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are the same but for rounding."""
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = float(one.abs().max()) if one.numel() else 0.0
    near = max(_NEAR, 8 * torch.finfo(one.dtype).eps)
    return float((one - other).abs().max()) <= near * scale + _TINY if one.numel() else True


def is_checkpointed() -> bool:
    """Return whether the caller runs inside a function that `torch.utils.checkpoint` will run again."""
    frame = sys._getframe().f_back
    while frame is not None and frame.f_globals.get("__name__") != _CHECKPOINT:
        frame = frame.f_back
    return frame is not None


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
        torch.autograd.grad(outputs, learning, [torch.zeros_like(t) for t in outputs], allow_unused=True)
    except CacheError as error:
        raise CacheError(
            "gradient checkpointing runs frozen and learning layers together again in the backward pass, and "
            "there nothing can be skipped. Checkpoint them apart."
        ) from error
    except RuntimeError as error:  # a reentrant one cannot be tried; its gradients start at its own inputs
        logger.debug("prefix cache: the backward pass was not tried: %s", error)


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


def difference(expected: list[torch.Tensor], output: Any) -> str:
    """Return what is not bit for bit equal in two outputs of a model; ``""`` if nothing is."""
    found = tensors_in(output)
    if len(found) != len(expected):
        return f"{len(expected)} tensors in its output, and {len(found)} in the plain one"
    for number, (one, other) in enumerate(zip(expected, found)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return (
                f"output {number} is {tuple(one.shape)} {one.dtype}, not {tuple(other.shape)} {other.dtype}"
            )
        if not same_bits(one, other.detach()):
            gap = float((one.double() - other.detach().double()).abs().max())
            return f"output {number} differs by up to {gap:.3g}"
    return ""


def sites_of(cuts: Iterable[Cut]) -> dict[Site, Cut]:
    """Return the frontier sites of several cuts, each with the first cut that has it."""
    found: dict[Site, Cut] = {}
    for cut in cuts:
        for site in cut.frontier:
            found.setdefault(site, cut)
    return found
