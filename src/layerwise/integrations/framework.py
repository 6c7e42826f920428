"""What the callbacks of all frameworks share: a Tuner driven by somebody else's loop."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from layerwise.errors import ModelError, plural, warn
from layerwise.integrations.resume import save_with_optimizer
from layerwise.tuning.stall import Mode
from layerwise.tuning.tuner import Tuner


class Driver:
    """Drives a Tuner from the events of a framework's loop.

    Args:
        tuner: made before the framework's trainer, for the module that it trains.
        mode: whether more of the validation metric is better.
        waits: a validation metric comes after an epoch's last step, for which its end waits.
    """

    def __init__(self, tuner: Tuner, mode: Mode, *, waits: bool) -> None:
        self.tuner = tuner
        self.mode: Mode = mode
        self._waits = waits
        self._counts = False  # the steps of an epoch: of a stream the framework does not know its end
        self.metric: float | None = None  # of the epoch that has not been ended yet
        self._wrapping = contextlib.ExitStack()
        save_with_optimizer(tuner)

    def before_wrapping(self) -> None:
        """Let everything that ever learns require gradients, until `after_wrapping`."""
        self._wrapping.close()
        self._wrapping.enter_context(self.tuner.all_phases())

    def after_wrapping(self, model: nn.Module) -> None:
        """Go back to what learns now, and check how the framework wrapped the model.

        Raises:
            ModelError: a DistributedDataParallel that does not look for unused parameters, though some phase
                freezes some.
        """
        self._wrapping.close()
        for module in model.modules():
            if not isinstance(module, nn.parallel.DistributedDataParallel):
                continue
            frozen = sum(not parameter.requires_grad for parameter in module.parameters())
            if frozen and not module.find_unused_parameters:
                raise ModelError(
                    f"DistributedDataParallel was built without find_unused_parameters=True, but {frozen} "
                    "parameters are frozen in this phase and learn in another: it would wait for "
                    "gradients that never come. Lightning: strategy='ddp_find_unused_parameters_true'; "
                    "transformers: TrainingArguments(ddp_find_unused_parameters=True)."
                )

    def check_length(self, steps: float, steps_per_epoch: int | None, framework: str) -> None:
        """Warn if the framework's loop is shorter than the plan.

        Args:
            steps: optimiser steps after which it ends; may be infinite.
            steps_per_epoch: of its epochs; None of a stream, whose steps are counted here from now on.
            framework: its name.

        Raises:
            ModelError: its epochs have another number of optimiser steps than the Tuner was told.
        """
        tuner = self.tuner
        self._counts = steps_per_epoch is None
        if steps_per_epoch not in (None, tuner.steps_per_epoch):
            raise ModelError(
                f"an epoch of {framework} has {plural(steps_per_epoch, 'optimiser step')}, but the Tuner "
                f"was made for steps_per_epoch={tuner.steps_per_epoch}, so its phases and schedules would be "
                f"off. Make the Tuner with steps_per_epoch={steps_per_epoch}."
            )
        if tuner.total_steps > steps:
            warn(
                f"{framework} stops after {steps:g} optimiser steps, but the plan {tuner.plan.strategy!r} "
                f"takes {tuner.total_steps}: its end will not be reached.",
            )

    def begin_epoch(self) -> None:
        """Start an epoch; end the one before first, if nobody could."""
        if self.tuner.step_in_epoch >= self.tuner.steps_per_epoch:
            self.end_epoch()
        if not self.tuner.done:
            self.tuner.begin_epoch()

    def begin_batch(self) -> None:
        """Start an epoch that the framework does not know of: of a stream, or resumed from a last step."""
        done = self.tuner.step_in_epoch
        if done >= self.tuner.steps_per_epoch or (self._counts and not done):
            self.begin_epoch()

    def before_step(self) -> None:
        """See `Tuner.before_step`; once the plan is over, drop the gradients: a step changes nothing."""
        if self.tuner.done:
            self.tuner.optimizer.zero_grad(set_to_none=True)
        else:
            self.tuner.before_step()

    def after_step(self) -> None:
        """See `Tuner.after_step`."""
        if not self.tuner.done:
            self.tuner.after_step()
        if not self._waits:
            self._end_counted()

    def take(self, metric: float) -> None:
        """Keep the metric for the end of the epoch; that is now, where its steps are counted here."""
        self.metric = metric
        self._end_counted()

    def _end_counted(self) -> None:
        if self._counts and self.tuner.step_in_epoch >= self.tuner.steps_per_epoch:
            self.end_epoch()

    def end_epoch(self) -> None:
        """End the epoch with the metric that came in during it."""
        if not self.tuner.done and self.tuner.step_in_epoch > 0:
            self.tuner.end_epoch(self.metric, mode=self.mode)
        self.metric = None

    def rates(self) -> dict[str, Any]:
        """Return the rates for the framework's log."""
        return {f"lr/{name}": rate for name, rate in self.tuner.rates().items()}
