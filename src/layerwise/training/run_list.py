"""`list_runs`: what the runs in some folders came to, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import RunError, plural
from layerwise.training.history import read_history
from layerwise.training.run_folder import read_run


@dataclass(frozen=True)
class RunSummary:
    """What one run came to.

    Attributes:
        path: its folder.
        model: the name it was opened by, or its class.
        strategy: of its plan.
        lr: base learning rate.
        monitor: the metric (or ``"loss"``) by which its best epoch was chosen.
        mode: whether more of it is better.
        validation: of the kept epoch; None where there is none.
        test: with the kept weights; likewise.
        trained_frac: share of the parameters that learned, in [0, 1]; None before the run's end.
        seconds: of training and validation; likewise.
        state: ``"finished"``, ``"early"``, or after how many epochs it stands.
    """

    path: Path
    model: str
    strategy: str
    lr: float
    monitor: str
    mode: Literal["max", "min"]
    validation: float | None = None
    test: float | None = None
    trained_frac: float | None = None
    seconds: float | None = None
    state: str = "finished"

    @property
    def rank(self) -> tuple[Any, ...]:
        """Sorts runs: those of one metric together, the best on validation first, those without last."""
        value = self.validation
        return self.monitor, value is None, (value or 0.0) * (-1 if self.mode == "max" else 1), str(self.path)


def list_runs(folders: Sequence[str | Path]) -> list[RunSummary]:
    """Return the runs in some folders, those of one metric together, the best on validation first.

    Args:
        folders: of runs, or with runs directly in them.

    Raises:
        RunError: there is no run in a folder, or the record of one cannot be read.
    """
    found: dict[Path, RunSummary] = {}
    for folder in map(Path, folders):
        inside = sorted(file.parent for file in folder.glob("*/run.json"))
        runs = [folder] if (folder / "run.json").is_file() or not inside else inside
        found |= {path.resolve(): _summary(path) for path in runs}
    return sorted(found.values(), key=lambda run: run.rank)


def _summary(path: Path) -> RunSummary:
    about = read_run(path)  # which names the runs beside a folder that is none
    result, task, history = about.get("result"), about["task"], path / "history.jsonl"
    try:
        known: dict[str, Any] = {
            "path": path,
            "model": about["model"].get("spec") or about["model"].get("class") or "",
            "strategy": about["plan"]["strategy"],
            "lr": about["settings"]["lr"],
            "monitor": task["monitor"],
            "mode": task["mode"],
        }
        if result is None:
            epochs = len(read_history(history)) if history.is_file() else 0
            return RunSummary(**known, state=f"after {plural(epochs, 'epoch')}")
        return RunSummary(
            **known,
            validation=result["metrics"].get(task["monitor"]),
            test=(result["test"] or {}).get(task["monitor"]),
            trained_frac=result["trained_parameters"] / result["total_parameters"],
            seconds=result["seconds"],
            state=result["stopped"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path / 'run.json'} does not tell what a run came to ({error!r}), so it was altered. Put the "
            "run's own file back, or name the other runs: layerwise runs RUN..."
        ) from error
