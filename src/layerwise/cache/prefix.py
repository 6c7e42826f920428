"""`PrefixCache`: compute the frozen part of a model once, then train from what it gave."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from layerwise.cache.checking import BufferGuard, no_autocast_cache
from layerwise.cache.cut import NothingToSkipError
from layerwise.cache.cutbook import CutBook, PhaseSource
from layerwise.cache.decision import Decision, Storage
from layerwise.cache.feed import Feed, Phase
from layerwise.cache.hooks import RootHook
from layerwise.cache.link import Link, autocast_state, find_link
from layerwise.cache.observing import Live, Observer
from layerwise.cache.reading import LoaderReader, kept_random_state
from layerwise.cache.replay import refuse_ghosts, replaying
from layerwise.cache.stock import Pool, Stock, checked_folder
from layerwise.errors import CacheError, LayerwiseError, LayerwiseWarning
from layerwise.layers.isolation import untouched, unwrap
from layerwise.layers.structures import map_tensors, tensors_in

logger = logging.getLogger("layerwise.cache")

_MISSING_FRAC = 0.1  # above this, the loader's workers load whole batches in place of single samples
_PATIENCE = 3  # batches that may pass without reaching the model before the cache gives up


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
        loader: of the training set; a map-style dataset in a ``DataLoader``. Not needed when every
            `batches` call names its own.
        storage: ``"memory"``, ``"disk"``, ``"off"``, or ``"auto"``, which caches where that saves at least
            5 % of the time, in memory if it fits.
        budget_bytes: most bytes to keep. Default: a quarter of the free memory; half of the free disk.
        folder: where to keep files. They are named by what they depend on, so that later runs and other
            processes find them. Default: a temporary folder, removed at the end.
        views: for random augmentation: store this many draws of each sample and go round. The result is
            not that of the plain loop, which draws anew each epoch. Default 1: random data is not cached.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to store floating-point values in half the space.
            Not exact. Default None: as they are computed.
        keep_inputs: hand out the real inputs although the model does not read them; for loops that use
            them otherwise (a reconstruction loss). They are loaded anew each epoch.
        exact: False accepts that values differ in the last bits (stored as 16 bits, or computed in
            batches of another size).
        tuner: a `layerwise.Tuner`: what later phases of its plan need is stored in the same pass.
        epochs: how many epochs the loop will run; tells ``"auto"`` whether caching can pay. Default: from
            `tuner`, else unknown.
        pool: a dictionary that several caches share in one process, such as the trials of a search.

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
        tuner: PhaseSource | None = None,
        epochs: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        _check_options(storage, budget_bytes, views, dtype, exact)
        self.model = unwrap(model)
        self.loader = loader
        self.storage: Storage = storage
        self.views = views
        self.keep_inputs = keep_inputs
        self.stock = Stock(self.model, storage, budget_bytes, checked_folder(folder), dtype, pool)
        self._book = CutBook(self.model, tuner)
        self._observer = Observer(
            self.model, self._book, self.stock, keep_inputs=keep_inputs, exact=exact, epochs=epochs
        )
        self._feeds: dict[int, Feed] = {}
        self._lives: list[Live] = []
        self._hook = RootHook(self._before, self._after)
        self._observer.busy = False
        self._stack: contextlib.ExitStack | None = None
        self._expected: tuple[Feed, Phase, Callable[[Any], None]] | None = None
        self._compiled = model is not self.model and type(model).__name__ == "OptimizedModule"

    # -- what users call ----------------------------------------------------------------------

    def batches(self, loader: DataLoader[Any] | None = None) -> Iterator[Any]:
        """Yield one epoch's batches, in the loader's order.

        A batch has the structure that the loader gives. Inputs that the model no longer reads are
        `Ghost` tensors: they have a shape and no values. Labels and all else are real.

        Args:
            loader: of this epoch; a validation loader, for example, which is cached on its own. Default:
                the one given to the class.

        Raises:
            CacheError: there is no loader; or, while the loop runs, the value of a ghost was needed.
        """
        loader = loader if loader is not None else self.loader
        if loader is None:
            raise CacheError("there is no loader to read: pass one to PrefixCache or to batches().")
        feed = self._feed(loader)
        self._book.refresh()
        phase = feed.phases.get(self._book.state())
        if feed.reason or (phase is not None and phase.reason):
            feed.epochs += 1
            yield from loader
            return
        self._observer.drop_stale(feed)
        view = feed.epochs % feed.views
        feed.epochs += 1
        with self._hook.attached(self.model):
            for indices, batch in feed.schedule(self._is_known(feed), lambda: self._must_load(feed, view)):
                live = self._next(feed, indices, batch, view)
                self._lives.append(live)
                try:
                    yield live.batch
                finally:
                    self._lives.remove(live)
                self._note_unseen(live)
        self.stock.shelf.publish_complete()

    def fill(
        self, loader: DataLoader[Any] | None = None, *, call: Callable[[Any], Any] | None = None
    ) -> None:
        """Compute what is missing for every sample of the loader, in the dataset's order, without training.

        One forward pass of the prefix without gradients. `batches` does the same work by and by in its
        first epoch, so this is for a cache that is prepared before it is used.

        Args:
            loader: default: the one given to the class.
            call: what the loop does with a batch up to the model's output. Default: ``model(**batch)``
                for a dictionary, else ``model(batch[0])``.

        Raises:
            CacheError: this loader cannot be cached; says why.
        """
        loader = loader if loader is not None else self.loader
        if loader is None:
            raise CacheError("there is no loader to read: pass one to PrefixCache or to fill().")
        feed = self._feed(loader)
        if feed.reader is None or feed.reason:
            raise CacheError(f"this loader is not cached: {feed.reason}")
        if call is None:
            call = self._call
        size = feed.reader.batch_size or feed.full or 1
        batches = [list(range(i, min(i + size, feed.reader.size))) for i in range(0, feed.reader.size, size)]
        buffers = BufferGuard(self.model)
        self._book.refresh()
        with self._hook.attached(self.model), kept_random_state():
            for view in range(feed.views):
                for indices, batch in zip(batches, feed.reader.load(iter(batches))):
                    live = self._next(feed, indices, batch, view)
                    if live.observing:
                        self._lives.append(live)
                        try:
                            with torch.no_grad(), untouched(self.model), buffers:
                                call(live.batch)
                        finally:
                            self._lives.remove(live)
                    phase = feed.phases.get(live.key)
                    if feed.reason or phase is None or phase.reason:
                        why = feed.reason or (phase.reason if phase else "the model was not called")
                        raise CacheError(f"this loader is not cached: {why}")
        self.stock.shelf.publish_complete()

    def _call(self, batch: Any) -> Any:
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch[0])

    def describe(self) -> str:
        """Return, for people, what is cached, where, why, and what it is expected to gain."""
        if not self._feeds:
            return "prefix cache: nothing seen yet"
        lines = []
        for number, feed in enumerate(self._feeds.values()):
            name = "" if len(self._feeds) == 1 else f" (loader {number + 1})"
            if feed.reason:
                lines.append(f"prefix cache{name}: off: {feed.reason}")
            lines += [f"prefix cache{name}: {_told(phase)}" for phase in feed.phases.values()]
        return "\n".join(lines) or "prefix cache: waiting for the first batch"

    @property
    def decision(self) -> Decision | None:
        """What was chosen last for the class's own loader; None before its first batch."""
        feed = self._feeds.get(id(self.loader))
        if feed is None:
            return None
        if feed.reason:
            return Decision("off", feed.reason)
        phases = [phase for phase in feed.phases.values() if phase.decision is not None or phase.reason]
        if not phases:
            return None
        return phases[-1].decision or Decision("off", phases[-1].reason)

    def close(self) -> None:
        """Give memory and temporary files back. The model is as it was; the cache can be used no more."""
        for feed in self._feeds.values():
            feed.sites.clear()
            feed.leaves.clear()
            feed.reason = "the cache was closed"
        self.stock.close()

    def __enter__(self) -> PrefixCache:
        """Return the cache; `close` is called at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the cache."""
        self.close()

    # -- feeds and batches --------------------------------------------------------------------

    def _feed(self, loader: DataLoader[Any]) -> Feed:
        feed = self._feeds.get(id(loader))
        if feed is not None:
            return feed
        feed = Feed(loader, views=self.views)
        self._feeds[id(loader)] = feed
        if self.storage == "off":
            feed.reason = "switched off"
            return feed
        if self._compiled or getattr(self.model, "_compiled_call_impl", None) is not None:
            self._refuse(feed, None, "the model is compiled; pass the plain model")
            return feed
        try:
            feed.reader = LoaderReader(loader)
        except CacheError as error:
            self._refuse(feed, None, str(error))
            return feed
        if feed.reader.size < 2:
            self._refuse(feed, None, "the dataset has fewer than two samples")
            return feed
        try:
            random = feed.reader.randomness()
        except Exception as error:  # the dataset's own code; if it is at fault, the plain loop will say so
            self._refuse(feed, None, f"a sample could not be loaded in this process: {_one_line(error)}")
            return feed
        if random and self.views == 1:
            self._refuse(feed, None, f"{random}. Pass views=V to store V draws of each sample")
        return feed

    def _refuse(self, feed: Feed, phase: Phase | None, reason: str) -> None:
        if phase is not None:
            phase.reason = reason
        else:
            feed.reason = reason
        logger.info("prefix cache off: %s", reason)
        if self.storage in ("memory", "disk"):  # it was asked for in so many words
            warnings.warn(f"The prefix cache is off: {reason.rstrip('.')}.", LayerwiseWarning, stacklevel=4)

    def _is_known(self, feed: Feed) -> bool:
        """Whether this epoch can start without looking at a batch first."""
        phase = feed.phases.get(self._book.state())
        return phase is not None and phase.verified

    def _must_load(self, feed: Feed, view: int) -> bool:
        """Whether the loader's workers had better load every batch of this epoch."""
        assert feed.reader is not None
        phase = feed.phases.get(self._book.state())
        if phase is None or phase.cut is None or not phase.verified or feed.reload:
            return True
        rows = torch.arange(feed.reader.size) + view * feed.reader.size
        return bool(feed.missing(phase.cut, phase.ghosts, rows).float().mean() > _MISSING_FRAC)

    def _next(self, feed: Feed, indices: list[int], batch: Any, view: int) -> Live:
        """Return the batch to hand out: replayed if it can be, else real."""
        assert feed.reader is not None
        rows = torch.tensor(indices, dtype=torch.int64) + view * feed.reader.size
        live = Live(feed, rows, indices, self._book.state())
        phase = live.phase = feed.phases.get(live.key)
        usable = phase is not None and phase.verified and not phase.reason and not feed.reason
        if usable and phase is not None and feed.fits(len(indices)):
            try:
                batch = self._observer.complete(feed, phase, live, batch)
                live.batch, live.leaves = feed.handed_out(phase.ghosts, rows, batch, tag=live)
                live.replayed = True
                return live
            except (CacheError, OSError) as error:
                self._refuse(feed, phase, str(error))
        live.batch = batch if batch is not None else feed.reader.load_now(indices)
        live.leaves = tensors_in(live.batch)
        settled = phase is not None and (phase.verified or phase.reason)
        size = feed.reader.batch_size or len(indices)  # a smaller last batch tells less
        live.observing = not (feed.reason or settled) and len(indices) >= min(size, feed.reader.size)
        return live

    def _note_unseen(self, live: Live) -> None:
        feed = live.feed
        if live.seen:
            feed.unseen = 0
        elif live.observing or live.phase is not None:
            feed.unseen += 1
            if feed.unseen >= _PATIENCE and not feed.reason:
                self._refuse(feed, None, "the loop does not pass the loader's batches to this model")

    # -- the model's own call -----------------------------------------------------------------

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See every call of the model: recognise a batch that was handed out, and act on it."""
        if self._observer.busy:
            return None
        for live in reversed(self._lives):
            if live.observing:
                if not live.seen and not live.feed.reason:
                    self._observe_safely(live, args, kwargs)
                if live.seen:
                    return None
                continue
            link = live.feed.link
            if live.phase is not None and link is not None and link.recognises(args, kwargs, live.leaves):
                live.seen = True
                return self._enter(live, link, args, kwargs)
        return None

    def _enter(self, live: Live, link: Link, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        feed, phase = live.feed, live.phase
        if not live.replayed or phase is None or phase.cut is None or feed.reader is None:
            return None  # it was handed out real
        changed = (
            live.key != self._book.state()
            or not link.same_constants(args, kwargs)
            or autocast_state(link.device) != link.autocast
        )
        if changed:  # other modes than when the batch was made: this call needs the real samples
            leaves = tensors_in(feed.reader.load_now(live.indices))
            return self._with_real(link, args, kwargs, leaves)
        values = feed.values(phase.cut, live.rows, link.device)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(
            replaying(phase.cut, values, feed.skeletons, batch=len(live.rows), device=link.device)
        )
        return None

    def _with_real(self, link: Link, args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        numbers = iter(zip(link.leaves, link.dtypes))

        def leaf(_: torch.Tensor) -> torch.Tensor:
            number, dtype = next(numbers)
            return leaves[number].to(link.device, dtype)

        return map_tensors((args, kwargs), leaf)

    def _after(self, output: Any) -> None:
        """See every output of the model, and the end of a call that raised."""
        if self._observer.busy:
            return
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
            refuse_ghosts(output)
        expected, self._expected = self._expected, None
        if expected is None or output is None:
            return
        feed, phase, compare = expected
        try:
            compare(output)
            logger.info("prefix cache: %s", _told(phase))
        except (CacheError, OSError) as error:
            self._refuse(feed, phase, str(error))

    # -- the first batch of a phase -----------------------------------------------------------

    def _observe_safely(self, live: Live, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a batch in the plain loop; whatever goes wrong only means that nothing is cached."""
        feed = live.feed
        self._observer.busy = True
        try:
            link = find_link(live.leaves, args, kwargs)
            if link is None:
                return
            live.seen = True
            live.key = self._book.state()  # the loop may have changed modes since it got the batch
            phase = live.phase = feed.phases.setdefault(live.key, Phase())
            if phase.verified or phase.reason:
                return
            try:
                with no_autocast_cache():
                    compare = self._observer.observe(live, link, phase, args, kwargs)
                self._expected = (feed, phase, compare)
            except NothingToSkipError as error:
                phase.reason = str(error)
                logger.info("prefix cache off: %s", error)
            except (LayerwiseError, OSError) as error:
                self._refuse(feed, phase, str(error))
            except Exception as error:  # the model's and the dataset's own code ran: training must go on
                self._refuse(feed, phase, f"looking at the first batch raised {_one_line(error)}")
        except CacheError as error:
            live.seen = True
            self._refuse(feed, None, str(error))
        finally:
            self._observer.busy = False


def _told(phase: Phase) -> str:
    """Return what was chosen for a phase, for people."""
    if phase.reason or phase.cut is None or phase.decision is None:
        return f"off: {phase.reason}" if phase.reason else "waiting for the first batch"
    sites = ", ".join(map(str, phase.cut.frontier))
    return f"{phase.decision.storage}, cut at {sites} ({phase.cut.first_dirty}): {phase.decision.reason}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _check_options(storage: Any, budget_bytes: Any, views: Any, dtype: Any, exact: bool) -> None:
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
    if problems:
        raise CacheError("; ".join(problems) + ".")
