"""A dry run: what would learn when, how long an epoch would take, and in how much memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count, cycle, islice
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerwise.layers.devices import clock_s
from layerwise.layers.layermap import LayerMap
from layerwise.layers.randomness import kept_random_state
from layerwise.plans.explain import explain
from layerwise.plans.explanation import Explanation
from layerwise.plans.plan import Plan
from layerwise.training import setup
from layerwise.training.data import Batches, open_batches
from layerwise.training.evaluate import first_output
from layerwise.training.guard import require_values
from layerwise.training.key_cache import without_key_cache
from layerwise.training.memory import peak_memory
from layerwise.training.options import find_optimizer
from layerwise.training.processes import open_accelerator, to_device
from layerwise.training.progress import format_seconds
from layerwise.training.tasks import Task, split_batch
from layerwise.tuning.matching import constants_of, layers_for
from layerwise.tuning.tuner import Tuner

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

MEASURED_STEPS = 2
"""Steps that are timed in each phase, after one that is not."""


@dataclass(frozen=True)
class PhaseCost:
    """What one phase costs, measured.

    Attributes:
        name: of the phase.
        trainable: scalars that learn, norms that follow a policy included.
        step_s: seconds of one optimiser step, its batches loaded; not of a smaller last one.
        epoch_s: seconds of one epoch of training and validation, as many for each sample as in the step.
        peak_bytes: highest use of memory in a step (see `layerwise.training.memory`).
    """

    name: str
    trainable: int
    step_s: float
    epoch_s: float
    peak_bytes: int


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found; print it, or take `to_dict`.

    Attributes:
        explanation: the timeline and the heat map.
        costs: of each phase.
        total_s: estimated seconds of the whole plan.
        steps_per_epoch: optimiser steps.
        exact_memory: whether the peak is of the measured step alone.
        device: where it was measured.
    """

    explanation: Explanation
    costs: tuple[PhaseCost, ...]
    total_s: float
    steps_per_epoch: int
    exact_memory: bool
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "plan": self.explanation.to_dict(),
            "costs": [asdict(cost) for cost in self.costs],
            "total_s": self.total_s,
            "steps_per_epoch": self.steps_per_epoch,
            "exact_memory": self.exact_memory,
            "device": self.device,
        }

    def __rich__(self) -> Group:
        """Return the timeline, the heat map and the measured costs."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("phase")
        for name in ("trainable parameters", "time per epoch", "peak memory"):
            table.add_column(name, justify="right")
        for number, cost in enumerate(self.costs):
            table.add_row(
                f"{number + 1} {cost.name}",
                f"{cost.trainable:,}",
                format_seconds(cost.epoch_s),
                f"{'' if self.exact_memory else '<= '}{cost.peak_bytes / 2**20:,.0f} MiB",
            )
        measured = "the whole process" if self.device == "cpu" else "torch's tensors"
        note = (
            f"measured on {self.device}: {MEASURED_STEPS} steps a phase, with loading, without a cache; the "
            f"whole plan takes about {format_seconds(self.total_s)}. Memory is that of {measured}."
        )
        return Group(self.explanation, table, Text(note, style="dim"))


@kept_random_state()
def dry_run(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    plan: Plan,
    layers: LayerMap,
    lr: float = 1e-3,
    optimizer: Any = "adamw",
    weight_decay: float | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    task: Task | Literal["auto"] = "auto",
    classes: Sequence[str] | None = None,
    batch_size: int = 32,
    drop_last: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    precision: Any = "fp32",
    class_weights: Literal["balanced"] | Sequence[float] | None = None,
    sampler: Literal["weighted"] | None = None,
    label_smoothing: float = 0.0,
    device: Any = "auto",
    **_other: Any,
) -> DryRun:
    """Return what `fit` with the same arguments would do, measured on a few steps of each phase.

    Each phase is carried out for three steps on a copy of the model, the last two are timed. So it takes a
    second copy of the model in memory, and about three steps for each phase. The model, its modes and the
    random state are as before afterwards.

    Args:
        model: as for `layerwise.fit`, as all others that are not named here.
        train: likewise.
        val: likewise; one batch of it is timed.
        plan: likewise.
        layers: the model's layer map at the plan's granularity.
        lr: likewise.
        optimizer: likewise.
        weight_decay: likewise.
        optimizer_options: likewise.
        task: likewise.
        classes: likewise.
        batch_size: likewise.
        drop_last: likewise.
        accumulate: likewise.
        seed: likewise.
        precision: likewise.
        class_weights: likewise.
        sampler: likewise.
        label_smoothing: likewise.
        device: likewise.
        _other: further options of `fit`, which cost next to nothing; and `workers`, as loading is measured in
            this process.

    Raises:
        LayerwiseError: as `layerwise.fit` would before training.
    """
    require_values(model)
    accelerator = open_accelerator(precision, device, None, None)
    share: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    share |= {} if task == "auto" else {"collate": task.collate}
    weighted = sampler == "weighted"
    batches = open_batches(train, train=True, weighted=weighted, drop_last=drop_last, **share)
    held_out = None if val is None else open_batches(val, train=False, **share)
    first = setup.first_batch(batches)
    task = setup.find_task(
        model,
        batches,
        first,
        task=task,
        classes=classes,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
    )
    steps_per_epoch = -(-setup.batch_count(batches) // accumulate)
    factory, options, _ = find_optimizer(optimizer, optimizer_options, device=accelerator.device)
    args, kwargs, _ = split_batch(first)
    costs, exact = [], True
    for phase in plan.phases:
        tried = copy.deepcopy(model).to(accelerator.device)
        layers = layers_for(tried, plan, layers, None)
        held = constants_of(tried, layers)
        tuner = Tuner(
            tried,
            Plan(strategy=plan.strategy, granularity=plan.granularity, groups=plan.groups, phases=(phase,)),
            factory,
            lr=lr,
            steps_per_epoch=steps_per_epoch,
            layers=layers,
            example_input=kwargs or args,
            weight_decay=weight_decay,
            **options,
        )
        next(tuner.epochs())
        tried.train()
        with peak_memory(accelerator.device) as peak, without_key_cache(tried):
            timed = _timed_steps(tried, tuner, batches, task, accelerator, accumulate=accumulate)
        exact &= peak.exact
        samples = max(size for _, size in timed[1:] or timed)
        step_s = min(seconds for seconds, size in timed[1:] or timed if size == samples)
        validation_s = 0.0
        if held_out is not None:
            began_s = clock_s(accelerator.device)
            batch = to_device(next(held_out.epoch(0)), accelerator.device)
            first_output(tried, task.forward, batch)
            sizes = _batch_sizes(held_out)
            validation_s = (clock_s(accelerator.device) - began_s) / sizes[0] * sum(sizes)
        costs.append(
            PhaseCost(
                name=phase.name,
                trainable=sum(p.numel() for p in tried.parameters() if p.requires_grad),
                step_s=step_s,
                epoch_s=step_s / samples * sum(_batch_sizes(batches)) + validation_s,
                peak_bytes=peak.bytes,
            )
        )
        del tried, tuner
    epochs = [phase.length_steps(steps_per_epoch) / steps_per_epoch for phase in plan.phases]
    return DryRun(
        explanation=explain(plan, layers, lr=lr, steps_per_epoch=steps_per_epoch, held=held),
        costs=tuple(costs),
        total_s=sum(cost.epoch_s * count for cost, count in zip(costs, epochs)),
        steps_per_epoch=steps_per_epoch,
        exact_memory=exact,
        device=str(accelerator.device),
    )


def _timed_steps(
    model: nn.Module, tuner: Tuner, batches: Batches, task: Task, accelerator: Accelerator, *, accumulate: int
) -> list[tuple[float, int]]:
    """Return the seconds and the samples of each of the first few optimiser steps of a phase.

    A tiny data set is repeated.
    """
    timed: list[tuple[float, int]] = []
    sizes = cycle(_batch_sizes(batches))
    stream = chain.from_iterable(batches.epoch(0) for _ in count())
    while len(timed) <= MEASURED_STEPS and not tuner.done:
        began_s = clock_s(accelerator.device)
        for batch in islice(stream, accumulate):
            batch = to_device(batch, accelerator.device)
            with accelerator.autocast():
                loss = task.loss(task.forward(model, batch), batch)
            accelerator.backward(loss / accumulate)
        tuner.step()
        timed.append((clock_s(accelerator.device) - began_s, sum(islice(sizes, accumulate))))
    return timed


def _batch_sizes(batches: Batches) -> list[int]:
    """Return the samples of each batch of epoch 0, which the last one may have fewer of.

    The batches of a loader of the caller's own are taken for equal: 1 each.
    """
    batches.begin(0)
    order = batches.loader.batch_sampler
    return [len(batch) for batch in order] if batches.exact and order else [1] * len(batches)
