"""Weights and data as hashes, of all on which a cached value depends (`Stock` puts the name of one together).

Two strengths. `weights_digest` and `data_digest` name a cache that outlives the process. `quick_state`
costs a few milliseconds and is compared at each epoch, to notice that somebody changed the frozen prefix.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.contents import Contents
from layerwise.layers.forms import dense, shape_of, strides_of, tensor_digest
from layerwise.layers.structures import tensors_in

_PROBES = 32  # samples hashed to see what transforms make of them
_SMALL = 2**15  # numbers: larger tensors are not copied
_STRIDE = 1021  # a prime: rows of a matrix are not of such a length
_DATASET_DEPTH = 5  # Subset of a Subset ...


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by each of their names."""
    kinds = nn.Module.named_parameters, nn.Module.named_buffers  # whatever a class makes of them
    return {name: tensor for named in kinds for name, tensor in named(model, remove_duplicate=False)}


def weights_digest(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> str:
    """Return one hash of the named tensors' contents, and of their strides if they are not the usual ones."""
    digest = hashlib.sha256()
    for name in sorted(names):
        strides = strides_of(tensors[name])
        is_usual = not strides or strides == torch.empty(tensors[name].shape, device="meta").stride()
        lying = "" if is_usual else f" {strides}"
        digest.update(f"{name} {tensor_digest(tensors[name])}{lying}\n".encode())
    return digest.hexdigest()


def quick_state(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> tuple[tuple[Any, ...], ...]:
    """Return something small that differs when one of the named tensors was changed.

    Holds a checksum of the bits of each tensor, so a change that goes past autograd's version counter
    (``p.data.copy_``) is seen as well, and its strides (channels_last), which may change last bits.
    """
    named = [(name, tensors[name]) for name in sorted(set(names))]
    return tuple((name, shape_of(tensor), strides_of(tensor), checksum(tensor)) for name, tensor in named)


def joint_state(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Return something small that differs when one of the tensors was changed, faster than `quick_state`.

    Does not tell which one: small tensors are laid side by side and summed as one.
    """
    together: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    sums = []
    with torch.no_grad():
        for tensor in chain.from_iterable(map(dense, tensors)):
            if tensor.numel() <= _SMALL:
                flat = tensor if tensor.dim() == 1 else tensor.reshape(-1)
                together.setdefault((tensor.dtype, tensor.device), []).append(flat)
            else:
                sums.append(checksum(tensor))
        sums += [checksum(torch.cat(alike)) for alike in together.values()]
    return [(shape_of(tensor), strides_of(tensor)) for tensor in tensors], sums


def checksum(tensor: torch.Tensor) -> int:
    """Return a number made of sums over every 1,021st word: one sum alone would not notice an exchange."""
    sums = []
    for part in dense(tensor):
        flat = _words(part).reshape(-1)
        whole = len(flat) - len(flat) % _STRIDE
        sums.append(flat[:whole].view(-1, _STRIDE).sum(dim=0, dtype=torch.int64))
        sums.append(flat[whole:].to(torch.int64))
    return hash(torch.cat(sums).cpu().numpy().tobytes())


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers, as wide as they can be: those are summed fastest."""
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() % 8 == 0 and tensor.numel():
        return tensor.reshape(-1).view(torch.int64)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor if width is None else tensor.view(width)


def data_digest(dataset: Any, load: Any, size: int, collate: Any = None) -> str:
    """Return a hash that names the content of a dataset and what its transforms make of it.

    Hashes all that the dataset's attributes hold, files by path, size and time, and the code of its classes
    and functions; what loading samples changes is left out. Then some loaded samples, spread evenly. All
    samples are loaded where it cannot be told that the attributes hold the content: it can of a
    ``TensorDataset``, a Hugging Face dataset with its ``_fingerprint``, and of names of files. A change
    inside a file that keeps its size and time is not seen.

    Args:
        dataset: map-style.
        load: function from a list of indices to their collated batch.
        size: number of samples.
        collate: what makes batches of samples. Its code counts, and of what it holds the loaded samples tell.
    """
    digest, probes = hashlib.sha256(f"{size}\n".encode()), spread(_PROBES, size)
    load(probes[:1])  # what the first loading makes (a file that is opened) is not what each one changes
    before = Contents(dataset, "here", {"epoch"})
    _load_into(digest, load, probes)
    left_out = {"epoch"}.union(*Contents(dataset, "here", {"epoch"}).differing(before))
    if type(dataset).__module__.startswith("layerwise."):
        left_out |= {"seed", "has_drawn"}  # of `SeededSamples`: where they act, loaded samples show it
    code = collate if isinstance(collate, FunctionType | functools.partial) else type(collate)
    held, parts = Contents(dataset, "anywhere", left_out, collate=code), datasets_in(dataset)
    digest.update(repr([sorted(held.texts.items()), sorted(held.data.items())]).encode())
    files, length = max(held.files.values(), default=0), min(len(part) for part in parts)
    if files < length and not any(map(_is_told, parts)):
        _load_into(digest, load, sorted(set(range(size)) - set(probes)))
    return digest.hexdigest()


def spread(count: int, size: int) -> list[int]:
    """Return `count` indices below `size`, or fewer, spread evenly.

    >>> spread(3, 11)
    [0, 5, 10]
    """
    count = min(count, size)
    return [round(number * (size - 1) / max(count - 1, 1)) for number in range(count)]


def _load_into(digest: Any, load: Any, indices: Iterable[int]) -> None:
    for index in indices:
        for tensor in tensors_in(load([index])):
            digest.update(tensor_digest(tensor).encode())


def datasets_in(dataset: Any) -> list[Any]:
    """Return a dataset, the one inside it, and so on."""
    parts = [dataset]
    while len(parts) < _DATASET_DEPTH:
        inner = next(
            (getattr(parts[-1], name) for name in ("dataset", "data") if hasattr(parts[-1], name)), None
        )
        if not hasattr(inner, "__getitem__") or isinstance(inner, torch.Tensor | Mapping | list):
            break
        parts.append(inner)
    return parts


def _is_told(dataset: Any) -> bool:
    """Return whether what a dataset holds changes with the content of any sample."""
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    tensors = getattr(dataset, "tensors", None) or ()
    return isinstance(fingerprint, str) or any(isinstance(tensor, torch.Tensor) for tensor in tensors)
