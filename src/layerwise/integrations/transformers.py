"""Hugging Face: a ``TrainerCallback`` that carries a plan out in ``Trainer.train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from layerwise.errors import MissingExtraError, ModelError
from layerwise.integrations.framework import Driver
from layerwise.tuning.stall import Mode
from layerwise.tuning.tuner import Tuner

if TYPE_CHECKING:
    _Base: Any = object
    from transformers.trainer_utils import has_length
else:
    try:
        from transformers import TrainerCallback as _Base
        from transformers.trainer_utils import has_length
    except ImportError as error:
        raise MissingExtraError("transformers", "text", "layerwise.integrations.transformers") from error


class RatesOfPlan:
    """Stands where Trainer wants a scheduler, and leaves the rates to the Tuner."""

    def __init__(self, tuner: Tuner) -> None:
        self.optimizer = tuner.optimizer
        self._layers = tuner.layers

    def step(self, *_: Any) -> None:
        """Do nothing: the Tuner has set the rates."""

    def get_last_lr(self) -> list[float]:
        """Return the rates of the param groups, the head's first, for Trainer's log."""
        groups = self.optimizer.param_groups
        return [
            float(group["lr"])
            for group in sorted(groups, key=lambda group: self._layers.depth_of(group["layer_group"]))
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the Tuner's state is in the optimiser's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class TunerCallback(_Base):  # type: ignore[misc]
    """Drives a `Tuner` in Trainer's loop: phases, rates, norms; through DDP and resume.

        tuner = layerwise.Tuner(model, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=steps)
        callback = TunerCallback(tuner)
        trainer = Trainer(model, arguments, optimizers=callback.optimizers, callbacks=[callback], ...)

    Trainer calls ``model.train()`` before every step; frozen groups stay in eval mode all the same. The
    Tuner's state is saved inside the optimiser's, so ``train(resume_from_checkpoint=True)`` goes on in the
    phase that was interrupted. ``steps_per_epoch`` counts optimiser steps:
    ``ceil(len(data) / (batch size * processes * gradient_accumulation_steps))``; of a stream without length
    it is what you call an epoch.

    The statistics of the norm policy ``"calibrate"`` are not measured here: call
    `layerwise.calibrate_batchnorm` at the start of the phase, with ``names=tuner.norms.calibrating``.

    Args:
        tuner: made for Trainer's model.
        metric: name of an evaluation metric (``"eval_accuracy"``; of one of several data sets
            ``"eval_NAME_accuracy"``), for plans that wait for it to stall.
        mode: whether more of it is better.

    Attributes:
        optimizers: for Trainer's argument of that name: the Tuner's optimiser, and a scheduler that leaves
            the rates alone.
    """

    def __init__(self, tuner: Tuner, *, metric: str | None = None, mode: Mode = "max") -> None:
        self.tuner = tuner
        self._metric = metric
        self._driver = Driver(tuner, mode, waits=metric is not None)
        self.optimizers: tuple[torch.optim.Optimizer, Any] = (tuner.optimizer, RatesOfPlan(tuner))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before Trainer wraps the model for several processes: show all that will ever learn."""
        if args.world_size > 1:
            self._driver.before_wrapping()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After wrapping and loading: what learns in this phase, and checks."""
        self._driver.after_wrapping(kwargs["model"])
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "optimizer", optimizer) is not self.tuner.optimizer:
            raise ModelError(
                f"Trainer steps an optimizer of its own ({type(optimizer).__name__}), not the Tuner's. Pass "
                "optimizers=callback.optimizers to Trainer."
            )
        loader = kwargs["train_dataloader"]
        per_epoch = -(-len(loader) // args.gradient_accumulation_steps) if has_length(loader) else None
        self._driver.check_length(state.max_steps, per_epoch, "Trainer")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the Tuner's epoch; end the last one, where no evaluation came."""
        self._driver.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the Tuner's epoch where Trainer did not say so; see `Driver.begin_batch`."""
        self._driver.begin_batch()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check and regularise while the gradients are there."""
        self._driver.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on; stop where the plan is over."""
        self._driver.after_step()
        control.should_training_stop = control.should_training_stop or self.tuner.done

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Take the metric in; other data sets' evaluations, by whose names Trainer begins theirs, pass."""
        if self._metric is None or metrics is None:
            return
        if self._metric in metrics:
            self._driver.take(float(metrics[self._metric]))
            self._end_epoch(control)
        elif "eval_runtime" in metrics:
            raise ModelError(
                f"metric={self._metric!r} is not among the evaluation metrics ({', '.join(metrics)})."
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the Tuner's epoch, unless an evaluation is still to come that it waits for."""
        if self._metric is None:
            self._end_epoch(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the last epoch, where no evaluation came."""
        self._end_epoch(control)

    def _end_epoch(self, control: Any) -> None:
        if self.tuner.step_in_epoch >= self.tuner.steps_per_epoch:
            self._driver.end_epoch()
        control.should_training_stop = control.should_training_stop or self.tuner.done
