"""Find operations whose last bits depend on where in a batch a sample stands.

A processor computes a function such as ``silu`` or ``gelu`` for 16 or 32 numbers at a time, and for what is
left over at the end by another routine, whose result may differ in the last bit. Which sample meets the
left-over routine depends on its place and on the size of the batch. Few numbers of few samples differ then,
so comparing the values of one batch does not find it; asking each operation does.

How: a number for which the two routines differ is looked for. If there is one, the operation is run on
tensors of the real shape filled with it. Where all samples get the same bits, no place is special.

A product of small matrices may round a row by where it lies in memory. Of a few rows of few numbers all may
be equal by luck. So such a product is run on one sample, drawn at random, in all places. So are sums and
softmaxes, of any size: over another dimension than the last they take columns together, samples side by side,
and where one thread ends and the next begins a sample is taken apart, as by ``glu``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from layerwise.cache.replay.kernels import autocast_state, backend_state
from layerwise.cache.replay.layout import find_layout
from layerwise.errors import CacheError
from layerwise.layers.operators import facts_of, run_inside

_PACKING = frozenset({"_nested_tensor_from_mask", "_nested_from_padded", "_pack_padded_sequence"})
_MAY_PACK = "_nested_tensor_from_mask_left_aligned"  # where it says no, another batch may be packed
_OF_TORCH = frozenset({"aten", "prim", "prims", "quantized", "mkldnn", "mkl", "profiler"})
_TRIED = 256  # numbers for which both routines are compared: 4 % of them differ for silu, 18 % for gelu
_COUNTED = 50  # integers are drawn below it
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "_cdist_forward"})
_BY_SAMPLE = frozenset({"sum", "mean", "logsumexp", "_softmax", "_log_softmax", "_safe_softmax", "glu"})
_SMALL = 4096  # numbers that a product gives for a batch: of more, the values themselves tell
_COMPARED = 256  # numbers of a product that are compared
_SAMPLES, _DRAWN = 128, 2**20  # of a sum so many samples, unless their batches hold more numbers than these
_TELLING = 4  # of those that differ, how many are used
OTHER_ORDER = "another order of operations"
_FOUND: dict[tuple[Any, ...], list[list[Any]]] = {}  # `_telling_numbers` of torch's operations


@dataclass(frozen=True, slots=True)
class Outline:
    """Shape, strides and type of a tensor.

    No meta tensor: what C++ allocates between large activations, and keeps, leaves holes in the heap.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Outline:
        """Return that of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def tensor(self) -> torch.Tensor:
        """Return a meta tensor of this outline."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class OpRun:
    """One run of an operation that works number by number, of a product of matrices, or of sums.

    Attributes:
        function: the operation.
        arguments: ``(args, kwargs)`` with an `Outline` for each tensor.
        output: its result.
        device: on which it ran.
    """

    function: Any
    arguments: Any
    output: Outline
    device: torch.device

    @property
    def is_by_sample(self) -> bool:
        """Whether it does not work number by number, and is tried on whole samples."""
        return facts_of(self.function).name in _PRODUCTS | _BY_SAMPLE

    @property
    def outlines(self) -> list[Outline]:
        """Of the tensors that it gets."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Outline)]


class OpLog(TorchDispatchMode):
    """Within: notes each operation that makes floating-point numbers one by one, by a product or by a sum.

    Attributes:
        runs: in order.
        packing: the first operation that lays samples of several lengths end to end, or would those of
            another batch; ``""`` if none does.
        foreign: the first operation of a library other than torch; ``""`` if there is none.
        enters_autocast: an operation ran within an autocast that what runs entered by itself.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.runs: list[OpRun] = []
        self.packing = self.foreign = ""
        self.enters_autocast, self._around = False, 0

    def __enter__(self) -> Self:
        """Begin."""
        self._around = _autocasts()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_inside(func, self, args, kwargs)
        output = func(*args, **kwargs)
        name = facts_of(func).name
        self.enters_autocast = self.enters_autocast or _autocasts() > self._around
        if name in _PACKING or (name == _MAY_PACK and not output):
            self.packing = self.packing or name
        if func.namespace not in _OF_TORCH:
            self.foreign = self.foreign or func._schema.name
        if (torch.Tag.pointwise in func.tags or name in _PRODUCTS | _BY_SAMPLE) and isinstance(
            output, torch.Tensor
        ):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            if tensors and (output.is_floating_point() or output.is_complex()):
                arguments = tree_map_only(torch.Tensor, Outline.of, (args, kwargs))
                self.runs.append(OpRun(func, arguments, Outline.of(output), output.device))
        return output


def _autocasts() -> int:
    """Return how many autocasts are entered; within a mode torch does not tell whether they are enabled."""
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def uneven_places(
    full: Sequence[OpRun], batch: int, part: Sequence[OpRun], part_batch: int
) -> tuple[str, str]:
    """Return the operations that treat some places of a batch differently.

    Args:
        full: what ran for a whole batch.
        batch: its number of samples.
        part: what ran for some samples.
        part_batch: their number.

    Returns:
        The first operation whose bits depend on a sample's place in a batch of `batch` samples, and the
        first that gives other bits, or depends on the place, with `part_batch` samples; ``""`` for none.
    """
    if [run.function for run in full] != [run.function for run in part]:  # in pieces of so many samples, say
        return next((str(run.function) for run in full if _is_uneven(run)), ""), OTHER_ORDER
    pairs = {
        f"{one.function} {one.arguments} {other.arguments}": (one, other) for one, other in zip(full, part)
    }
    within = between = ""
    for one, other in pairs.values():
        name = str(one.function)
        results: Iterable[tuple[torch.Tensor, torch.Tensor]] = (
            _of_one_sample(one, batch, other, part_batch)
            if one.is_by_sample
            else ((_filled(one, numbers), _filled(other, numbers)) for numbers in _telling_numbers(one))
        )
        for rows, part_rows in results:
            try:
                layout = find_layout(
                    one.output.tensor(), batch, other.output.tensor(), part_batch, where=name
                )
            except CacheError:  # not made of samples: no number may differ from another
                rows, part_rows = rows.flatten(), part_rows.flatten()
            else:
                if layout is None:
                    continue  # does not depend on the batch
                rows, part_rows = layout.to_rows(rows), layout.to_rows(part_rows)
            if not torch.equal(rows, rows[:1].expand_as(rows)):
                within = within or name
            if not torch.equal(part_rows, rows[:1].expand_as(part_rows)):
                between = between or name
    return within, between


def _is_uneven(run: OpRun) -> bool:
    """Return whether an operation rounds a number otherwise at some place."""
    if run.is_by_sample:
        return False
    results = (_filled(run, numbers).flatten() for numbers in _telling_numbers(run))
    return any(not torch.equal(result, result[:1].expand_as(result)) for result in results)


def _of_one_sample(
    one: OpRun, batch: int, other: OpRun, part_batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what it gives for batches of one sample, drawn anew each time, in all places.

    Nothing for large products.
    """
    size, read = (sum(torch.Size(o.shape).numel() for o in some) for some in ([one.output], one.outlines))
    is_product = facts_of(one.function).name in _PRODUCTS
    if size == 0 or (is_product and size > _SMALL):
        return
    more = _COMPARED * batch // size if is_product else min(_SAMPLES, _DRAWN // max(read, 1))
    outlines = list(zip(one.outlines, other.outlines))
    try:
        layouts = [find_layout(a.tensor(), batch, b.tensor(), part_batch, where="") for a, b in outlines]
    except CacheError:  # not made of samples
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(1 + more):
        given: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for pair, layout in zip(outlines, layouts):
            drawn = torch.randn(pair[0].shape, generator=generator).to(one.device, pair[0].dtype)
            for outline, tensors in zip(pair, given):
                made = torch.empty_strided(
                    outline.shape, outline.strides, dtype=outline.dtype, device=one.device
                )
                tensors.append(made)
                if layout is None:
                    _fill(made, drawn)
                else:
                    _fill(layout.to_rows(made), layout.to_rows(drawn)[:1])
        yield _run(one, given[0]), _run(other, given[1])


def _fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` into a tensor, one number where one stands for several."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def _drawn(dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        return torch.randn(_TRIED, generator=generator, dtype=wide).to(dtype)
    return torch.randint(0, _COUNTED, (_TRIED,), generator=generator).to(dtype)


def _telling_numbers(run: OpRun) -> list[list[Any]]:
    """Return inputs (one number a tensor) that the two routines of an operation answer differently.

    For torch's own operations they are looked for once in a process under the same settings of torch.
    """
    shaped = tuple(bool(tensor.shape) for tensor in run.outlines)
    if not any(shaped):
        return []  # one number alone has no places
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    if modes or run.function.namespace not in _OF_TORCH:
        return _look_for_numbers(run)
    settings = (repr(backend_state(run.device)), autocast_state(run.device))
    key = (run.function, _scalars(run), shaped, run.device, settings)
    if key not in _FOUND:
        _FOUND[key] = _look_for_numbers(run)
    return _FOUND[key]


def _look_for_numbers(run: OpRun) -> list[list[Any]]:
    tensors = run.outlines
    generator = torch.Generator().manual_seed(0)
    drawn = [_drawn(tensor.dtype, generator).to(run.device) for tensor in tensors]

    def at(i: int, count: int) -> torch.Tensor:  # cloned, as the operation may work in place
        picked = [number[i : i + count] if t.shape else number[0] for number, t in zip(drawn, tensors)]
        return _run(run, [number.clone() for number in picked])

    many = at(0, _TRIED)
    found = []
    for i in range(_TRIED):
        one = at(i, 1)
        if not torch.equal(many[i : i + 1], one):
            if bool(one.isnan().any()):
                continue  # outside of what the operation is defined for
            found.append([number[i if t.shape else 0].item() for number, t in zip(drawn, tensors)])
        if len(found) == _TELLING:
            break
    return found


def _filled(run: OpRun, numbers: Sequence[Any]) -> torch.Tensor:
    """Return what the operation gives for tensors of the real shapes, each filled with one number."""
    inputs = []
    for outline, number in zip(run.outlines, numbers, strict=True):
        size = 1 + sum((count - 1) * stride for count, stride in zip(outline.shape, outline.strides))
        size = size if torch.Size(outline.shape).numel() else 0
        storage = torch.full((size,), number, dtype=outline.dtype, device=run.device)
        inputs.append(storage.as_strided(outline.shape, outline.strides))
    return _run(run, inputs)


def _run(run: OpRun, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    source = iter(inputs)
    args, kwargs = tree_map_only(Outline, lambda _: next(source), run.arguments)
    output: torch.Tensor = run.function(*args, **kwargs)
    return output


def _scalars(run: OpRun) -> str:
    """Return the types of the tensors and all other arguments, as text."""
    return str(tree_map_only(Outline, lambda outline: outline.dtype, run.arguments))
