"""`Result`: what a run came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from layerwise.errors import plural
from layerwise.shown import Shown
from layerwise.training.tasks import Task


@dataclass
class Result(Shown):
    """What a run came to.

    Attributes:
        model: the model that was given, now with the kept weights (see `fit`, `keep`).
        task: what its outputs mean, with the names of the classes.
        history: one mapping for each epoch: losses, metrics, phase, rates, steps.
        best_epoch: number of the epoch whose weights were kept, from 0.
        metrics: validation metrics of that epoch; empty without validation data.
        tables: its per-class table and confusion matrix.
        test: metrics on the test data with the kept weights; None without test data.
        test_tables: the same as tables.
        stopped: ``"finished"``, or ``"early"`` where early stopping ended the run.
        trained_parameters: scalars that learned in at least one phase.
        total_parameters: scalars of the whole model, shared ones counted once.
        steps: optimiser steps made.
        seconds: of training and validation, over all sittings of a resumed run.
        out: the run's folder, or None.
        notes: what was chosen or met on the way, for people.
    """

    model: nn.Module = field(repr=False)
    task: Task
    history: list[dict[str, Any]] = field(repr=False)
    best_epoch: int
    metrics: dict[str, float]
    tables: dict[str, Any]
    test: dict[str, float] | None
    test_tables: dict[str, Any]
    stopped: Literal["finished", "early"]
    trained_parameters: int
    total_parameters: int
    steps: int
    seconds: float
    out: Path | None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        ended = "stopped early" if self.stopped == "early" else "finished"
        lines = [
            f"{ended} after {plural(len(self.history), 'epoch')}, {plural(self.steps, 'step')}, "
            f"{self.seconds:.0f} s",
            f"{self.trained_parameters:,} of {self.total_parameters:,} parameters trained",
        ]
        for data, metrics in (("validation", self.metrics), ("test", self.test or {})):
            if metrics:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                lines.append(f"{data}, weights of epoch {self.best_epoch + 1}: {figures}")
        return "\n".join([*lines, *self.notes, *([f"in {self.out}"] if self.out else [])])

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model and the history as plain data, for JSON."""
        return {
            "best_epoch": self.best_epoch,
            "metrics": self.metrics,
            "tables": self.tables,
            "test": self.test,
            "test_tables": self.test_tables,
            "stopped": self.stopped,
            "trained_parameters": self.trained_parameters,
            "total_parameters": self.total_parameters,
            "epochs": len(self.history),
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "out": None if self.out is None else str(self.out),
            "notes": list(self.notes),
        }
