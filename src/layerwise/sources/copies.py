"""What to tell of samples that a data set holds more than once: under several labels, or in several parts."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from layerwise.errors import plural, shorten


class Sample(NamedTuple):
    """A sample's content (None where there is no second), its label, and how to name it."""

    content: Hashable
    label: str
    name: str


def tell_copies(parts: Mapping[str, Sequence[Sample]], one: str) -> list[str]:
    """Return a line for samples of one content with several labels, and one for each part with some of train.

    Args:
        parts: the samples of ``"train"`` and others.
        one: what a sample is called.
    """
    copies: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in (sample for samples in parts.values() for sample in samples if sample.content is not None):
        copies[sample.content].append(sample)
    found = []
    if apart := [alike for alike in copies.values() if len({sample.label for sample in alike}) > 1]:
        first = dict.fromkeys(f"{sample.name} as {sample.label!r}" for sample in apart[0])
        found.append(f"{plural(len(apart), one)} with labels that contradict each other ({shorten(first)})")
    train = {sample.content for sample in parts["train"]} - {None}
    for part in (name for name in parts if name != "train"):
        if again := [sample.name for sample in parts[part] if sample.content in train]:
            count = plural(len(again), one)
            found.append(f"{part}: {count} in train too, which flatters what is measured ({shorten(again)})")
    return found


def images_with_content(parts: Mapping[str, Sequence[tuple[Path, str]]]) -> dict[str, list[Sample]]:
    """Return a sample for each (path, label); files are read that have the size of others elsewhere."""
    sizes = {path: path.stat().st_size for samples in parts.values() for path, _ in samples}
    places: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for part, samples in parts.items():
        for path, label in samples:
            places[sizes[path]].add((part, label))

    def content(path: Path) -> bytes | None:
        return hashlib.sha256(path.read_bytes()).digest() if len(places[sizes[path]]) > 1 else None

    return {
        part: [Sample(content(path), label, repr(str(path))) for path, label in samples]
        for part, samples in parts.items()
    }
