"""`LoaderReader`: a `torch.utils.data.DataLoader` read sample by sample, with the order and draws of its own.

A cached epoch must visit the samples in the very order in which the plain loop would, and leave the
random number generators where the plain loop would leave them, or dropout in the trained part would differ.
So the loader's own batch sampler is iterated, at the same times, and the seed that its iterator draws for
its workers is drawn too.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.data import DataLoader, IterableDataset

from layerwise.cache.changes.alike import draws_at_once
from layerwise.cache.changes.fingerprint import spread
from layerwise.cache.comparing import same_bits
from layerwise.cache.samples.batchshape import leaves_of
from layerwise.cache.samples.draws import BY_CHANCE, DRAWS, Draws, Noting, own_generators, says_it_drew
from layerwise.cache.samples.prepared import is_stand_in
from layerwise.errors import CacheError
from layerwise.layers.randomness import drawn, drawn_outside_torch, kept_random_state, seed_everything
from layerwise.layers.snapshot import Snapshot
from layerwise.layers.structures import tensors_in

_PROBES = 4  # samples drawn twice to find random augmentation


class Order:
    """The indices of one epoch's batches, drawn when the loader's own iterator would draw them.

    Workers fetch ahead, so the sampler is asked for several batches at the start.

    Args:
        loader: whose batch sampler.
        seeded: the iterator would not draw a seed for its workers: they live on from an epoch before.
    """

    def __init__(self, loader: DataLoader[Any], *, seeded: bool) -> None:
        self._batches = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._early = len(loader.batch_sampler) - 1 if draws_at_once(loader) else 0  # type: ignore[arg-type]
        if not seeded:
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            if loader.num_workers:  # torch's iterator asks once more when it starts them
                self._batches = iter(loader.batch_sampler)  # type: ignore[arg-type]
        self._queue: deque[list[int]] = deque()
        self._ahead = loader.num_workers * (loader.prefetch_factor or 0)
        for _ in range(self._ahead):
            self._draw()

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> list[int]:
        if not self._queue:
            self._draw()
        if not self._queue:
            raise StopIteration
        indices = self._queue.popleft()
        if self._ahead:  # a worker that hands a batch over is given the next task
            self._draw()
        return indices

    def ahead(self, count: int) -> list[list[int]]:
        """Return the next batches, `count` or fewer: as many as a sampler gives early and draws nothing for.

        The last is not among them: with it, a sampler may draw what an epoch's end draws.
        """
        return list(islice(self, min(count, max(self._early, 0))))

    def hand_over(self) -> Order:
        """Leave fetching ahead to workers that iterate over this from now on."""
        self._ahead = 0
        return self

    def _draw(self) -> None:
        for batch in self._batches:
            indices = list(batch)
            with contextlib.suppress(TypeError, ValueError):  # a sampler may give tensors or numpy's integers
                numbers = [int(index) for index in indices]
                indices = numbers if numbers == indices else indices
            self._queue.append(indices)
            self._early -= 1
            return


class LoaderReader:
    """Gives a loader's batches of indices, and loads any of its samples.

    Args:
        loader: with a map-style dataset whose samples have the indices 0 to ``len(dataset) - 1``.

    Attributes:
        loader: as given, or another one of the same samples.
        size: number of samples in the dataset.
        has_drawn: while a batch was loaded, random numbers were drawn.
        digest: names the content of the dataset; ``""`` until somebody needs it, and where it was changed.

    Raises:
        CacheError: samples cannot be told apart by an index; says why.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        reason = _unreadable(loader)
        if reason:
            raise CacheError(reason)
        self.size = len(loader.dataset)  # type: ignore[arg-type]
        self.has_drawn = False
        self.digest = ""
        self._seeded: WeakSet[DataLoader[Any]] = WeakSet()
        self._times_loaded = 0
        self._own = Snapshot([])  # the dataset's own generators

    @property
    def batch_size(self) -> int | None:
        """Of a full batch; None where the batch sampler does not say."""
        return getattr(self.loader.batch_sampler, "batch_size", None)

    def order(self) -> Order:
        """Return the batches of indices of one epoch, as the loader's own iterator would draw them."""
        loader = self.loader
        seeded = loader.persistent_workers and (loader in self._seeded or loader._iterator is not None)
        self._seeded.add(loader)
        self._own = own_generators(loader.dataset, loader.collate_fn)
        return Order(loader, seeded=seeded)

    def plain(self) -> Iterator[Any]:
        """Return the loader's own iterator; it draws no seed for workers that would live by now."""
        loader = self.loader
        if not (loader.persistent_workers and loader in self._seeded and loader._iterator is None):
            return iter(loader)
        kept, loader.generator = loader.generator, torch.Generator()
        try:
            return iter(loader)
        finally:
            loader.generator = kept

    def check(self, indices: Sequence[Any]) -> None:
        """Raise CacheError if the batch sampler gave something else than indices into the dataset."""
        if not all(type(index) is int and 0 <= index < self.size for index in indices):
            raise CacheError(
                f"the batch sampler {type(self.loader.batch_sampler).__name__} gives {list(indices)[:3]!r}"
                f"..., and not indices from 0 to {self.size - 1}: samples cannot be recognised from one "
                f"epoch to the next."
            )

    def load(self, batches: Iterator[list[int]]) -> Iterator[Any]:
        """Yield the collated batches of the given indices, by the loader's own workers.

        Draws nothing from the global random numbers in this process, unless the dataset does. What workers
        draw differs from call to call, and depends on the seed that torch was given.
        """
        if not self.loader.num_workers and not self.loader.pin_memory:
            return map(self.load_now, batches)
        noting = Noting(self.loader)
        self._times_loaded += 1
        seed = (torch.initial_seed() + self._times_loaded) % 2**63
        inner: DataLoader[Any] = DataLoader(
            self.loader.dataset,
            batch_sampler=batches,
            num_workers=self.loader.num_workers,
            collate_fn=noting,
            pin_memory=self.loader.pin_memory,
            timeout=self.loader.timeout,
            worker_init_fn=noting.prepare,
            multiprocessing_context=self.loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed),
            prefetch_factor=self.loader.prefetch_factor,
        )
        return map(self._noted, iter(inner))

    def _noted(self, made: tuple[Any, bool]) -> Any:
        batch, has_drawn = made
        self.has_drawn |= has_drawn
        return batch

    def load_now(self, indices: Sequence[int]) -> Any:
        """Return one collated batch, loaded in this process; also within a transform of torch.func."""
        if peek_interpreter_stack() is not None:
            with temporarily_clear_interpreter_stack():
                return self.load_now(indices)
        dataset, before = self.loader.dataset, (drawn(), self._own.states())
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(list(indices))
        else:
            samples = [dataset[index] for index in indices]
        batch = self.loader.collate_fn(samples)
        self.has_drawn |= (drawn(), self._own.states()) != before or says_it_drew(dataset)
        return batch

    def leaves(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return the tensors of one batch, loaded in this process; nothing that is drawn for it counts."""
        with self.unaffected():
            return tensors_in(self.load_now(indices))

    def draws(self, indices: Sequence[int]) -> bool:
        """Load a batch once more; return whether that draws, whatever another thread draws meanwhile."""
        before, watch = (drawn_outside_torch(), self._own.states()), Draws()  # type: ignore[no-untyped-call]
        with watch:
            self.load_now(indices)
        has_drawn = watch.seen or (drawn_outside_torch(), self._own.states()) != before
        return has_drawn or says_it_drew(self.loader.dataset)

    @contextlib.contextmanager
    def unaffected(self) -> Iterator[None]:
        """Within: random numbers that are drawn, the dataset's own generators' included, are undone after."""
        kept = self._own = own_generators(self.loader.dataset, self.loader.collate_fn)
        has_drawn = self.has_drawn
        try:
            with kept_random_state():
                yield
        finally:
            kept.restore()
            self.has_drawn = has_drawn

    def probes(self, count: int = _PROBES) -> list[int]:
        """Return the indices of a few samples, spread evenly."""
        return spread(count, self.size)

    def load_probes(self) -> list[Any]:
        """Return a few samples, each collated alone, as they may differ in shape; loaded in this process.

        Raises:
            CacheError: they hold what is not stored (`leaves_of`).
        """
        samples = [self.load_now([index]) for index in self.probes()]
        leaves_of(samples)
        return samples

    def randomness(self) -> tuple[str, list[Any]]:
        """Draw a few samples twice under different seeds; return what differs, or ``""``, and the samples.

        A dataset that draws random numbers without using them counts as random too: skipping it would
        shift every later draw. All random states are put back.
        """
        with self.unaffected():
            seed_everything(0)
            first = self.load_probes()
            if self.has_drawn:
                return DRAWS, first
            seed_everything(1)
            with _next_epoch(self.loader.dataset):
                second = self.load_probes()
        if not _are_same(first, second):
            return f"the same sample is different each time it is loaded {BY_CHANCE}", first
        return "", first

    def differ_in_workers(self, samples: list[Any]) -> bool:
        """Return whether ``worker_init_fn`` makes other samples of the probes than `samples`, loaded here."""
        if not (self.loader.num_workers and self.loader.worker_init_fn):
            return False
        with self.unaffected():
            return not _are_same(samples, list(self.load(iter([[index] for index in self.probes()]))))


def _are_same(one: Any, other: Any) -> bool:
    """Return whether the tensors of two structures have the same bits."""
    one, other = tensors_in(one), tensors_in(other)
    return len(one) == len(other) and all(map(same_bits, one, other))


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


def _unreadable(loader: Any) -> str:
    if is_stand_in(loader):
        return (
            "the loader is what PrefixCache.as_loader gives, and its batches are already those of a cache. "
            "Put two models that get the same batches into one module, and cache that"
        )
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
