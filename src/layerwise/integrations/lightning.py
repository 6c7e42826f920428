"""Lightning: a callback that carries a plan out in ``Trainer.fit``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler

from layerwise.cache.samples.prepared import is_stand_in
from layerwise.errors import MissingExtraError, ModelError
from layerwise.integrations.framework import Driver
from layerwise.tuning.modes import asked_modes, note_modes
from layerwise.tuning.stall import Mode
from layerwise.tuning.tuner import Tuner

if TYPE_CHECKING:
    _Base: Any = object
    CombinedLoader: Any = object
else:
    try:
        from lightning.pytorch import Callback as _Base
        from lightning.pytorch.utilities import CombinedLoader
    except ImportError as error:
        raise MissingExtraError("lightning", "lightning", "layerwise.integrations.lightning") from error


def _check_overfitted(trainer: Any) -> None:
    """Refuse a cache's loader that shuffles: Lightning would make it anew, in sequence, and cannot.

    Loaders that hooks of the module return are not known yet; Lightning's own error names them.

    Raises:
        ModelError: there is one.
    """
    for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop):
        given = getattr(getattr(loop, "_data_source", None), "instance", None)
        if given is None or hasattr(given, "train_dataloader"):  # a module or a data module
            continue
        for loader in _of_caches(given):
            if not isinstance(loader.sampler, SequentialSampler):
                sampler = type(loader.sampler).__name__
                raise ModelError(
                    f"overfit_batches={trainer.overfit_batches} turns shuffling off, which Lightning cannot "
                    f"do in a cache's loader (its sampler is a {sampler}). Give the cache a loader that "
                    "does not shuffle: cache.as_loader(DataLoader(data, batch_size))."
                )


def _check_sharded(loaders: Any) -> None:
    """Refuse a cache's loader that gives every process all samples: Lightning cannot put a sampler into it.

    Raises:
        ModelError: there is one.
    """
    for loader in _of_caches(loaders):
        if isinstance(loader.sampler, RandomSampler | SequentialSampler):
            raise ModelError(
                f"each process would train on all {len(loader.dataset):,} samples: Lightning gives each one "
                "its share of a plain loader, and cannot of a cache's. Have the module's train_dataloader "
                "return cache.as_loader(DataLoader(data, batch_size, sampler=DistributedSampler(data)))."
            )


def _of_caches(loaders: Any) -> list[Any]:
    """Return those of some loaders that a `layerwise.PrefixCache` made."""
    return [loader for loader in CombinedLoader(loaders).flattened if is_stand_in(loader)]


class TunerCallback(_Base):  # type: ignore[misc]
    """Drives a `Tuner` in Lightning's loop: phases, rates, norms; through DDP and resume.

    The module's ``configure_optimizers`` returns the Tuner's optimiser, and no scheduler:

        tuner = layerwise.Tuner(module.net, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=len(loader))
        module.tuner = tuner                   # configure_optimizers: return self.tuner.optimizer
        trainer = Trainer(max_epochs=tuner.total_epochs, callbacks=[TunerCallback(tuner)])

    Frozen groups stay in eval mode whatever Lightning does to modes. The Tuner's state is saved inside the
    optimiser's, so ``fit(ckpt_path=...)`` resumes in the phase that was interrupted, with its moments.
    With ``overfit_batches=n`` an epoch has n batches; what a cache makes of a loader may not shuffle then.
    With DDP use ``strategy="ddp_find_unused_parameters_true"``; what will learn later is known to it from the
    start. A cache's loader then needs a ``DistributedSampler`` of its own. Automatic optimisation with one
    optimiser only.

    The statistics of the norm policy ``"calibrate"`` are not measured here: call
    `layerwise.calibrate_batchnorm` at the start of the phase, with ``names=tuner.norms.calibrating``.

    Args:
        tuner: made from the module, or the part of it, that the plan is about.
        monitor: name of a logged validation metric, for plans that wait for validation to stall.
        mode: whether more of it is better.
        log_rates: log the rate of each layer group.
    """

    def __init__(
        self, tuner: Tuner, *, monitor: str | None = None, mode: Mode = "max", log_rates: bool = False
    ) -> None:
        self.tuner = tuner
        self._monitor = monitor
        self._log_rates = log_rates
        self._driver = Driver(tuner, mode, waits=monitor is not None)
        self._steps = 0
        self._asked: dict[torch.nn.Module, bool] = {}  # modes outside of validation, held modules' too

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the strategy wraps the model: let it see everything that will ever learn."""
        self._asked = asked_modes(pl_module)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ModelError(
                "the module has automatic_optimization=False; TunerCallback cannot see when it steps. Call "
                "tuner.step() in training_step instead of optimizer.step(), without the callback."
            )
        self._driver.before_wrapping()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """After wrapping: what learns in this phase, and checks."""
        self._driver.after_wrapping(trainer.strategy.model)
        held = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        if len(held) != 1 or held[0] is not self.tuner.optimizer:
            raise ModelError(
                f"configure_optimizers returned {len(held)} optimizers that are not the Tuner's; return "
                "tuner.optimizer (and no scheduler, the plan has its own)."
            )
        if trainer.lr_scheduler_configs:
            raise ModelError(
                "configure_optimizers returned a scheduler, which would overwrite the plan's rates. Return "
                "tuner.optimizer alone, and put the schedule into the plan."
            )
        if trainer.overfit_batches > 0:
            _check_overfitted(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compare the lengths of Lightning's loop and the plan; look at what a cache's loader gives."""
        if trainer.world_size > 1:
            _check_sharded(trainer.train_dataloader)
        self._steps = trainer.global_step
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        per_epoch = None if math.isinf(batches) else -(-batches // accumulated)
        limits = [trainer.max_steps, (per_epoch or math.inf) * (trainer.max_epochs or -1)]
        steps = min((limit for limit in limits if limit >= 0), default=math.inf)
        if not trainer.fast_dev_run:
            self._driver.check_length(steps, per_epoch, "Lightning's Trainer")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the Tuner's epoch, or stop where the plan is over."""
        self._asked = asked_modes(pl_module)
        self._driver.begin_epoch()
        trainer.should_stop = trainer.should_stop or self.tuner.done

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the Tuner's epoch where Lightning did not say so; see `Driver.begin_batch`."""
        self._driver.begin_batch()

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check and regularise while the gradients are there."""
        self._driver.before_step()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on if the optimiser stepped in this batch."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        if self._log_rates:
            pl_module.log_dict(self._driver.rates())
        self._driver.after_step()
        trainer.should_stop = trainer.should_stop or self.tuner.done

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the metric in; Lightning then puts back the modes that it saw."""
        note_modes(self._asked)
        if self._monitor is None or trainer.sanity_checking:
            return
        if self._monitor not in trainer.callback_metrics:
            raise ModelError(
                f"monitor={self._monitor!r} was not logged; logged are "
                f"{', '.join(trainer.callback_metrics) or 'none'}. Log it in validation_step with self.log."
            )
        self._driver.take(float(trainer.callback_metrics[self._monitor]))
        trainer.should_stop = trainer.should_stop or self.tuner.done

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """As after validation."""
        note_modes(self._asked)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """As after validation."""
        note_modes(self._asked)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End the Tuner's epoch, after validation; stop where the plan is over."""
        if not trainer.fast_dev_run:  # a few batches, and no epoch
            self._driver.end_epoch()
        trainer.should_stop = trainer.should_stop or self.tuner.done

    def state_dict(self) -> dict[str, Any]:
        """Return the metric of an epoch that validation has seen and nobody has ended."""
        return {"metric": self._driver.metric}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back; the rest is in the optimiser's state."""
        self._driver.metric = state_dict["metric"]
