"""What a cached value depends on, as a hash: weights, operations, data, precision.

Two strengths. `weights_digest` and `data_digest` name a cache that outlives the process. `quick_state`
costs a few milliseconds and is compared at each epoch, to notice that somebody changed the frozen prefix.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerwise.layers.structures import tensors_in

_PROBES = 32  # samples hashed to see what transforms make of them
_SMALL = 2**18  # numbers: what a tensor may have to be copied
_STRIDE = 1021  # a prime: rows of a matrix are not of such a length
_DATASET_DEPTH = 5  # Subset of a Subset ...


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by each of their names."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1)
    if data.numel():
        digest.update(data.view(torch.uint8).numpy().data)  # a view: no copy is made
    return digest.hexdigest()


def weights_digest(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> str:
    """Return one hash of the named tensors' contents."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {tensor_digest(tensors[name])}\n".encode())
    return digest.hexdigest()


def quick_state(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> tuple[tuple[Any, ...], ...]:
    """Return something small that differs when one of the named tensors was changed.

    Holds a checksum of the bits of each tensor, so a change that goes past autograd's version counter
    (``p.data.copy_``) is seen as well.
    """
    return tuple(
        (name, tuple(tensors[name].shape), checksum(tensors[name].detach())) for name in sorted(set(names))
    )


def joint_state(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Return something small that differs when one of the tensors was changed, faster than `quick_state`.

    Does not tell which one: small tensors are laid side by side and summed as one.
    """
    together: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    sums = []
    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel() <= _SMALL:
                together.setdefault((tensor.dtype, tensor.device), []).append(tensor.reshape(-1))
            else:
                sums.append(checksum(tensor))
        sums += [checksum(torch.cat(flat)) for flat in together.values()]
    return [tensor.shape for tensor in tensors], sums


def checksum(tensor: torch.Tensor) -> int:
    """Return a number made of sums over every 1,021st word: one sum alone would not notice an exchange."""
    flat = _words(tensor).reshape(-1)
    whole = len(flat) - len(flat) % _STRIDE
    sums = flat[:whole].view(-1, _STRIDE).sum(dim=0, dtype=torch.int64)
    parts = torch.cat([sums, flat[whole:].to(torch.int64)])
    return hash(parts.cpu().numpy().tobytes())


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers, as wide as they can be: those are summed fastest."""
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() % 8 == 0 and tensor.numel():
        return tensor.reshape(-1).view(torch.int64)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor if width is None or tensor.dtype == torch.bool else tensor.view(width)


def data_digest(dataset: Any, load: Any, size: int) -> str:
    """Return a hash that names the content of a dataset and what its transforms make of it.

    Hashes what can be listed without loading all samples: tensors of a ``TensorDataset``, the indices of a
    ``Subset``, the ``_fingerprint`` of a Hugging Face dataset, path, size and time of the files of an image
    folder; and some loaded samples, spread evenly, which show a changed transform. All samples of a dataset
    whose content cannot be listed are loaded. A change inside a file that keeps its size and time is not
    seen.

    Args:
        dataset: map-style.
        load: function from a list of indices to their collated batch.
        size: number of samples.
    """
    digest = hashlib.sha256(f"{size}\n".encode())
    part, listed = dataset, False
    for _ in range(_DATASET_DEPTH):
        digest.update(f"{type(part).__module__}.{type(part).__qualname__}\n".encode())
        listed |= _describe_into(digest, part)
        inner = next((getattr(part, name) for name in ("dataset", "data") if hasattr(part, name)), None)
        if not hasattr(inner, "__getitem__") or isinstance(inner, torch.Tensor | Mapping | list):
            break
        part = inner
    count = min(_PROBES, size) if listed else size
    for number in range(count):
        index = round(number * (size - 1) / max(count - 1, 1))
        for tensor in tensors_in(load([index])):
            digest.update(tensor_digest(tensor).encode())
    return digest.hexdigest()


def _describe_into(digest: Any, dataset: Any) -> bool:
    """Hash what a dataset tells of itself; return whether that changes with the content of any sample."""
    listed = False
    fingerprint = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        digest.update(fingerprint.encode())
        listed = True
    for tensor in getattr(dataset, "tensors", ()) or ():
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor_digest(tensor).encode())
            listed = True
    indices = getattr(dataset, "indices", None)
    if isinstance(indices, list | tuple | range):
        digest.update(repr(list(indices)).encode())
    for name in ("samples", "paths"):
        files = [
            sample[0] if isinstance(sample, tuple | list) and sample else sample
            for sample in getattr(dataset, name, ()) or ()
        ]
        files = [file for file in files if isinstance(file, str | os.PathLike) and os.path.exists(file)]
        for file in files:
            status = os.stat(file)
            digest.update(f"{os.fspath(file)} {status.st_size} {status.st_mtime_ns}\n".encode())
        listed |= 0 < len(files) == len(dataset)
    for name in ("targets", "labels"):
        if isinstance(labels := getattr(dataset, name, None), list | tuple):
            digest.update(repr(labels).encode())
    for name in ("transform", "transforms", "target_transform", "preprocessing", "augment"):
        if hasattr(dataset, name):
            digest.update(_stable_repr(getattr(dataset, name)).encode())
    return listed


def _stable_repr(thing: Any) -> str:
    """Return a repr without memory addresses; those differ from one process to the next."""
    text = repr(thing)
    return type(thing).__qualname__ if " at 0x" in text else text


def column_key(*parts: str) -> str:
    """Return the name of a cached value that depends on all of `parts`."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
