"""Carry a Tuner's state inside its optimiser's, so that whoever saves the one saves the other."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from layerwise.tuning.tuner import Tuner

KEY = "layerwise"


def save_with_optimizer(tuner: Tuner) -> None:
    """Make ``optimizer.state_dict()`` hold the Tuner's state, and ``load_state_dict()`` restore it first.

    Frameworks save and load the optimiser's state in their own way and at their own time. An optimiser that
    is loaded in another phase than it was saved in has other param groups, which torch refuses; so the
    Tuner goes into the right phase just before. Call it before the first save, and in the process that goes
    on before the load, which else fails in another phase. States without the entry load as always.

    Args:
        tuner: its optimiser gets two hooks; calling twice adds nothing.
    """
    optimizer = tuner.optimizer
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # Accelerate's wrapper has no hooks
    if getattr(optimizer, "_layerwise_tuner", None) is tuner:
        return
    optimizer._layerwise_tuner = tuner  # type: ignore[attr-defined]
    busy = False  # the Tuner's own state_dict holds the optimiser's, and calls us again

    def add(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal busy
        if busy:
            return state
        busy = True
        try:
            own = tuner.state_dict()
        finally:
            busy = False
        return {**state, KEY: {name: value for name, value in own.items() if name != "optimizer"}}

    def take(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if KEY not in state:
            return state
        bare = {name: value for name, value in state.items() if name != KEY}
        tuner.load_state_dict({**state[KEY], "optimizer": bare})
        return bare

    optimizer.register_state_dict_post_hook(add)
    optimizer.register_load_state_dict_pre_hook(take)
