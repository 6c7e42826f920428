"""Progress on stderr: a live bar in a terminal, one line an epoch elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from layerwise.errors import figure


class _Bar(Progress):
    """A bar, and a line below it: both on one would leave no room for the bar in 80 columns."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, no_wrap=True, overflow="ellipsis")


class Reporter:
    """Tells a person how a run goes.

    In a terminal: one bar over all steps of the run, and below it phase, loss, metric and rates. Elsewhere
    (a log file, CI): one line at the end of each epoch. Never on stdout, which belongs to results.

    Args:
        enabled: False says nothing at all.
        total_steps: optimiser steps of the whole plan.
        total_epochs: epochs of the whole plan.
        done_steps: steps that a resumed run has behind it.
        console: where to write; None is stderr.
    """

    def __init__(
        self,
        *,
        enabled: bool,
        total_steps: int,
        total_epochs: int,
        done_steps: int = 0,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.enabled, self.total_epochs = enabled, total_epochs
        self._monitor = ""
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        if enabled and self.console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("starting", total=total_steps, completed=done_steps)

    def __enter__(self) -> Reporter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print one line, above the bar where there is one."""
        if self.enabled:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def step(self, *, epoch: int, phase: str, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """Show where the run is after an optimiser step."""
        if self._bar is not None:
            parts = [phase, f"loss {figure(loss)}", self._monitor, f"lr {format_rates(rates)}"]
            self._bar.status = "  ".join(filter(None, parts))
            self._bar.update(self._task, completed=step, description=f"epoch {epoch + 1}/{self.total_epochs}")

    def epoch(self, entry: Mapping[str, Any], *, monitor: str, steps_left: int, seconds: float) -> None:
        """Print the line of a finished epoch."""
        if monitor in entry:
            self._monitor = f"{monitor} {figure(entry[monitor])}"
        left_s = steps_left * seconds / max(entry["steps"], 1)
        parts = [
            f"epoch {entry['epoch'] + 1}/{self.total_epochs}",
            f"phase {entry['phase']}",
            f"loss {figure(entry['train_loss'])}",
        ]
        parts += [f"val_loss {figure(entry['val_loss'])}"] if "val_loss" in entry else []
        parts += [self._monitor] if monitor in entry and monitor != "val_loss" else []
        parts += [f"lr {format_rates(entry['rates'])}", f"{seconds:.1f} s"]
        parts += [f"{format_seconds(left_s)} left"] if steps_left else []
        self.say("  ".join(parts))


def format_rates(rates: Mapping[str, float]) -> str:
    """Return the learning rates of what trains, as one number or as lowest to highest.

    >>> format_rates({"stem": 0.0, "layer4": 5e-4, "fc": 1e-3})
    '5.0e-04..1.0e-03'
    >>> format_rates({"fc": 1e-3})
    '1.0e-03'
    """
    live = sorted({rate for rate in rates.values() if rate > 0})
    if not live:
        return "0"
    return f"{live[0]:.1e}" if len(live) == 1 else f"{live[0]:.1e}..{live[-1]:.1e}"


def format_seconds(seconds: float) -> str:
    """Return a time for people.

    >>> format_seconds(7), format_seconds(75), format_seconds(3700)
    ('7 s', '1 min 15 s', '1 h 01 min')
    """
    whole = max(0, math.ceil(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
