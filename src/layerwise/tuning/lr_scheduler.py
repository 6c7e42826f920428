"""Layerwise's schedules for a plain optimiser, as a ``torch.optim.lr_scheduler``."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle

from layerwise.errors import PlanError
from layerwise.plans.schedules import factor, join_factor
from layerwise.plans.settings import Schedule, Shape
from layerwise.tuning.optimizers import set_rate
from layerwise.tuning.stall import Mode, Stall

_BASE, _JOINED = "initial_lr", "layerwise_joined_at"
_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = WeakKeyDictionary()


class LayerwiseLR(torch.optim.lr_scheduler.LRScheduler):
    """Multiplies every param group's own rate by one factor, so the ratios between groups hold at every step.

    Also for a group that is added in mid-run: the ``lr`` it is added with is its peak rate, like that of the
    first groups, and it is scaled before the optimiser's next step. (Of torch's own schedulers six crash then
    and six lose the ratio.) Call ``step()`` after each ``optimizer.step()``. `layerwise.Tuner` has its
    schedule built in and needs none.

    Args:
        optimizer: its groups' ``lr`` are taken as the peak rates.
        schedule: a `Schedule` or the name of a shape; ``span`` is not read.
        total_steps: length in optimiser steps.
        join_steps: warm-up of a group that is added later, in steps.
        last_epoch: number of the last step, -1 for a new run (torch's name for it).

    Raises:
        PlanError: `total_steps` is not a whole number above 0, or `join_steps` one of at least 0.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> late = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.8)
    >>> scheduler = LayerwiseLR(optimizer, "linear", total_steps=4)
    >>> optimizer.step(); scheduler.step()
    >>> optimizer.add_param_group({"params": [late], "lr": 0.4})
    >>> optimizer.step(); tuple(round(group["lr"], 3) for group in optimizer.param_groups)
    (0.6, 0.3)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | Shape = "cosine",
        *,
        total_steps: int,
        join_steps: int = 0,
        last_epoch: int = -1,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise PlanError(f"total_steps is {total_steps!r}; expected a whole number of at least 1")
        if isinstance(join_steps, bool) or not isinstance(join_steps, int) or join_steps < 0:
            raise PlanError(f"join_steps is {join_steps!r}; expected a whole number of at least 0")
        if not isinstance(schedule, Schedule | str):
            raise PlanError(f"schedule is {schedule!r}; expected a layerwise.Schedule or the name of a shape")
        self.schedule = Schedule(shape=schedule) if isinstance(schedule, str) else schedule
        self.total_steps = total_steps
        self.join_steps = join_steps
        self.stalls = 0
        self._stall = Stall()
        super().__init__(optimizer, last_epoch)
        if optimizer in _HOOKS:
            _HOOKS[optimizer].remove()  # joiners are this schedule's now
        _HOOKS[optimizer] = optimizer.register_step_pre_hook(self._scale_joiners)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of each group for the next step."""
        value = factor(self.schedule, self._now, self.total_steps, stalls=self.stalls)
        return [self._rate(group, value) for group in self.optimizer.param_groups]

    def end_epoch(self, metric: float, *, mode: Mode = "max") -> None:
        """Take in an epoch's validation metric, for the plateau shape; other shapes pass it over.

        Args:
            metric: the epoch's validation metric.
            mode: whether more of it is better (``"max"``) or less (``"min"``).
        """
        if self.schedule.shape != "plateau":
            return
        self.stalls += self._stall.runs_out(metric, mode, self.schedule.patience_epochs)
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, as plain data (the rates themselves are in the optimiser's state)."""
        return {
            "last_epoch": self.last_epoch,
            "stalls": self.stalls,
            "best": self._stall.best,
            "bad_epochs": self._stall.bad_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where the scheduler stood whose `state_dict` this is; load the optimiser's first."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self.stalls = state_dict["stalls"]
        self._stall = Stall(state_dict["best"], state_dict["bad_epochs"])
        self._set_rates()

    @property
    def _now(self) -> int:
        return max(self.last_epoch, 0)

    def _set_rates(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr):
            set_rate(group, float(rate))

    def _rate(self, group: dict[str, Any], value: float) -> float:
        if _BASE not in group:
            group[_BASE] = float(group["lr"])
            group[_JOINED] = self._now
        if group.get(_JOINED, math.inf) <= self._now:
            value *= join_factor(self._now - group[_JOINED], self.join_steps)
        return float(group[_BASE]) * value

    def _scale_joiners(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Scale groups that were added since the last step, before the optimiser uses their rate."""
        for group in optimizer.param_groups:
            if group.get(_JOINED, 0) > self._now:
                del group[_JOINED]  # it joined under another schedule, before this one
        if any(_BASE not in group for group in optimizer.param_groups):
            self._set_rates()
