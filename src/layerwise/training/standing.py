"""`Standing`: where a run stands, apart from what model, tuner and history know; saved in each checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.files import sha256
from layerwise.training.tasks import Scores


@dataclass
class EpochAtHand:
    """How far the running epoch is.

    Attributes:
        epoch: its number, from 0; -1 before the first.
        phase: name of the phase in which it began.
        batch: batches of it that were trained on.
        loss_sum: their losses, each times its size.
        samples: in them, or over how many tokens or weights the losses are means.
    """

    epoch: int = -1
    phase: str = ""
    batch: int = 0
    loss_sum: float = 0.0
    samples: float = 0

    def add(self, loss: float, size: float) -> None:
        """Count one more batch, whose mean loss is one over `size`."""
        self.batch += 1
        self.loss_sum += loss * size
        self.samples += size


@dataclass
class Best:
    """The epoch whose weights are kept.

    Attributes:
        epoch: its number; -1 if there is none yet.
        value: of the task's monitor; None if nothing is measured.
        metrics: by name.
        tables: by name.
        sha256: of the file of its weights, as this process wrote it; None without one, and in checkpoints
            of older versions.
    """

    epoch: int = -1
    value: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @classmethod
    def of(cls, epoch: int, monitor: str, scores: Scores) -> Best:
        """Return that of an epoch that was validated."""
        return cls(epoch, scores.values.get(monitor), scores.values, scores.tables)


@dataclass
class Standing:
    """Where a run stands.

    Attributes:
        within: the running epoch.
        began_random: state of the global generators when it began.
        best: the epoch whose weights are kept.
        kept: its weights, of a run without a folder.
        timings: seconds of each epoch.
        stopped_early: the run is over before its plan is.
    """

    within: EpochAtHand = field(default_factory=EpochAtHand)
    began_random: dict[str, Any] | None = None
    best: Best = field(default_factory=Best)
    kept: dict[str, Tensor] | None = None
    timings: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False

    def begin(self, epoch: int, phase: str, random: dict[str, Any]) -> None:
        """Begin an epoch, unless a checkpoint of within it was loaded.

        Args:
            epoch: its number.
            phase: name of the present phase.
            random: state of the global generators.
        """
        if self.within.epoch != epoch:
            self.within, self.began_random = EpochAtHand(epoch, phase), random

    def to_state(self, *, inside: bool, with_random: bool) -> dict[str, Any]:
        """Return it as plain data.

        Args:
            inside: the running epoch is not over.
            with_random: the order of its samples depends on the generators.
        """
        return {
            "within": dataclasses.asdict(self.within) if inside else None,
            "epoch_random": self.began_random if inside and with_random else None,
            "best": dataclasses.asdict(self.best),
            "timings": self.timings,
            "stopped_early": self.stopped_early,
        }

    def forget_lost_weights(self, weights: Path) -> str:
        """Forget the best epoch if the file of its weights is another one than it should be; say so.

        So it is where a run was killed after writing a new best epoch's weights, before its checkpoint. That
        epoch comes again.

        Args:
            weights: the file.

        Returns:
            What to tell the user; ``""`` where nothing is lost.
        """
        known = self.best.sha256
        if known is None or (weights.is_file() and sha256(weights) == known):
            return ""
        self.best = Best()
        return (
            f"{weights} is not what the checkpoint knows (the run was killed while it wrote, or the file was "
            f"altered): the best epoch is chosen among those from here on"
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Standing:
        """Return what `to_state` was made of; further keys are left alone."""
        return cls(
            within=EpochAtHand(**state["within"] or {}),
            began_random=state["epoch_random"],
            best=Best(**state["best"]),
            timings=state["timings"],
            stopped_early=state["stopped_early"],
        )
