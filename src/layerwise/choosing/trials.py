"""One trial of a search: settings drawn, a model trained by them, the outcome told to the study."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.cache.stock import CachePool
from layerwise.choosing.space import Space
from layerwise.choosing.study import TrialRow, give_up, optuna_module, rows_of, worker_name
from layerwise.choosing.terms import about_data, outcome_of, plain, value_of
from layerwise.errors import DataError, LayerwiseError, figure
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.training.fit import fit
from layerwise.training.result import Result
from layerwise.tuning.stall import Mode


@dataclass(frozen=True)
class Experiment:
    """What all trials of a search have in common; see `layerwise.search`.

    Attributes:
        model: where every trial starts; it is copied.
        train: training data.
        val: data to compare on.
        test: only the winner's run is measured on it; None for nothing.
        layers: the layer map.
        space: what is tried.
        metric: that decides.
        mode: whether more of it is better.
        batch_size: of training.
        seed: of the search's own trials.
        options: further options of `layerwise.fit`.
        pool: outputs of frozen prefixes, shared by all trials; grows.
    """

    model: nn.Module
    train: Any
    val: Any
    test: Any
    layers: LayerMap
    space: Space
    metric: str
    mode: Mode
    batch_size: int
    seed: int
    options: Mapping[str, Any]
    pool: CachePool = dataclasses.field(default_factory=CachePool)

    def about(self) -> dict[str, Any]:
        """Return what must be equal in all workers and after an interruption, as plain data."""
        return {
            **about_data(self.model, self.layers, self.train, self.val),
            "space": dataclasses.asdict(self.space),
            "metric": self.metric,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "fit_options": plain({name: value for name, value in self.options.items() if name != "about"}),
        }

    def train_by(self, plan: Plan, lr: float, seed: int, **more: Any) -> Result:
        """Return the result of training a copy of the model by `plan`; `more` are options of `fit`."""
        given: dict[str, Any] = {
            "layers": self.layers,
            "batch_size": self.batch_size,
            "progress": False,
            "cache_pool": self.pool,
            **self.options,
            **more,
        }
        gc.collect()  # pins of frozen modules are reference cycles: the model before would stay for long
        return fit(copy.deepcopy(self.model), self.train, self.val, plan=plan, lr=lr, seed=seed, **given)


@dataclass(frozen=True)
class Drawn:
    """A trial that has begun.

    Attributes:
        trial: Optuna's.
        choice: what is trained.
        lr: base rate.
        decay: of the rates, a group.
        seed: of the run.
    """

    trial: Any
    choice: str
    lr: float
    decay: float
    seed: int


def begin_trial(found: Experiment, study: Any) -> Drawn:
    """Return the next trial of the queue, or a new one, its settings drawn."""
    trial = study.ask()
    trial.set_user_attr("worker", worker_name())
    seed = int(trial.user_attrs.get("seed", found.seed))
    trial.set_user_attr("seed", seed)
    return Drawn(
        trial=trial,
        choice=trial.suggest_categorical("choice", found.space.choices),
        lr=trial.suggest_float("lr", *found.space.lr, log=True),
        decay=trial.suggest_float("decay", *found.space.decay),
        seed=seed,
    )


class _CutOffError(Exception):
    """The time is over in the middle of a trial."""


def run_trial(
    found: Experiment,
    study: Any,
    drawn: Drawn,
    say: Callable[[str], None],
    *,
    time_over: Callable[[], bool] = lambda: False,
) -> None:
    """Train by the settings of a trial that has begun, and tell the study how it ended.

    A trial that would train by the same plan, rate and seed as one that has ended is not trained: it ends
    as that one did. A sampler draws a setting again where the ranges leave it few.

    Args:
        found: what all trials have in common.
        study: Optuna's.
        drawn: the trial.
        say: told how it ended.
        time_over: asked after each epoch; a trial is then cut off and queued again, unless it is the
            search's first, without which there would be no result.

    Raises:
        LayerwiseError: the data cannot be trained on; or the first three trials of the study all failed.
        KeyboardInterrupt: after Ctrl-C, and so any other error that is not layerwise's; the trial is queued
            again.
    """
    optuna = optuna_module()
    trial, settings = drawn.trial, f"{drawn.choice}, lr {drawn.lr:.2g}, decay {drawn.decay:.2f}"
    if (same := _ended_alike(found, rows_of(study), drawn)) is not None:
        pruned = same.state == "pruned"
        study.tell(trial, same.value, optuna.trial.TrialState.PRUNED if pruned else None)
        say(f"trial {trial.number}: {settings}, seed {drawn.seed}: as trial {same.number}, not trained again")
        return
    # the first trial of a choice is finished, so that the curve is whole; so are confirming ones
    known = any(row.choice == drawn.choice and row.state == "complete" for row in rows_of(study))
    may_prune = known and drawn.seed == found.seed

    def watch(entry: Mapping[str, Any]) -> None:
        trial.report(value_of(found.metric, entry), entry["epoch"])
        if may_prune and trial.should_prune():
            raise optuna.TrialPruned
        unfinished = entry["epoch"] + 1 < found.space.epochs
        if unfinished and time_over() and any(row.state == "complete" for row in rows_of(study)):
            raise _CutOffError

    try:
        plan = found.space.plan(found.layers, drawn.choice, drawn.decay)
        result = found.train_by(plan, drawn.lr, drawn.seed, on_epoch=watch)
        value = outcome_of(found.metric, result.metrics)
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        say(f"trial {trial.number}: {settings}: pruned")
    except _CutOffError:
        give_up(study, study.get_trials(deepcopy=False)[trial.number])
        say(f"trial {trial.number}: {settings}: cut off, the time is over; a longer search runs it again")
    except LayerwiseError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        say(f"trial {trial.number}: {settings}: failed: {error}")
        # wrong data fail every trial; other errors, such as a loss that is not finite, only this one
        if isinstance(error, DataError) or _hopeless(rows_of(study)):
            raise
    except BaseException:  # Ctrl-C, or a fault in the caller's code: the trial is not lost
        give_up(study, study.get_trials(deepcopy=False)[trial.number])
        raise
    else:
        study.tell(trial, value)
        say(f"trial {trial.number}: {settings}, seed {drawn.seed}: {found.metric} {figure(value)}")


def _ended_alike(found: Experiment, rows: Sequence[TrialRow], drawn: Drawn) -> TrialRow | None:
    """Return the first trial that has ended and was trained as this one would be; None without one.

    The plans are compared, as some have no decay (a linear probe, a named strategy).
    """
    alike = [
        row
        for row in rows
        if row.state in ("complete", "pruned") and (row.lr, row.seed) == (drawn.lr, drawn.seed)
    ]
    if not alike:
        return None
    plan = found.space.plan(found.layers, drawn.choice, drawn.decay)
    return next((r for r in alike if found.space.plan(found.layers, r.choice, r.decay) == plan), None)


def _hopeless(rows: Sequence[TrialRow]) -> bool:
    return sum(bool(row.error) for row in rows) >= 3 and not any(row.state == "complete" for row in rows)
