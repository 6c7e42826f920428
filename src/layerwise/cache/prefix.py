"""`PrefixCache`: compute the frozen part of a model once, then train from what it gave."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.calls import Calls
from layerwise.cache.cutting.book import CutBook, Phases
from layerwise.cache.dealing import Dealer, Epoch
from layerwise.cache.filling import Filled, Filling, total
from layerwise.cache.frozen import FrozenPart
from layerwise.cache.live import AtHand
from layerwise.cache.observing import Observer
from layerwise.cache.samples.feed import Feed, Phase
from layerwise.cache.samples.prepared import inner, is_prepared, iterated, stand_in
from layerwise.cache.samples.reading import Order
from layerwise.cache.samples.supply import Raised, Supply, open_supply
from layerwise.cache.stock import CachePool, Stock
from layerwise.cache.store.decision import Decision, Storage
from layerwise.cache.telling import described, last_phase, told
from layerwise.cache.traceless import traceless
from layerwise.errors import CacheError, warn
from layerwise.layers.isolation import unwrap
from layerwise.layers.randomness import kept_random_state

if TYPE_CHECKING:
    from layerwise.tuning.tuner import Tuner

_CHANGES = 2  # times that a dataset may change before it is no use to store anything of it


class PrefixCache:
    """Runs the frozen prefix of a model once for each sample, and replays it in later epochs.

    Everything before the first parameter that learns computes the same thing every epoch. The cache
    watches the first batch, records the model's forward, finds the module calls that can be skipped, and
    stores what they hand on. In later epochs the model's own ``forward`` runs with these calls answered
    from the store; the rest of the model is the real thing, hooks, dropout and batch-norm included.

    Exact: what is handed out leads to the same weights, bit for bit on a CPU, as the plain loop. Before a
    cut is used, one batch is computed both ways and compared bit for bit. What cannot be cut, or is not
    equal, is not cached: `batches` then is the loader, and `describe` says why.

    The cache notices by itself that other parameters learn, that modules changed between train and eval
    mode, or that the frozen weights were changed; it then looks for a new cut, and refuses stale values.
    Frozen modules must be in eval mode to be skipped (a dropout is random, a batch-norm in train mode
    depends on the batch): `layerwise.Tuner` sees to it.

    Args:
        model: in training, on its device. Wrappers (DDP) are looked through.
        loader: of the training set; a map-style dataset in a ``DataLoader``, also one that Accelerate has
            prepared. Not needed when every `batches` call names its own.
        storage: ``"memory"``, ``"disk"``, ``"off"``, or ``"auto"``, which caches where that saves at least
            5 % of the time, in memory if it fits.
        budget_bytes: most bytes to keep in memory, a quarter of the free memory by default; what does not
            fit goes to files, up to half of the free disk. With "disk" or `folder` it is the limit of files.
        folder: where to keep files. They are named by what they depend on, so that later runs and other
            processes find them. Default: a temporary folder, removed at the end.
        views: for random augmentation: store this many draws of each sample and go round. The result is
            not that of the plain loop, which draws anew each epoch. Draws are for this cache alone, whatever
            `folder` and `pool` say. Default 1: random data is not cached.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to store floating-point values in half the space;
            those of 16 bits or fewer as they are. Not exact. Default None: as they are computed.
        keep_inputs: hand out the real inputs although the model does not read them, loaded anew each epoch
            by the loader's workers. Faster for loops that read them in every batch (a reconstruction
            loss): without it they are loaded where they are read, in the main process.
        exact: False accepts that values differ in the last bits (stored as 16 bits, or computed in
            batches of another size).
        tuner: a `layerwise.Tuner`: what later phases of its plan need is stored in the same pass.
        epochs: how many epochs the loop will run; tells ``"auto"`` whether caching can pay. Default: from
            `tuner`, else unknown.
        pool: shared by several caches in one process, such as the trials of a search.

    Raises:
        CacheError: an argument is out of its range.

    >>> from torch.utils.data import TensorDataset
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = model[0].requires_grad_(False)
    >>> loader = DataLoader(TensorDataset(torch.randn(12, 8), torch.arange(12) % 2), batch_size=4)
    >>> cache = PrefixCache(model, loader, storage="memory")
    >>> for epoch in range(2):
    ...     for x, y in cache.batches():
    ...         nn.functional.cross_entropy(model(x), y).backward()
    >>> x
    Ghost(shape=(4, 8), dtype=torch.float32, device=cpu)
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader[Any] | None = None,
        *,
        storage: Storage = "auto",
        budget_bytes: int | None = None,
        folder: str | Path | None = None,
        views: int = 1,
        dtype: torch.dtype | None = None,
        keep_inputs: bool = False,
        exact: bool = True,
        tuner: Tuner | None = None,
        epochs: int | None = None,
        pool: CachePool | None = None,
    ) -> None:
        _check_options(storage, budget_bytes, views, dtype, exact, folder, tuner, epochs, pool)
        self.model = unwrap(model)
        self.loader = loader
        self.storage: Storage = storage
        self.views = views
        self.stock = Stock(self.model, storage, budget_bytes, folder, dtype, pool)
        self._given = model  # wrappers included
        self._why_off = "switched off"  # where `storage` says so
        self._exact = exact
        self._supplies: list[Supply] = []
        phases = Phases(tuner, pool.upcoming if pool is not None else {})
        self._frozen = FrozenPart(self.model, CutBook(self.model, phases))
        self._state = self._frozen.state
        observer = Observer(self._frozen, self.stock, keep_inputs=keep_inputs, exact=exact, epochs=epochs)
        self._dealer = Dealer(self._frozen)
        self._calls = Calls(self._frozen, observer)

    # -- what users call ----------------------------------------------------------------------

    def batches(self, loader: DataLoader[Any] | None = None) -> Iterator[Any]:
        """Return one epoch's batches, in the loader's order.

        A batch has the structure that the loader gives. Inputs that the model no longer reads are
        `Ghost` tensors: they have a shape and no values. Labels and all else are real.

        Args:
            loader: of this epoch; a validation loader, for example, which is cached on its own. Default:
                the one given to the class.

        Raises:
            CacheError: there is no loader; or, while the loop runs, the value of a ghost was needed.
        """
        loader = self._loader(loader)
        epoch = Epoch(functools.partial(self._begin, inner(loader)))
        return iterated(loader, epoch) if is_prepared(loader) else epoch

    def as_loader(self, loader: DataLoader[Any] | None = None) -> Any:
        """Return what stands for a loader where a framework owns the loop (Lightning, transformers' Trainer).

        Each iteration over it is an epoch of `batches`. Its length, data set and all else are the loader's.

        Args:
            loader: see `batches`.

        Raises:
            CacheError: there is no loader.
        """
        loader = self._loader(loader)
        return stand_in(loader, functools.partial(self.batches, inner(loader)))

    def _begin(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Begin an epoch, random draws included."""
        supply = self._supply(loader)
        self._calls.end_leavers(seen_or_not=True)
        self._state.refresh()
        if self._dealer.is_off(supply):
            return supply.plain()
        changed = supply.forget_changed()
        if supply.reason:
            return supply.plain()
        if changed and supply.changes > _CHANGES:
            supply.refuse(f"the dataset changes from epoch to epoch ({changed})")
        supply.moves = self._state.moves
        self._frozen.drop_stale(supply.feeds)
        return supply.begun(self._deal(supply, supply.reader.order()))

    def _deal(self, supply: Supply, order: Order) -> Iterator[Any]:
        at_hand = AtHand(supply)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._calls.expecting(at_hand))
            for live in self._dealer.epoch(supply, order):
                if isinstance(live, Raised):
                    yield live
                    continue
                at_hand.append(live)
                yield live.batch
                at_hand.drop_used()
            stack.callback(at_hand.drop_used, over=True)
            if supply.asks_ahead or not supply.came:
                self._calls.leave(at_hand, stack.pop_all())
        self.stock.shelf.publish_complete()

    def fill(
        self,
        loader: DataLoader[Any] | None = None,
        *,
        call: Callable[[Any], Any] | None = None,
        batch_size: int | None = None,
        fold: bool = False,
    ) -> Filled:
        """Compute what is missing for every sample of the loader, in the dataset's order, without training.

        One forward pass of the prefix without gradients. `batches` does the same work by and by in its
        first epoch, so this is for a cache that is prepared before it is used.

        Args:
            loader: default: the one given to the class.
            call: what the loop does with a batch up to the model's output. Default: ``model(**batch)``
                for a dictionary, else ``model(batch[0])``.
            batch_size: samples in a batch of this pass; the loader's by default. An exact cache takes
                another size only once a batch of it was computed in both ways and the bits agree.
                Larger batches pay on a GPU; on a CPU they may well be slower.
            fold: put frozen batch-norms into the convolutions before them, for this pass. Values differ
                by rounding, so the cache must have been made with ``exact=False``.

        Returns:
            What was done, and what was asked for and not done.

        Raises:
            CacheError: this loader cannot be cached; says why. Or an argument is out of its range.

        Warns:
            LayerwiseWarning: batches of that size, or folded weights, give too different values.
        """
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise CacheError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        if fold and self._exact:
            raise CacheError("folded batch-norms change last bits: pass exact=False to PrefixCache as well.")
        supply = self._supply(inner(self._loader(loader)))
        with kept_random_state():
            found = self._looked_at(supply, call or self._call)
            passes = [Filling(self._frozen, supply, feed, phase) for feed, phase in found]
            filled = total([one.run(batch_size, fold=fold) for one in passes])
        self.stock.shelf.publish_complete()
        for note in filled.notes:
            warn(f"prefix cache: {note}.")
        return filled

    def __repr__(self) -> str:
        return (
            f"<PrefixCache of {type(self.model).__name__}: {self.describe().removeprefix('prefix cache: ')}>"
        )

    def describe(self) -> str:
        """Return, for people, what is cached, where, why, and what it is expected to gain."""
        return described(self._supplies)

    @property
    def decision(self) -> Decision | None:
        """What was chosen last for the class's own loader; None before its first batch."""
        last = self._last_phase()
        return None if last is None else last.decision

    @property
    def decision_text(self) -> str:
        """What `describe` says of `decision`; ``""`` before the first batch."""
        last = self._last_phase()
        return "" if last is None else f"prefix cache: {told(last)}"

    def _last_phase(self) -> Phase | None:
        supply = self._known_supply(inner(self.loader))
        return None if supply is None else last_phase(supply)

    def close(self) -> None:
        """Give memory and temporary files back. The model is as it was; the cache can be used no more."""
        for supply in self._supplies:
            for feed in supply.feeds:
                feed.forget()
            supply.reason = "the cache was closed"
        self._calls.end_leavers(seen_or_not=True)
        self.stock.shelf.close()

    def __enter__(self) -> PrefixCache:
        """Return the cache; `close` is called at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the cache."""
        self.close()

    def __reduce__(self) -> Any:
        """Have a copy or a pickle of what holds a cache hold one that is off: `batches` is the loader."""
        return _copied, (self.loader,)

    # -- loaders and batches ------------------------------------------------------------------

    def _loader(self, loader: DataLoader[Any] | None) -> DataLoader[Any]:
        loader = loader if loader is not None else self.loader
        if loader is None:
            raise CacheError("there is no loader to read: pass one to PrefixCache, or here.")
        return loader

    def _supply(self, loader: DataLoader[Any]) -> Supply:
        """Return what is known of a loader; of one that was not seen before, whether it can be cached."""
        supply = self._known_supply(loader)
        if supply is None:
            if self.storage == "off":
                supply = Supply(loader, reason=self._why_off)
            else:
                asked = self.storage in ("memory", "disk")
                supply = open_supply(loader, self._given, views=self.views, asked=asked)
            self._supplies.append(supply)
        elif supply.loader is not loader:
            supply.take(loader)
        return supply

    def _known_supply(self, loader: DataLoader[Any]) -> Supply | None:
        """Return the supply of a loader, or of one like it: some loops make a new one for each evaluation."""
        mine = (supply for supply in self._supplies if supply.loader is loader)
        alike = (supply for supply in self._supplies if supply.may_take(loader))
        return next(chain(mine, alike), None)

    # -- a recording pass of its own ----------------------------------------------------------

    def _call(self, batch: Any) -> Any:
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch[0])

    def _looked_at(self, supply: Supply, call: Callable[[Any], Any]) -> list[tuple[Feed, Phase]]:
        """Return the feeds of a loader with their present phase, after a batch of each was observed.

        Raises:
            CacheError: none of them can be cached.
        """
        self._state.refresh()
        why, found = supply.reason, []
        for feed in supply.feeds if not why else ():
            self._frozen.drop_stale([feed])
            phase = feed.phases.get(self._state.number())
            if phase is None or not (phase.verified or phase.reason):
                size = min(feed.reader.batch_size or feed.full or 1, feed.size)
                live = self._dealer.deal(supply, list(feed.indices[:size]), None, view=0)
                with self._calls.expecting([live]), traceless(self.model):
                    call(live.batch)
                phase = feed.phases.get(self._state.number())
            if supply.reason or phase is None or phase.reason:
                not_called = supply.not_looked_at or "the model was not called"
                why = supply.reason or (phase.reason if phase else not_called)
            else:
                found.append((feed, phase))
        if not found:
            raise CacheError(f"this loader is not cached: {why}")
        return found


def _copied(loader: DataLoader[Any] | None) -> PrefixCache:
    """Return what stands for a cache in a copy; the model's own copy may not be complete yet."""
    made = PrefixCache(nn.Module(), loader, storage="off")
    made._why_off = "a copy of a cache stores nothing. Make one for the copy of the model"
    return made


def _check_options(
    storage: Any,
    budget_bytes: Any,
    views: Any,
    dtype: Any,
    exact: bool,
    folder: Any,
    tuner: Any,
    epochs: Any,
    pool: Any,
) -> None:
    problems = []
    if storage not in ("auto", "memory", "disk", "off"):
        problems.append(f"storage must be 'auto', 'memory', 'disk' or 'off', got {storage!r}")
    if budget_bytes is not None and (not isinstance(budget_bytes, int) or budget_bytes < 0):
        problems.append(f"budget_bytes must be an integer of at least 0, got {budget_bytes!r}")
    if not isinstance(views, int) or views < 1:
        problems.append(f"views must be an integer of at least 1, got {views!r}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        problems.append(f"dtype must be None, torch.bfloat16 or torch.float16, got {dtype!r}")
    if dtype is not None and exact:
        problems.append(f"values stored as {dtype} are not exact: pass exact=False as well")
    if not isinstance(folder, str | os.PathLike | None):
        problems.append(f"folder must be None or a path, got {folder!r}")
    if tuner is not None and not hasattr(tuner, "phase_index"):
        problems.append(f"tuner must be None or a layerwise.Tuner, got a {type(tuner).__name__}")
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        problems.append(f"epochs must be None or an integer of at least 1, got {epochs!r}")
    if not isinstance(pool, CachePool | None):
        problems.append(f"pool must be None or a layerwise.CachePool, got a {type(pool).__name__}")
    if problems:
        raise CacheError("; ".join(problems) + ".")
