"""Read a `torch.utils.data.DataLoader` sample by sample, in the order and with the random draws of its own.

A cached epoch must visit the samples in the very order in which the plain loop would, and leave the
random number generators where the plain loop would leave them, or dropout in the trained part would differ.
So the loader's own batch sampler is iterated, at the same times, and the seed that its iterator draws for
its workers is drawn too.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from layerwise.errors import CacheError
from layerwise.layers.snapshot import Snapshot
from layerwise.layers.structures import tensors_in

_PROBES = 4  # samples drawn twice to find random augmentation


class LoaderReader:
    """Gives a loader's batches of indices, and loads any of its samples.

    Args:
        loader: with a map-style dataset whose samples have the indices 0 to ``len(dataset) - 1``.

    Attributes:
        loader: as given.
        size: number of samples in the dataset.
        batch_size: of a full batch; None where the batch sampler does not say.

    Raises:
        CacheError: samples cannot be told apart by an index; says why.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        reason = _unreadable(loader)
        if reason:
            raise CacheError(reason)
        self.size = len(loader.dataset)  # type: ignore[arg-type]
        self.batch_size: int | None = getattr(loader.batch_sampler, "batch_size", None)
        self._seeded = False

    @property
    def keeps_order(self) -> bool:
        """Whether the loader is known to make the same batches in every epoch."""
        given: Any = self.loader.batch_sampler
        samplers = [given, getattr(given, "sampler", None)]
        return any(isinstance(s, SequentialSampler) or getattr(s, "shuffle", None) is False for s in samplers)

    def epoch(self, *, ahead: bool = True) -> Iterator[list[int]]:
        """Yield the indices of one epoch's batches, as the loader's own iterator would draw them.

        Args:
            ahead: ask the sampler as early as the loader's workers would, who fetch ahead. False where
                workers do iterate over this.

        Raises:
            CacheError: the batch sampler gives something else than indices into the dataset.
        """
        batches = iter(self.loader.batch_sampler)  # type: ignore[arg-type]
        persistent = self.loader.persistent_workers and self.loader.num_workers > 0
        if not (persistent and self._seeded):
            torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
            self._seeded = True
        queue: deque[list[int]] = deque()
        depth = self.loader.num_workers * (self.loader.prefetch_factor or 0) if ahead else 0
        exhausted = False
        while True:
            while not exhausted and len(queue) < max(depth, 1):
                try:
                    queue.append(self._indices(next(batches)))
                except StopIteration:
                    exhausted = True
            if not queue:
                return
            indices = queue.popleft()
            if depth and not exhausted:  # a worker that hands a batch over is given the next task
                try:
                    queue.append(self._indices(next(batches)))
                except StopIteration:
                    exhausted = True
            yield indices

    def _indices(self, batch: Any) -> list[int]:
        indices = list(batch)
        if all(type(index) is int and 0 <= index < self.size for index in indices):
            return indices
        with contextlib.suppress(TypeError, ValueError):
            numbers = [int(index) for index in indices]
            if numbers == indices and all(0 <= number < self.size for number in numbers):
                return numbers
        raise CacheError(
            f"the batch sampler {type(self.loader.batch_sampler).__name__} gives {indices[:3]!r}..., and not "
            f"indices from 0 to {self.size - 1}: samples cannot be recognised from one epoch to the next."
        )

    def load(self, batches: Iterator[list[int]]) -> Iterator[Any]:
        """Yield the collated batches of the given indices, by the loader's own workers.

        Draws nothing from the global random numbers in this process, unless the dataset does.
        """
        inner: DataLoader[Any] = DataLoader(
            self.loader.dataset,
            batch_sampler=_Fed(batches),
            num_workers=self.loader.num_workers,
            collate_fn=self.loader.collate_fn,
            pin_memory=self.loader.pin_memory,
            timeout=self.loader.timeout,
            worker_init_fn=self.loader.worker_init_fn,
            multiprocessing_context=self.loader.multiprocessing_context,
            generator=torch.Generator(),
            prefetch_factor=self.loader.prefetch_factor,
        )
        return iter(inner)

    def load_now(self, indices: Sequence[int]) -> Any:
        """Return one collated batch, loaded in this process."""
        dataset = self.loader.dataset
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(list(indices))
        else:
            samples = [dataset[index] for index in indices]
        return self.loader.collate_fn(samples)

    @contextlib.contextmanager
    def unaffected(self) -> Iterator[Snapshot]:
        """Within: random numbers that are drawn, the dataset's own generators' included, are undone after."""
        kept = Snapshot([self.loader.dataset, self.loader.collate_fn], generators_only=True)
        try:
            with kept_random_state():
                yield kept
        finally:
            kept.restore()

    def probes(self, count: int = _PROBES) -> list[int]:
        """Return the indices of a few samples, spread evenly."""
        count = min(count, self.size)
        return sorted({round(i * (self.size - 1) / max(count - 1, 1)) for i in range(count)})

    def load_probes(self) -> list[Any]:
        """Return a few samples, each collated alone, as they may differ in shape; loaded in this process."""
        return [self.load_now([index]) for index in self.probes()]

    def randomness(self) -> tuple[str, list[Any]]:
        """Draw a few samples twice under different seeds; return what differs, or ``""``, and the samples.

        A dataset that draws random numbers without using them counts as random too: skipping it would
        shift every later draw. All random states are put back.
        """
        with self.unaffected() as own:
            reseed(0)
            before = _random_states(), own.states()
            first = self.load_probes()
            if (_random_states(), own.states()) != before:
                return "loading a sample draws random numbers (a random augmentation)", first
            reseed(1)
            with _next_epoch(self.loader.dataset):
                second = self.load_probes()
        one, other = tensors_in(first), tensors_in(second)
        if len(one) != len(other) or not all(
            a.shape == b.shape and same_bits(a, b) for a, b in zip(one, other)
        ):
            return "the same sample is different each time it is loaded (a random augmentation)", first
        return "", first


@contextlib.contextmanager
def _next_epoch(dataset: Any) -> Iterator[None]:
    """Within: a dataset whose augmentation is a function of its `epoch` is in another one."""
    epoch = getattr(dataset, "epoch", None)
    if type(epoch) is not int:
        yield
        return
    dataset.epoch = epoch + 1
    try:
        yield
    finally:
        dataset.epoch = epoch


class _Fed:
    """A batch sampler that hands through what it is fed, one epoch long."""

    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def _unreadable(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return f"the loader is a {type(loader).__name__}, not a torch.utils.data.DataLoader"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"the loader class {type(loader).__name__} iterates in its own way"
    if isinstance(loader.dataset, IterableDataset):
        return "the dataset is an IterableDataset: its samples have no index to be recognised by"
    if not hasattr(loader.dataset, "__len__"):
        return f"the dataset {type(loader.dataset).__name__} has no length"
    if loader.batch_sampler is None:
        return "the loader does not batch (batch_size=None)"
    if len(loader.dataset) < 2:
        return "the dataset has fewer than two samples"
    return ""


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape are equal, NaN at the same places included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(one[~nan], other[~nan])


def reseed(seed: int) -> None:
    """Seed Python, numpy (if loaded) and torch; use within `kept_random_state`."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    torch.manual_seed(seed)


def drawn_outside_torch() -> tuple[Any, ...]:
    """Return the states of Python's and numpy's global generators, to be compared."""
    numpy = sys.modules.get("numpy")
    legacy = numpy.random.get_state(legacy=True) if numpy is not None else None
    return random.getstate(), (legacy[1].tolist(), legacy[2]) if legacy is not None else None


def _random_states() -> tuple[Any, ...]:
    return *drawn_outside_torch(), torch.get_rng_state().tolist()


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Within: whatever is drawn from Python's, numpy's and torch's global generators is undone after."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    legacy = numpy.random.get_state() if numpy is not None else None
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    device = torch.cuda.get_rng_state_all() if cuda else []
    cpu = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        if legacy is not None:
            sys.modules["numpy"].random.set_state(legacy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(device)
