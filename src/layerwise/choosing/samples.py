"""A seeded sample of anybody's data, and what a batch of it holds: inputs, perhaps labels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from layerwise.errors import DataError, named_kind
from layerwise.layers.structures import tensors_in
from layerwise.training.data import SeededSamples
from layerwise.training.randomness import sample_randomness
from layerwise.tuning.passes import generators_of

NO_SAMPLES = "the data holds no samples. Give at least one batch."


def to_device(value: Any, device: torch.device) -> Any:
    """Return a structure with its tensors on `device`."""
    from accelerate.utils import send_to_device

    return send_to_device(value, device)


def split_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Return (positional, keyword, labels) of a batch; labels None where it has none.

    Raises:
        DataError: the batch is of an unknown kind, or its labels are no integers.
    """
    args, kwargs, labels = parts_of(batch)
    return args, kwargs, None if labels is None else _checked_labels(labels)


def parts_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return (positional, keyword, labels) of a batch, whatever its labels are; None where it has none.

    Raises:
        DataError: the batch is of an unknown kind.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if isinstance(batch, Mapping):
        rest = {key: value for key, value in batch.items() if key != "labels"}
        return (), rest, batch.get("labels")
    listed = isinstance(batch, Sequence) and not isinstance(batch, str)
    if listed and len(batch) == 1:
        return parts_of(batch[0])
    if listed and len(batch) == 2:
        if isinstance(batch[0], Mapping):
            return (), dict(batch[0]), batch[1]
        return (batch[0],), {}, batch[1]
    size = f" of {len(batch)}" if isinstance(batch, Sized) else ""
    raise DataError(
        f"a batch is {named_kind(batch)}{size}; expected inputs, a pair (inputs, labels), or a mapping. "
        "Give a loader with a collate_fn that makes one."
    )


def _checked_labels(labels: Any) -> Tensor:
    try:
        found = torch.as_tensor(labels)
    except (RuntimeError, TypeError, ValueError):  # names of classes, boxes
        found = None
    if found is None or found.ndim != 1 or found.is_floating_point():
        what = named_kind(labels) if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise DataError(
            f"labels are {what}; expected one integer for each sample. To measure shift alone, leave the "
            "labels out."
        )
    return found.detach().cpu()


def dataset_of(data: Any) -> Any:
    """Return the data set behind a loader or a subset, else the data itself."""
    while isinstance(data, DataLoader | Subset):
        data = data.dataset
    return data


class KeptBatches:
    """The first batches of a stream, kept: it may be that it can be gone through only once.

    Args:
        stream: batches.
        max_samples: so many are kept, or a batch more; None keeps all.
        total: samples that the stream has, or None where it does not say. If it ends it is known.
        seed: of samples that are random.
    """

    def __init__(self, stream: Any, max_samples: int | None, total: int | None, seed: int) -> None:
        self.tokenizer = getattr(dataset_of(stream), "tokenizer", None)
        self.batches: list[Any] = []
        self.total = total
        samples = 0
        with reading(stream, seed):
            for batch in stream:
                self.batches.append(batch)
                samples += len(next(iter(tensors_in(parts_of(batch))), ()))
                if max_samples is not None and samples >= max_samples:
                    return
        self.total = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@contextlib.contextmanager
def reading(loader: Any, seed: int) -> Iterator[None]:
    """Within: what is random in reading depends on `seed`; all generators are put back after.

    These are the global ones and those of the loader.
    """
    generators = generators_of(loader)
    states = [generator.get_state() for generator in generators]
    try:
        with sample_randomness(seed, 0, 0):
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def open_sample(
    data: Any,
    max_samples: int | None,
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None,
    seed: int,
) -> tuple[Any, int | None]:
    """Return (loader over a drawn sample, number of samples there are or None).

    A stream (what can only be gone through in its own order) is returned as it is. Samples of all else that
    are random (augmentation) depend on their index and `seed` alone, as in `layerwise.fit`.

    See `layerwise.choosing.features.collect_features` for the arguments.

    Raises:
        DataError: the data is of an unknown kind or empty, inputs and labels differ in number, or an argument
            is out of range.
    """
    if (max_samples is not None and max_samples < 1) or batch_size < 1 or seed < 0:
        raise DataError(
            f"batch_size is {batch_size}, seed {seed} and max_samples {max_samples}; expected at least 1, 0 "
            "and 1 (or None, for all)."
        )
    if isinstance(data, KeptBatches):
        return data, data.total
    if isinstance(data, Tensor):
        data = TensorDataset(data)
    elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise DataError(f"{len(data[0])} inputs came with {len(data[1])} labels; expected one for each.")
        data = TensorDataset(*data)
    if isinstance(data, DataLoader):
        if isinstance(data.dataset, IterableDataset) or not hasattr(data.dataset, "__len__"):
            return data, _length(data)
        batch_size, collate, data = data.batch_size or batch_size, data.collate_fn, data.dataset
    collate = collate if collate is not None else getattr(dataset_of(data), "collate", None)
    if isinstance(data, str) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        if hasattr(data, "__iter__") and not isinstance(data, str):
            return data, None
        raise DataError(
            f"the data is {named_kind(data)}; expected a data set, a DataLoader, a tensor of inputs, or "
            "a pair (inputs, labels) of tensors."
        )
    total = len(data)
    if not total:
        raise DataError(NO_SAMPLES)
    dataset: Dataset[Any] = SeededSamples(data, seed)
    if max_samples is not None and total > max_samples:
        drawn = np.random.default_rng(seed).permutation(total)[:max_samples]
        dataset = Subset(dataset, sorted(drawn.tolist()))  # sorted: files lie in that order
    generator = torch.Generator()  # else the loader would draw from the global one
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, generator=generator), total


def _length(loader: DataLoader[Any]) -> int | None:
    """Return the number of samples of a stream; None where it does not say, or hands on whole batches."""
    if loader.batch_size is None or not hasattr(loader.dataset, "__len__"):
        return None
    return len(loader.dataset)
