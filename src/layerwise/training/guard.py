"""What stops a run, told clearly: Ctrl-C between two steps, a loss that is not finite, no memory left."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.cache.replay.ghost import Ghost
from layerwise.errors import ModelError, RunError, TrainingError, first_line, plural, shorten
from layerwise.files import FULL
from layerwise.layers.isolation import require_module
from layerwise.layers.structures import tensors_in
from layerwise.training.checkpoint import list_checkpoints, resume_command
from layerwise.training.options import Precision

_UNWRITABLE = (*FULL, errno.EROFS)

_ONE_SAMPLE = "Expected more than 1 value per channel when training"
"""How torch's batch-norm begins its complaint of a batch without a variance."""

_WORKER_GONE = re.compile(r"DataLoader worker \(pid.* (is killed by signal|exited unexpectedly)")
"""How torch tells that a process of a loader is gone."""


class Interrupt:
    """Turns the first Ctrl-C into a request that the loop answers between two steps.

    So the checkpoint that it then writes is of a whole step; in validation it is that of the whole epoch. The
    second Ctrl-C interrupts at once.
    Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested = self._told = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def tell_what_is_waited_for(self, say: Callable[[str], object]) -> None:
        """Say once, if Ctrl-C was pressed, that the run stops after the validation at hand."""
        if self.requested and not self._told:
            self._told = True
            say("Ctrl-C: the validation of this epoch is finished first, and saved; once more stops at once")

    def raise_if_requested(self, told: str = "") -> None:
        """Raise `KeyboardInterrupt` with the message `told` if Ctrl-C was pressed."""
        if self.requested:
            raise KeyboardInterrupt(told)


def finite_loss(
    loss: Tensor,
    batch: Any,
    *,
    step: int,
    epoch: int,
    index: int,
    out: Path | None,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
) -> float:
    """Return a loss as a number.

    On a GPU this waits for the batch to be computed, which is the price of naming the step. `precision` and
    `clip_norm` are the run's, so that the message does not propose what is in use.

    Raises:
        TrainingError: it is NaN or infinite; the step and the last checkpoint are named.
    """
    value = float(loss.detach())
    if math.isfinite(value):
        return value
    remedies = ["lower lr", _clipping(clip_norm), "add warm-up to the plan's schedule"]
    remedies += [] if precision == "fp32" else ["use precision='fp32'"]
    cause = (
        "The batch itself holds values that are not finite: look at the data."
        if not all(map(_is_finite, tensors_in(batch)))
        else f"The batch is finite, so training diverged: {', '.join(remedies[:-1])}, or {remedies[-1]}."
    )
    raise TrainingError(
        f"the loss became {value} at step {step + 1} (epoch {epoch + 1}, batch {index + 1}), before the "
        f"weights were changed by it. {cause} {_last_checkpoint(out, remedied=True)}"
    )


def require_values(model: nn.Module) -> None:
    """Raise `ModelError` for what is no model, or has tensors on the meta device, which keeps no values."""
    require_module(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if without := [name for name, tensor in tensors if tensor.is_meta]:
        raise ModelError(
            f"{plural(len(without), 'tensor')} of the model ({shorten(without)}) on the meta device hold no "
            "values; expected weights to train. Load them: model.load_state_dict(state, assign=True), or "
            "make room for new ones (to_empty) and initialise them."
        )


def check_start(model: nn.Module) -> None:
    """Raise `TrainingError` if a parameter is not finite before training, so that no run is begun with it."""
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise TrainingError(
                f"parameter {name!r} of the model holds values that are not finite, before any training. "
                "Look at the weights that were loaded into it."
            )


def check_weights(model: nn.Module, *, step: int, out: Path | None, clip_norm: float | None = None) -> None:
    """Raise `TrainingError` if a trainable parameter is not finite, so that nothing keeps it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_finite(parameter):
            raise TrainingError(
                f"parameter {name!r} holds values that are not finite after step {step}. Lower lr or "
                f"{_clipping(clip_norm)}. {_last_checkpoint(out, remedied=True)}"
            )


def _clipping(clip_norm: float | None) -> str:
    return "set clip_norm=1.0" if clip_norm is None else f"set clip_norm below {clip_norm:g}"


@contextlib.contextmanager
def explained(steps: Callable[[], int], *, out: Path | None, precision: Precision = "fp32") -> Iterator[None]:
    """Turn what torch tells tersely in the body into an error of ours that names the step.

    That is: running out of memory or of disk, a process that loads samples gone, and a batch of one sample in
    batch-norm over vectors.

    Args:
        steps: called for the number of optimiser steps made so far.
        out: the run's folder.
        precision: of the run, so that its own is not proposed.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise RunError(
            f"writing failed after step {steps()}: {error}. Make room on the disk. {_last_checkpoint(out)}"
        ) from error
    except ValueError as error:
        if _ONE_SAMPLE not in str(error):
            raise
        raise TrainingError(
            f"the batch of step {steps() + 1} holds one sample, and batch-norm over vectors cannot train on "
            f"one ({error}). Leave out a smaller last batch with drop_last=True (--drop-last, or the "
            f"loader's own), or take another batch_size. {_last_checkpoint(out, remedied=True)}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if _WORKER_GONE.match(str(error)):
            raise TrainingError(
                f"a process that loads samples ended after step {steps()}: {str(error).strip(' .')}. The "
                "system ends one when memory is short: take fewer workers (--workers). What it said itself "
                f"stands above. {_last_checkpoint(out)}"
            ) from error
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (out_of_memory or should_reduce_batch_size(error)):
            raise
        less = "a plan that trains less, or precision='bf16'"
        less = less if precision == "fp32" else "or a plan that trains less"
        raise TrainingError(
            f"memory ran out at step {steps() + 1} ({first_line(error)}). "
            f"Take a smaller batch_size and raise accumulate by the same factor, {less}, in a new run. "
            f"{_last_checkpoint(out)}"
        ) from error


def _last_checkpoint(out: Path | None, *, remedied: bool = False) -> str:
    """Return where the last checkpoint is, and how to go on; `remedied` where that needs other settings."""
    if out is None:
        return "No checkpoint was kept, since the run has no folder (out=)."
    there = list_checkpoints(out / "checkpoints")
    if not there:
        return f"{out} has no checkpoint yet."
    last = f"The last good checkpoint is {there[-1]}"
    if remedied:
        return f"{last}; a resumed run keeps its settings and data, so begin a new one with others (--out)."
    return f"{last}; go on from it: {resume_command(out)}"


def _is_finite(tensor: Tensor) -> bool:
    if isinstance(tensor, Ghost):  # an input whose prefix is cached: its value was looked at before
        return True
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
