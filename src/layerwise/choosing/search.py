"""`search`: plans tested against each other, on one shared frozen prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from layerwise.cache.stock import CachePool
from layerwise.choosing.budget import Budget
from layerwise.choosing.decide import LEAST_BATCH
from layerwise.choosing.features import map_for
from layerwise.choosing.locks import lock_beside
from layerwise.choosing.search_result import CurvePoint, SearchResult, best_point, depth_curve, values_by_seed
from layerwise.choosing.space import make_space, names_by_depth
from layerwise.choosing.study import (
    NAMELESS_S,
    TrialRow,
    open_study,
    queue,
    queued,
    quiet,
    rows_of,
    take_over,
)
from layerwise.choosing.terms import SET_BY_SEARCH, check_fit_options, metric_and_mode
from layerwise.choosing.trials import Experiment, begin_trial, run_trial
from layerwise.errors import DataError, RunError, plural
from layerwise.files import with_nulls, write_json
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.plans.settings import NormKind
from layerwise.training.result import Result


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
    begin_with: Sequence[tuple[str, float]] = (),
    lr: tuple[float, float] = (1e-4, 1e-2),
    decay: tuple[float, float] = (0.7, 1.0),
    epochs: int = 5,
    norms: NormKind | None = None,
    out: str | Path | None = None,
    storage: str | Path | None = None,
    name: str = "search",
    metric: str | None = None,
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
    before the winner is named: the best of many noisy trials looks better than it is. A setting that is
    drawn again is a trial, but is not trained again; where the ranges leave one setting to each choice, the
    search ends when all have been tried.

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
        minutes: stop this process after so long. A trial under way may take a tenth more; then it is cut
            off and queued again, for a search that goes on. The winner's run comes after that.
        seeds: runs of the best setting of each choice.
        depths: numbers of groups that learn; None takes about six, denser at the output.
        strategies: named strategies to try besides the depths.
        begin_with: choices (``"last 3"``, or one of `strategies`) that are tried before all others, each with
            its base rate.
        lr: lowest and highest base rate.
        decay: lowest and highest decay a group.
        epochs: length of every trial, and of the winner's run.
        norms: the batch-norm policy of every plan; None follows the groups, and freezes all statistics where
            batches are smaller than 16.
        out: folder: the journal, ``search.json``, and the winner's run.
        storage: a journal file, or any storage URL that Optuna knows; None is ``out/search.journal``, or
            memory where there is no `out`.
        name: of the study in the storage.
        metric: of the validation data, in the history of `layerwise.fit`; None is the task's monitor. Less
            is better where the task says so, and of losses, ``"rmse"``, ``"mae"`` and ``"perplexity"``.
        layers: the layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from.
        batch_size: of training.
        fit_options: further options of `layerwise.fit`, but for those that a search sets itself.
        refit: ``"winner"`` trains the winner once more and keeps the run; ``"none"`` does not.
        seed: of the runs and, with the number of trials in the storage, of the sampler.
        say: told of every trial, for people.

    Raises:
        PlanError: the search space cannot be used.
        DataError: no validation data, a metric that is unknown or of the training data, a budget that is
            not positive, another `refit`, or `fit_options` that a search sets itself.
        TrainingError: `fit_options` are out of range.
        RunError: the study in the storage is about something else, the storage cannot be opened, or `out`
            holds a run, or a plan of something else.
        LayerwiseError: the first three trials all failed; the last one's error.
        MissingExtraError: Optuna is not installed.
        KeyboardInterrupt: after Ctrl-C; the trial at hand is queued again.

    Source: TPE, Bergstra et al. 2011; median pruning, Golovin et al. 2017; both as in Optuna, Akiba et al.
    2019.
    """
    if val is None:
        raise DataError(
            "a search compares plans on validation data, and val is None. Split some off train: --val-frac "
            "(in Python, give val)."
        )
    if (trials is not None and trials < 1) or (minutes is not None and not minutes > 0) or seeds < 1:
        raise DataError(
            f"trials is {trials}, minutes {minutes}, seeds {seeds}; expected numbers above 0 (or None for no "
            "limit of that kind)."
        )
    if refit not in ("winner", "none"):
        raise DataError(f"refit is {refit!r}; expected 'winner' or 'none'.")
    folder = None if out is None else Path(out)
    if folder is not None:
        require_own(folder)
    budget = Budget(20 if trials is None and minutes is None else trials, minutes, seeds)
    options = dict(fit_options or {})
    check_fit_options(options, SET_BY_SEARCH, "search")
    metric, mode = metric_and_mode(metric, train, options)
    layers = map_for(model, train, layers, example_input, batch_size=batch_size)
    if norms is None:
        norms = "freeze" if batch_size < LEAST_BATCH else "follow"
    space = make_space(
        layers,
        depths=depths,
        strategies=strategies,
        lr=lr,
        decay=decay,
        epochs=epochs,
        norms=norms,
        begin_with=begin_with,
    )
    pool = CachePool(upcoming=names_by_depth(layers, space.depths, epochs=space.epochs))
    experiment = Experiment(
        model, train, val, test, layers, space, metric, mode, batch_size, seed, options, pool
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        storage = storage if storage is not None else folder / "search.journal"
    with quiet(), lock_beside(storage) as lock:
        study, take_over_lost, notes = _opened(experiment, storage, name, budget, lock)
        while not budget.spent:
            with lock:  # so that two workers do not both begin the last trial
                take_over_lost()
                rows = rows_of(study)
                if not budget.allows(rows):
                    break
                if _exhausted(experiment, rows):
                    notes.append("every setting that the ranges allow has been tried")
                    break
                drawn = begin_trial(experiment, study)
            run_trial(experiment, study, drawn, say, time_over=lambda: budget.overrun)
        while not budget.spent:
            with lock:
                take_over_lost()
                unconfirmed = _unconfirmed(experiment, rows_of(study), seeds)
                if unconfirmed is None:
                    break
                if not queued(study):  # else a trial that was cut off comes first
                    queue(study, *unconfirmed)
                drawn = begin_trial(experiment, study)
            run_trial(experiment, study, drawn, say, time_over=lambda: budget.overrun)
        with lock:  # else a worker that died would be waited for, and nobody would make the winner's run
            take_over_lost()
        return _finished(experiment, study, folder, seeds=seeds, refit=refit, notes=notes, lock=lock, say=say)


def require_own(folder: Path) -> None:
    """Refuse a folder where the plan that is found would replace another one.

    Raises:
        RunError: `folder` holds a run, or a plan that is none of a search's.
    """
    ours = any((folder / name).exists() for name in ("search.journal", "search.json"))
    if (folder / "run.json").exists() or ((folder / "plan.yaml").exists() and not ours):
        what = "run" if (folder / "run.json").exists() else "plan.yaml"
        raise RunError(
            f"{folder} holds a {what} that is none of a search's, and the search would write its plan.yaml "
            "there. Name another folder: --out (out=)."
        )


def _opened(
    experiment: Experiment,
    storage: str | Path | None,
    name: str,
    budget: Budget,
    lock: AbstractContextManager[None],
) -> tuple[Any, Callable[[], int], list[str]]:
    """Return the study, what takes over the trials of dead workers, and notes for people.

    The study's first trials, and those that were cut off, are in its queue.
    """
    local = storage is not None and "://" not in str(storage)
    with lock:
        study = open_study(
            storage,
            name,
            about=experiment.about(),
            space=experiment.space,
            mode=experiment.mode,
            seed=experiment.seed,
        )
        # who holds the lock of a local file knows that nobody is about to name a trial
        take_over_lost = partial(take_over, study, nameless_s=0.0 if local else NAMELESS_S)
        lost = take_over_lost()
        for params in experiment.space.first()[: budget.trials]:
            study.enqueue_trial(params, user_attrs={"seed": experiment.seed}, skip_if_exists=True)
    notes = [f"{plural(lost, 'trial')} cut off before will be run again"] if lost else []
    return study, take_over_lost, notes


def _exhausted(experiment: Experiment, rows: Sequence[TrialRow]) -> bool:
    """Return whether the ranges leave one setting to each choice, and all have been tried."""
    space, layers = experiment.space, experiment.layers
    if space.lr[0] < space.lr[1]:
        return False
    tried = {row.choice for row in rows if row.state == "complete" or row.error}
    return tried.issuperset(space.choices) and all(
        space.plan(layers, choice, space.decay[0]) == space.plan(layers, choice, space.decay[1])
        for choice in space.choices
    )


def _unconfirmed(
    experiment: Experiment, rows: Sequence[TrialRow], seeds: int
) -> tuple[dict[str, Any], int] | None:
    """Return parameters and seed of a setting that lacks seeds, or None.

    Of each choice that is the best setting by the search's own seed: so one that is drawn later, and leads
    the one that has all seeds, is run with them too. The one with the fewest seeds comes first, the best
    among equals, so that when the time is over all have had their turn.
    """
    sign = 1 if experiment.mode == "max" else -1
    found = []
    failed = {row.setting for row in rows if row.error}  # one that failed would fail again
    for choice in experiment.space.choices:
        own = {
            (choice, *setting): values[experiment.seed]
            for setting, values in values_by_seed(rows, choice).items()
            if experiment.seed in values and (choice, *setting) not in failed
        }
        if not own:
            continue
        leader = max(own, key=lambda setting: sign * own[setting])
        begun = {row.seed for row in rows if row.setting == leader and row.state in ("complete", "running")}
        missing = [seed for seed in range(experiment.seed, experiment.seed + seeds) if seed not in begun]
        if missing:
            found.append((len(begun), -sign * own[leader], leader, missing[0]))
    if not found:
        return None
    _, _, (choice, lr, decay), seed = min(found, key=lambda entry: entry[:2])
    return {"choice": choice, "lr": lr, "decay": decay}, seed


def _finished(
    experiment: Experiment,
    study: Any,
    folder: Path | None,
    *,
    seeds: int,
    refit: Literal["winner", "none"],
    notes: list[str],
    lock: AbstractContextManager[None],
    say: Callable[[str], None],
) -> SearchResult:
    """Return the result and write it to the folder, the winner's run made if it is this worker's to make.

    Raises:
        DataError: no trial was completed.
    """
    rows = rows_of(study)
    mode = experiment.mode
    curve = depth_curve(rows, experiment.space, experiment.layers, mode, seeds=seeds)
    if not curve:
        errors = sorted({row.error.rstrip(".") for row in rows if row.error})
        why = f": {'; '.join(errors)}." if errors else ". Give more minutes or trials."
        raise DataError(f"no trial of {len(rows)} was completed{why}")
    best = best_point(curve, mode, seeds=seeds)
    plan = experiment.space.plan(experiment.layers, best.choice, best.decay)
    run, note = None, ""
    if refit == "winner":
        run, note = _refit(experiment, plan, best, rows, folder, lock, say)
    notes = [*notes, *([note] if note else [])]
    result = SearchResult(experiment.metric, mode, best, plan, best.lr, curve, rows, run, tuple(notes))
    if folder is not None:
        with lock:
            plan.save(folder / "plan.yaml")
            data = result.to_dict()
            summary = folder / "search.json"
            if data["run"] is None:
                data["run"] = _told_before(summary, _winner_folder(folder, best, rows))
            write_json(summary, with_nulls(data))
    return result


def _told_before(summary: Path, winner: Path) -> Any:
    """Return the winner's run as another worker wrote it down; None if that is of another winner."""
    if not summary.exists():
        return None
    run = json.loads(summary.read_text(encoding="utf-8")).get("run") or {}
    return run if Path(run.get("out") or "").name == winner.name else None


def _refit(
    experiment: Experiment,
    plan: Plan,
    best: CurvePoint,
    rows: Sequence[TrialRow],
    folder: Path | None,
    lock: AbstractContextManager[None],
    say: Callable[[str], None],
) -> tuple[Result | None, str]:
    """Return the winner's run and nothing, or None and why it was not made."""
    if others := sum(row.state == "running" for row in rows):
        return (
            None,
            f"still running elsewhere: {plural(others, 'trial')}; the last worker makes the winner's run",
        )
    found = f"best: {best.choice} at lr {best.lr:.2g}"
    options: dict[str, Any] = {"test": experiment.test}
    if folder is None:
        say(f"{found}; making its run")
        return experiment.train_by(plan, best.lr, experiment.seed, **options), ""
    target = _winner_folder(folder, best, rows)
    options["about"] = {**(experiment.options.get("about") or {}), "winner": str(target.resolve())}
    try:
        with lock:  # a second worker that gets here waits, and then reads the run
            begun = (target / "run.json").exists()  # perhaps interrupted, perhaps finished
            say(f"{found}; its run is in {target}" if begun else f"{found}; making its run")
            return experiment.train_by(
                plan, best.lr, experiment.seed, **options, out=target, resume=begun
            ), ""
    except RunError as error:
        return None, str(error)


def _winner_folder(folder: Path, best: CurvePoint, rows: Sequence[TrialRow]) -> Path:
    number = next(row.number for row in rows if row.setting == best.setting and row.state == "complete")
    return folder / f"winner-trial-{number}"
