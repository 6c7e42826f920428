"""A short hash of data, so that a run or a search is not gone on with on other data."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from layerwise.cache.samples.draws import own_generators
from layerwise.layers.randomness import kept_random_state

PROBES = 32
"""Samples that a fingerprint of data looks at."""


def fingerprint(data: Any) -> str | None:
    """Return a short hash of some samples, spread evenly, so that other data are not taken for these.

    It is the same on every machine, as paths and times do not count. None where the data have no length or a
    sample is not the same when it is read again (augmentation). The random state is left as it was.

    Args:
        data: as for `layerwise.fit`; of a loader, its data set.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if callable(plain := getattr(dataset, "plain", None)):  # an image set without its augmentation
        dataset = plain()
    if isinstance(dataset, IterableDataset):
        return None
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or not len(dataset):
        return None
    digest = hashlib.sha256(str(len(dataset)).encode())
    with kept_random_state(), contextlib.ExitStack() as stack:
        stack.callback(own_generators(dataset, None).restore)
        places = np.linspace(0, len(dataset) - 1, min(PROBES, len(dataset))).round().astype(int).tolist()
        if _content(dataset[places[0]]) != _content(dataset[places[0]]):
            return None
        for place in places:
            digest.update(_content(dataset[place]))
    return digest.hexdigest()[:16]


def _content(sample: Any) -> bytes:
    """Return a hash of a sample: tensors, arrays and images by their values, all else as it is written."""
    if isinstance(sample, Tensor):
        tensor = sample.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
        return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + hashlib.sha256(raw).digest()
    if hasattr(sample, "__array_interface__") and (values := np.asarray(sample)).dtype.kind in "biufc":
        return f"{values.dtype}{values.shape}".encode() + hashlib.sha256(values.tobytes()).digest()
    if isinstance(sample, Mapping):
        return b"".join(str(name).encode() + _content(value) for name, value in sample.items())
    if isinstance(sample, (list, tuple)):
        return b"".join(map(_content, sample))
    return repr(sample).encode() if isinstance(sample, str | int | float) else type(sample).__name__.encode()
