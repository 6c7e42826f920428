"""The random state of the process: torch on the CPU and CUDA, numpy and Python, put back as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch


class RandomState(NamedTuple):
    """State of the global generators, as each of them gives it.

    Attributes:
        python: of `random`.
        numpy: of `numpy.random`.
        cpu: of torch; uint8[n].
        cuda: of torch's CUDA devices; empty where CUDA is not in use.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]


def random_state() -> RandomState:
    """Return the state of the global generators."""
    return RandomState(*_state_outside_torch(), torch.get_rng_state(), _cuda_states())


def restore_random_state(state: RandomState) -> None:
    """Put the global generators into a state that `random_state` returned."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Within: whatever is drawn from the global generators is undone after."""
    before = random_state()
    try:
        yield
    finally:
        restore_random_state(before)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python with `seed`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def drawn_outside_torch() -> tuple[Any, ...]:
    """Return the states of Python's and numpy's generators in a form that can be compared."""
    python, (_, keys, position, *gauss) = _state_outside_torch()
    return python, keys.tobytes(), position, *gauss


def drawn() -> tuple[Any, ...]:
    """Return the same, and the state of torch's generator of the CPU."""
    return *drawn_outside_torch(), torch.get_rng_state().numpy().tobytes()


def _state_outside_torch() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state(legacy=True)


def _cuda_states() -> list[torch.Tensor]:
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use and torch.cuda.is_available() else []
