"""`DataWatch`: notice that somebody changed a data set between two epochs: labels, inputs, a transform.

Loading samples again to compare them would cost what the cache saves. So what the data set holds is
compared (`contents`): at the beginning of an epoch with what it was when the last change was noticed. What
loading itself changes (a counter, a store of decoded images) does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerwise.cache.changes.alike import does_the_same
from layerwise.cache.changes.contents import Contents
from layerwise.layers.forms import tensor_digest
from layerwise.layers.holding import home
from layerwise.layers.structures import tensors_in


class DataWatch:
    """Compares a data set with itself.

    Args:
        dataset: whatever the loader reads; no sample was loaded yet.
        collate: what makes batches of its samples.

    Attributes:
        dataset: the same.
        collate: the same; another one may be set.
    """

    def __init__(self, dataset: Any, collate: Any = None) -> None:
        self.dataset, self.collate = dataset, collate
        self._loading = {"epoch"} if home(dataset).startswith("layerwise.") else set()  # what does not count
        self._last = self._now()
        self._samples: list[str] = []

    def loaded(self, samples: Any) -> None:
        """Note what loading a few samples changed, and the samples."""
        self._samples = _digests(samples)
        self._leave_out_changes(self._last)

    def changed(self, load: Callable[[], Any]) -> str:
        """Return what was changed since it was asked last, and samples with it; or ``""``.

        A number or a text that changed counts if the data set's own code reads it, as it may decide about
        few samples. Others may be an epoch number that nobody uses, and count only if samples that are loaded
        again differ.

        Args:
            load: returns the samples of `loaded`, loaded again.
        """
        now = self._now()
        texts, data = now.differing(self._last)
        if not texts and not data:
            return ""
        samples = _digests(load())
        read = not texts.isdisjoint(now.read | self._last.read)
        differ, self._samples = read or samples != self._samples, samples
        self._leave_out_changes(now)
        found = sorted(data or texts) if differ else sorted(data)
        return (found[0] or "its items") if found else ""

    def is_same(self) -> bool:
        """Return whether nothing was changed since."""
        return not any(self._now().differing(self._last))

    def _now(self) -> Contents:
        return Contents(self.dataset, "here", self._loading, collate=self.collate)

    def _leave_out_changes(self, before: Contents) -> None:
        """Leave out what was changed since, and compare with the rest as it is now."""
        texts, data = self._now().differing(before)
        self._loading |= texts | data
        self._last = self._now()


class DataNames:
    """Remembers how datasets were named, as long as they do not change."""

    def __init__(self) -> None:
        self._known: list[tuple[DataWatch, str]] = []

    def name_of(self, dataset: Any, collate: Any, make: Callable[[], str]) -> str:
        """Return a dataset's name.

        Args:
            dataset: compared by identity, and by what it holds; what `make` itself changes left out.
            collate: what makes batches of its samples; likewise.
            make: reads the dataset and returns its name.
        """
        for watch, name in self._known:
            if watch.dataset is dataset and does_the_same(watch.collate, collate) and watch.is_same():
                return name
        watch, name = DataWatch(dataset, collate), make()
        watch.loaded(())
        self._known.append((watch, name))
        return name


def _digests(samples: Any) -> list[str]:
    return [tensor_digest(tensor) for tensor in tensors_in(samples)]
