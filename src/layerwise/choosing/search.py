"""`search`: plans tested against each other, on one shared frozen prefix."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from layerwise.choosing.decide import SMALL_BATCH
from layerwise.choosing.features import map_for
from layerwise.choosing.space import Space, make_space
from layerwise.choosing.study import (
    TrialRow,
    give_up,
    open_study,
    optuna_module,
    queue,
    quiet,
    rows_of,
    take_over,
    waiting,
    worker_name,
)
from layerwise.choosing.tables import text_table
from layerwise.errors import DataError, LayerwiseError, RunError
from layerwise.files import write_json
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import NormKind, Plan
from layerwise.training.fit import fit
from layerwise.training.result import Result

SEARCH_SHARE = 0.6
"""Share of a budget in minutes that finds settings; the rest confirms them with more seeds."""


@dataclass(frozen=True)
class CurvePoint:
    """The best setting of one choice, over its seeds.

    Attributes:
        choice: ``"last 3"``, or a named strategy.
        trained_groups: how many groups learn, or None for a named strategy.
        first: the first group that learns, or the strategy.
        lr: base rate of the best setting.
        decay: its decay.
        mean: metric, averaged over seeds.
        error: standard error of that mean; 0 with one seed.
        seeds: how many there are.
    """

    choice: str
    trained_groups: int | None
    first: str
    lr: float
    decay: float
    mean: float
    error: float
    seeds: int


@dataclass(frozen=True)
class SearchResult:
    """What a search has found so far.

    Attributes:
        metric: that was compared, on the validation data.
        best: the winning choice.
        plan: its plan.
        lr: its base rate.
        curve: the best setting of each choice: metric against depth.
        trials: every trial of the study, of all workers.
        run: the winner's run, its model tuned; None where another worker makes it, or none was asked for.
        notes: for people.
    """

    metric: str
    best: CurvePoint
    plan: Plan
    lr: float
    curve: tuple[CurvePoint, ...]
    trials: tuple[TrialRow, ...]
    run: Result | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the tuned model as plain data for JSON."""
        return {
            "metric": self.metric,
            "best": dataclasses.asdict(self.best),
            "plan": self.plan.to_dict(),
            "lr": self.lr,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "trials": [dataclasses.asdict(row) for row in self.trials],
            "run": None if self.run is None else self.run.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [
            [
                p.choice,
                p.first,
                f"{p.mean:.4f}",
                f"{p.error:.4f}",
                str(p.seeds),
                f"{p.lr:.2g}",
                f"{p.decay:.2f}",
            ]
            for p in self.curve
        ]
        count = {
            state: sum(t.state == state for t in self.trials) for state in ("complete", "pruned", "failed")
        }
        return "\n".join(
            [
                f"best: {self.best.choice} (from {self.best.first}) at lr {self.lr:.2g}: "
                f"{self.metric} {self.best.mean:.4f}",
                text_table(["trained", "from", self.metric, "error", "seeds", "lr", "decay"], rows),
                f"{len(self.trials)} trials: " + ", ".join(f"{n} {state}" for state, n in count.items() if n),
                *self.notes,
            ]
        )


def search(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    test: Any = None,
    trials: int | None = None,
    minutes: float | None = None,
    seeds: int = 1,
    depths: Sequence[int] | None = None,
    strategies: Sequence[str] = (),
    lr: tuple[float, float] = (1e-4, 1e-2),
    decay: tuple[float, float] = (0.7, 1.0),
    epochs: int = 5,
    norms: NormKind | None = None,
    out: str | Path | None = None,
    storage: str | Path | None = None,
    name: str = "search",
    metric: str = "balanced_accuracy",
    layers: LayerMap | None = None,
    example_input: Any = None,
    batch_size: int = 32,
    fit_options: Mapping[str, Any] | None = None,
    refit: Literal["winner", "none"] = "winner",
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Return the best plan among freeze depths, rates and decays, with the curve of the metric against depth.

    Every search begins with each depth once, so that the curve is whole early; then Optuna's TPE draws
    choice, rate and decay together, and trials that are worse than the median at the same epoch are pruned.
    All trials of one process share the outputs of the frozen prefix, so a depth costs little more than the
    part it trains. With ``seeds`` above 1 the best setting of each choice is run again with other seeds
    before the winner is named: the best of many noisy trials looks better than it is.

    Interrupted (Ctrl-C, SIGKILL) and called again with the same `out` or `storage`, it goes on: finished
    trials are kept, the one that was cut off is run again. Several processes called with the same `storage`
    share the work; the last one to finish makes the winner's run.

    Choose by a validation set and report on another: the winner's validation metric is biased upwards.

    Args:
        model: where every trial starts; unchanged.
        train: as for `layerwise.fit`.
        val: to compare on; needed.
        test: only the winner's run is measured on it.
        trials: stop when the study holds so many (confirming seeds not counted). 20 where neither this nor
            `minutes` is given.
        minutes: stop this process after so long; a trial that has begun is finished.
        seeds: runs of the best setting of each choice.
        depths: numbers of groups that learn; None takes about six, denser at the output.
        strategies: named strategies to try besides the depths.
        lr: lowest and highest base rate.
        decay: lowest and highest decay a group.
        epochs: length of every trial, and of the winner's run.
        norms: the batch-norm policy of every plan; None follows the groups, and freezes all statistics where
            batches are smaller than 16.
        out: folder: the journal, ``search.json``, and the winner's run.
        storage: a journal file, or any storage URL that Optuna knows; None is ``out/search.journal``, or
            memory where there is no `out`.
        name: of the study in the storage.
        metric: of the history of `layerwise.fit`; names that end in ``"loss"`` are minimised.
        layers: the layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from.
        batch_size: of training.
        fit_options: further options of `layerwise.fit`.
        refit: ``"winner"`` trains the winner once more and keeps the run; ``"none"`` does not.
        seed: of the runs and, with the number of trials in the storage, of the sampler.
        say: told of every trial, for people.

    Raises:
        PlanError: the search space cannot be used.
        DataError: no validation data, an unknown metric, or a budget that is not positive.
        RunError: the study in the storage is about something else.
        LayerwiseError: the first three trials all failed; the last one's error.
        MissingExtraError: Optuna is not installed.
        KeyboardInterrupt: after Ctrl-C; the trial at hand is queued again.

    Source: TPE, Bergstra et al. 2011; median pruning, Golovin et al. 2017; both as in Optuna, Akiba et al.
    2019.
    """
    if val is None:
        raise DataError("a search compares plans on validation data, and val is None. Split some off train.")
    if (trials is not None and trials < 1) or (minutes is not None and not minutes > 0) or seeds < 1:
        raise DataError(f"trials is {trials}, minutes {minutes}, seeds {seeds}; expected numbers above 0.")
    layers = map_for(model, train, layers, example_input, batch_size=batch_size)
    if norms is None:
        norms = "freeze" if batch_size < SMALL_BATCH else "follow"
    space = make_space(
        layers, depths=depths, strategies=strategies, lr=lr, decay=decay, epochs=epochs, norms=norms
    )
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        storage = storage if storage is not None else folder / "search.journal"
    mode: Literal["max", "min"] = "min" if metric.endswith("loss") else "max"
    about = {
        "model": layers.model_class,
        "groups": list(layers.names),
        "train_samples": len(train) if hasattr(train, "__len__") else None,
        "space": dataclasses.asdict(space),
        "metric": metric,
        "batch_size": batch_size,
        "seed": seed,
        "fit_options": {key: _plain(value) for key, value in (fit_options or {}).items()},
    }
    budget = _Budget(20 if trials is None and minutes is None else trials, minutes, seeds)
    with quiet(), _locked(storage) as lock:
        with lock:
            study = open_study(storage, name, about=about, space=space, mode=mode, seed=seed)
            lost = take_over(study)
            for params in space.first():
                study.enqueue_trial(params, user_attrs={"seed": seed}, skip_if_exists=True)
        notes = [f"{lost} trial{'s' * (lost > 1)} cut off before will be run again"] if lost else []
        worker = _Worker(
            model,
            train,
            val,
            test,
            layers,
            space,
            study,
            metric,
            mode,
            seed,
            batch_size,
            dict(fit_options or {}),
            say,
        )
        while budget.searching(rows_of(study), waiting(study)):
            worker.run_one()
        sign = 1 if mode == "max" else -1
        ranked = sorted(worker.curve(), key=lambda point: -sign * point.mean)
        for point in _confirmations(ranked, seeds, study, lock):
            if budget.spent:
                break
            worker.run_one(point)
        return worker.finish(folder, refit=refit, notes=notes, lock=lock)


class _Budget:
    """When to stop: by the number of trials in the study, and by the clock of this process."""

    def __init__(self, trials: int | None, minutes: float | None, seeds: int) -> None:
        self.trials, self.seeds = trials, seeds
        self.seconds = None if minutes is None else minutes * 60
        self.began = time.monotonic()

    @property
    def spent(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.began >= self.seconds

    def searching(self, rows: Sequence[TrialRow], queued: int) -> bool:
        """Return whether another trial of the search (not a confirming one) may begin."""
        share = SEARCH_SHARE if self.seeds > 1 else 1.0
        if self.seconds is not None and time.monotonic() - self.began >= share * self.seconds:
            return False
        if self.trials is None:
            return True
        first_seed = min((row.seed for row in rows), default=0)
        begun = sum(row.state in ("complete", "pruned", "running") and row.seed == first_seed for row in rows)
        return begun < self.trials


@dataclass
class _Worker:
    """Runs trials, one after another; holds what they share."""

    model: nn.Module
    train: Any
    val: Any
    test: Any
    layers: LayerMap
    space: Space
    study: Any
    metric: str
    mode: Literal["max", "min"]
    seed: int
    batch_size: int
    options: dict[str, Any]
    say: Callable[[str], None]
    pool: dict[str, Any] = dataclasses.field(default_factory=dict)
    failures: int = 0
    successes: int = 0

    def run_one(self, fixed: Mapping[str, Any] | None = None) -> None:
        """Run the next trial of the queue, or a new one; with `fixed`, one with these parameters and seed."""
        optuna = optuna_module()
        if fixed is not None:
            queue(self.study, fixed["params"], seed=fixed["seed"])
        trial = self.study.ask()
        trial.set_user_attr("worker", worker_name())
        seed = int(trial.user_attrs.get("seed", self.seed))
        trial.set_user_attr("seed", seed)
        choice = trial.suggest_categorical("choice", self.space.choices)
        lr = trial.suggest_float("lr", *self.space.lr, log=True)
        decay = trial.suggest_float("decay", *self.space.decay)

        known = any(row.choice == choice and row.state == "complete" for row in rows_of(self.study))

        def watch(entry: Mapping[str, Any]) -> None:
            trial.report(self._value(entry), entry["epoch"])
            # the first trial of a choice is finished, so that the curve is whole; so are confirming ones
            if known and seed == self.seed and trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = self._fit(self.space.plan(self.layers, choice, decay), lr, seed, on_epoch=watch)
            value = self._value(result.metrics)
        except optuna.TrialPruned:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            self.say(f"trial {trial.number}: {choice}, lr {lr:.2g}, decay {decay:.2f}: pruned")
        except LayerwiseError as error:
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.say(f"trial {trial.number}: {choice}, lr {lr:.2g} failed: {error}")
            self.failures += 1
            # wrong data fail every trial; other errors, such as a loss that is not finite, only this one
            if isinstance(error, DataError) or (self.failures >= 3 and not self.successes):
                raise
        except BaseException:  # Ctrl-C, or a fault in the caller's code: the trial is not lost
            give_up(self.study, trial.number, trial.params, seed=seed)
            raise
        else:
            self.study.tell(trial, value)
            self.successes += 1
            self.say(
                f"trial {trial.number}: {choice}, lr {lr:.2g}, decay {decay:.2f}, seed {seed}: "
                f"{self.metric} {value:.4f}"
            )

    def _value(self, entry: Mapping[str, Any]) -> float:
        key = "loss" if self.metric == "val_loss" and "val_loss" not in entry else self.metric
        if key not in entry:
            numbers = [name for name, value in entry.items() if isinstance(value, float)]
            raise DataError(f"metric {self.metric!r} is not measured; there are {', '.join(numbers)}.")
        return float(entry[key])

    def _fit(self, plan: Plan, lr: float, seed: int, **more: Any) -> Result:
        given: dict[str, Any] = {
            "layers": self.layers,
            "batch_size": self.batch_size,
            "progress": False,
            "cache_pool": self.pool,
            **self.options,
            **more,
        }
        return fit(copy.deepcopy(self.model), self.train, self.val, plan=plan, lr=lr, seed=seed, **given)

    def curve(self) -> tuple[CurvePoint, ...]:
        """Return the best setting of each choice that has a complete trial, shallow to deep."""
        sign = 1 if self.mode == "max" else -1
        rows = [row for row in rows_of(self.study) if row.state == "complete" and row.value is not None]
        found = []
        for choice in self.space.choices:
            own = [row for row in rows if row.choice == choice]
            settings: dict[tuple[float, float], list[float]] = {}
            for row in own:
                settings.setdefault((row.lr, row.decay), []).append(row.value or 0.0)
            if not settings:
                continue
            # Settings that were confirmed with more seeds come first: one lucky run does not beat them.
            (lr, decay), values = max(
                settings.items(), key=lambda item: (len(item[1]), sign * float(np.mean(item[1])))
            )
            k = int(choice.removeprefix("last ")) if choice not in self.space.strategies else None
            error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
            found.append(
                CurvePoint(
                    choice,
                    k,
                    choice if k is None else self.layers.names[len(self.layers) - k],
                    lr,
                    decay,
                    float(np.mean(values)),
                    error,
                    len(values),
                )
            )
        return tuple(found)

    def finish(
        self, folder: Path | None, *, refit: Literal["winner", "none"], notes: list[str], lock: Any
    ) -> SearchResult:
        """Return the result, the winner's run made if it is this worker's to make.

        Raises:
            DataError: no trial was completed.
        """
        curve = self.curve()
        rows = rows_of(self.study)
        if not curve:
            errors = {row.error for row in rows if row.error}
            raise DataError(
                f"no trial of {len(rows)} was completed{': ' + '; '.join(sorted(errors)) if errors else ''}. "
                "Give more minutes or trials."
            )
        sign = 1 if self.mode == "max" else -1
        most = max(point.seeds for point in curve)
        best = max((p for p in curve if p.seeds == most), key=lambda p: sign * p.mean)
        plan = self.space.plan(self.layers, best.choice, best.decay)
        run = None
        if refit == "winner":
            run = self._refit(folder, plan, best, rows, notes, lock)
        result = SearchResult(self.metric, best, plan, best.lr, curve, rows, run, tuple(notes))
        if folder is not None:
            with lock:
                plan.save(folder / "plan.yaml")
                data = result.to_dict()
                summary = folder / "search.json"
                if data["run"] is None and summary.exists():  # another worker made it
                    data["run"] = json.loads(summary.read_text(encoding="utf-8")).get("run")
                write_json(summary, data)
        return result

    def _refit(
        self,
        folder: Path | None,
        plan: Plan,
        best: CurvePoint,
        rows: Sequence[TrialRow],
        notes: list[str],
        lock: Any,
    ) -> Result | None:
        others = [row for row in rows if row.state == "running"]
        if others:
            notes.append(
                f"{len(others)} trials of other workers still run; the last one makes the winner's run"
            )
            return None
        if folder is None:
            return self._fit(plan, best.lr, self.seed, test=self.test)
        number = next(
            row.number
            for row in rows
            if (row.choice, row.lr, row.decay) == (best.choice, best.lr, best.decay)
        )
        target = folder / f"winner-trial-{number}"
        try:
            with lock:
                if (target / "run.json").exists():
                    raise RunError(f"the winner's run is there already: {target}")
                return self._fit(plan, best.lr, self.seed, test=self.test, out=target)
        except RunError as error:
            notes.append(str(error))
            return None


def _confirmations(
    ranked: Sequence[CurvePoint], seeds: int, study: Any, lock: Any
) -> Iterator[dict[str, Any]]:
    """Yield the settings that lack runs with further seeds, in the order given, seed by seed."""
    for extra in range(1, seeds):
        for point in ranked:
            with lock:
                done = {
                    row.seed
                    for row in rows_of(study)
                    if (row.choice, row.lr, row.decay) == (point.choice, point.lr, point.decay)
                    and row.state in ("complete", "running")
                }
                first = min(done, default=0)
                if first + extra in done:
                    continue
            params = {"choice": point.choice, "lr": point.lr, "decay": point.decay}
            yield {"params": params, "seed": first + extra}


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it and compare it between processes."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return type(value).__name__


@contextmanager
def _locked(storage: str | Path | None) -> Iterator[Any]:
    """Yield a lock between the processes of one machine that share a journal file; none for others."""
    if storage is None or "://" in str(storage):
        yield _Unlocked()
        return
    path = Path(f"{storage}.workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        yield _FileLock(file)


class _Unlocked:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


class _FileLock:
    """Held by one process at a time; released by the system when that process dies."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)
