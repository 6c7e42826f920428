"""The random state as plain data for a checkpoint, and the seeds of epochs and samples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from layerwise.layers.randomness import kept_random_state


def get_random_state() -> dict[str, Any]:
    """Return the state of the global generators as tensors and plain data.

    ``"cuda"`` is of whatever accelerator there is: CUDA was the first.
    """
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": _device_states(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators into a state that `get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    _set_device_states(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _device_states() -> list[torch.Tensor]:
    """Return the states of the generators of the accelerator's devices: CUDA's, Apple's, Intel's."""
    module = _accelerator()
    if module is None:
        return []
    if hasattr(module, "get_rng_state_all"):
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]


def _set_device_states(states: list[torch.Tensor]) -> None:
    module = _accelerator()
    if module is None or [len(state) for state in states] != [len(state) for state in _device_states()]:
        return  # of other devices, or of none
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(states)
    else:  # Apple's, of which there is one
        module.set_rng_state(states[0])


def _accelerator() -> Any:
    """Return torch's module of the accelerator that is there, such as ``torch.cuda``; None without one."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if there is None else torch.get_device_module(there)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's order: ``seed * 1_000_003 + epoch``.

    A function of the two and of nothing else, so that an epoch can be begun again in the middle.

    >>> epoch_seed(0, 3), epoch_seed(1, 0)
    (3, 1000003)
    """
    return seed * 1_000_003 + epoch


@contextmanager
def sample_randomness(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Give the body random numbers that depend on (seed, epoch, index) alone; undo it afterwards.

    With it a random augmentation draws the same whatever worker process loads the sample, in which
    order, and whether the run was interrupted before. The model's own randomness is not disturbed.
    """
    mixed = hash((seed, epoch, index)) % 2**32  # a tuple of ints hashes the same in every process
    with kept_random_state():
        torch.default_generator.manual_seed(mixed)
        random.seed(mixed)
        np.random.seed(mixed)
        yield
