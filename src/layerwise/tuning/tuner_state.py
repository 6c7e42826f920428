"""The saved state of a `Tuner`: whose it is, and whether it may be gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layerwise.errors import PlanError
from layerwise.plans.plan import Plan

STATE_VERSION = 1


def run_of(plan: Plan, **settings: Any) -> dict[str, Any]:
    """Return what makes a run the run it is, as plain data: the first part of a Tuner's state."""
    return {"version": STATE_VERSION, "plan": plan.to_dict(), **settings}


def check_run(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a state of another run.

    Args:
        state: what was saved.
        mine: `run_of` the Tuner that is to take it.

    Raises:
        PlanError: the plan, a setting or the version is another one.
    """
    if state.get("version") != STATE_VERSION:
        raise PlanError(
            f"the Tuner's state has version {state.get('version')!r}; this layerwise reads version "
            f"{STATE_VERSION}. Start the run anew, or use the layerwise that saved it"
        )
    differs = [name for name, value in mine.items() if state.get(name, value) != value]
    if differs:
        told = "; ".join(
            "the plan is another one" if name == "plan" else f"{name} was {state[name]!r}, now {mine[name]!r}"
            for name in differs
        )
        raise PlanError(f"the Tuner's state is of another run: {told}. Make the Tuner as it was when saved")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give `optimizer`, which holds what learns, the saved order of its param groups and their state.

    Raises:
        PlanError: the saved param groups have other names.
    """
    saved, groups = list(state["names"]), optimizer.param_groups
    place = {name: index for index, name in enumerate(saved)}
    groups.sort(key=lambda group: place.get(group["name"], len(place)))
    now = [group["name"] for group in groups]
    if saved != now:
        raise PlanError(
            f"the saved optimiser has the param groups {', '.join(saved)}, this one "
            f"{', '.join(now)}; the model's parameters differ. Rebuild the model as it was when saved"
        )
    optimizer.load_state_dict(state["optimizer"])
