"""Devices, precision, trackers and several processes: what `fit` asks of accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import TrainingError
from layerwise.layers.devices import widest_float
from layerwise.training.options import PRECISIONS, Precision

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_trackers(trackers: str | Sequence[str] | None) -> None:
    """Look whether the trackers are there.

    Raises:
        TrainingError: a tracker's package is not installed (accelerate itself would leave it out).
    """
    from accelerate.tracking import get_available_trackers

    wanted = [trackers] if isinstance(trackers, str) else list(trackers or ())
    ready = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if missing := [name for name in wanted if name not in (*ready, "all")]:
        raise TrainingError(
            f"tracker {', '.join(map(repr, missing))} is not known, or its package is not installed (ready: "
            f"{', '.join(ready) or 'none'}). Install the package of that name, or leave trackers out: "
            "history.jsonl holds the same numbers."
        )


def open_accelerator(
    precision: Precision,
    device: Literal["auto", "cpu"],
    trackers: str | Sequence[str] | None,
    out: Path | None,
) -> Accelerator:
    """Return accelerate's object for devices, precision, processes and trackers.

    Raises:
        TrainingError: a tracker's package is not installed (accelerate itself would leave it out).
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    check_trackers(trackers)
    shared = AcceleratorState._shared_state  # one for the whole process, so two runs must agree or reset it
    if shared and shared.get("_mixed_precision") != PRECISIONS[precision]:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[precision],
        cpu=device == "cpu",
        log_with=trackers,
        project_dir=None if out is None else str(out),
    )
    if trackers is not None:
        accelerator.init_trackers("layerwise")
    return accelerator


def joined(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Return a wrapper that averages the gradients of all processes, of the parameters that learn now.

    Not accelerate's ``prepare_model``: that also puts autocast and casts into the model's own ``forward``,
    once more at each phase, and leaves them there.
    """
    device = accelerator.device
    return nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device; its float64 numbers in the widest type that there is.

    A loader makes float64 of Python's numbers, and Apple's GPUs have none.
    """
    from accelerate.utils import recursively_apply, send_to_device

    widest = widest_float(device)
    if widest != torch.float64:
        batch = recursively_apply(
            lambda tensor: tensor.to(widest) if tensor.dtype == torch.float64 else tensor, batch
        )
    return send_to_device(batch, device)


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the value of each process, in order of rank."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([value])
    return gathered


def sum_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Return each value summed over all processes."""
    if accelerator.num_processes == 1:
        return list(values)
    summed: Tensor = accelerator.reduce(
        torch.tensor(values, dtype=torch.float64, device=accelerator.device), reduction="sum"
    )
    return [float(value) for value in summed]
