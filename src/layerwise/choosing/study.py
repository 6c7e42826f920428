"""The Optuna side of a search: storage, trials that outlive their worker, what was found so far."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from layerwise.choosing.locks import JournalLock
from layerwise.choosing.space import Space
from layerwise.errors import MissingExtraError, RunError, first_line

State = Literal["complete", "pruned", "running", "failed", "waiting"]
SETTINGS = {"choice", "lr", "decay"}
"""What a trial draws."""
NAMELESS_S = 60.0
"""A running trial without the name of its worker is given up after so many seconds."""
MEETING_S = 30.0
"""For so many seconds a worker tries to open a storage whose tables another worker is making."""


@dataclass(frozen=True)
class TrialRow:
    """One trial of a search.

    Attributes:
        number: in the order in which trials began.
        choice: what was trained: ``"last 3"`` groups, or a named strategy.
        lr: base rate.
        decay: of the rates, a group.
        seed: of the run; trials of the search itself all have the same.
        state: how it ended, or that it has not.
        value: validation metric at the epoch whose weights `layerwise.fit` keeps, which is the best by the
            task's monitor (and so not always by another metric); None unless complete.
        epochs: how many were trained.
        seconds: of the trial; None while it runs.
        error: message of a failed one.
    """

    number: int
    choice: str
    lr: float
    decay: float
    seed: int
    state: State
    value: float | None
    epochs: int
    seconds: float | None
    error: str = ""

    @property
    def setting(self) -> tuple[str, float, float]:
        """Choice, rate and decay: what several seeds of one setting share."""
        return self.choice, self.lr, self.decay


def optuna_module() -> Any:
    """Return Optuna.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "a search") from error
    return optuna


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from logging every trial in the body."""
    optuna = optuna_module()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def open_study(
    storage: str | Path | None,
    name: str,
    *,
    about: Mapping[str, Any],
    space: Space,
    mode: Literal["max", "min"],
    seed: int,
) -> Any:
    """Return the study called `name` in `storage`, made when it is not there.

    Args:
        storage: None keeps it in memory; a path is a journal file, which several processes on one machine
            (or a network file system) share; a URL (``postgresql://...``) is any storage Optuna knows.
        name: of the study.
        about: what the trials are of; must be equal in all workers and after an interruption.
        space: for the number of trials before the sampler and the pruner begin to judge.
        mode: whether more of the metric is better.
        seed: of the sampler, besides the number of trials there already.

    Raises:
        RunError: the storage cannot be opened or read, or the study there is about something else; the
            differences are listed.
        MissingExtraError: Optuna is not installed.
    """
    optuna = optuna_module()
    where, begun = _storage_of(storage), len(space.first())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=where,
            study_name=name,
            load_if_exists=True,
            direction="maximize" if mode == "max" else "minimize",
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=min(4, begun), n_warmup_steps=max(1, space.epochs // 3)
            ),
        )
        offset = len(study.trials) + (0 if storage is None else os.getpid())
        study.sampler = optuna.samplers.TPESampler(
            seed=seed + offset, n_startup_trials=begun + 2, multivariate=True, constant_liar=True
        )
    plain = json.loads(json.dumps(about))
    before = study.user_attrs.get("about")
    if before is None:
        study.set_user_attr("about", plain)
    elif before != plain:
        listed = "".join(
            f"\n  - {key}: {old!r} there, {new!r} given" for key, old, new in _differences(before, plain)
        )
        raise RunError(
            f"the search {name!r} in {storage} is about something else:{listed}\n"
            "Give the same values to go on with it, or another name or folder for a new one."
        )
    return study


def _storage_of(storage: str | Path | None) -> Any:
    """Return what Optuna stores a study in; see `open_study`."""
    if storage is None:
        return None
    if "://" in str(storage):
        try:
            return _storage_at(str(storage))
        except Exception as error:  # SQLAlchemy and the drivers of its databases raise all kinds
            raise RunError(
                f"the storage {str(storage)!r} cannot be opened ({first_line(error)}). Expected the path of "
                "a journal file, or a URL that Optuna knows, such as sqlite:///search.db."
            ) from error
    path, storages = Path(storage), optuna_module().storages
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        journal = storages.JournalStorage(
            storages.journal.JournalFileBackend(str(path), lock_obj=JournalLock(path))
        )
        journal.get_all_studies()
        with path.open("rb") as lines:  # Optuna passes over a last line that it cannot read
            for line in lines:
                if line.endswith(b"\n"):  # else it is cut short, or half written by another worker
                    json.loads(line)
    except Exception as error:  # Optuna asserts, and reads with keys that are not there
        raise RunError(
            f"the journal {path} cannot be read ({type(error).__name__}: {error}), so it was altered or "
            "is none of a search's. Put the old one back, or name another folder for a new search."
        ) from error
    return journal


def _storage_at(url: str) -> Any:
    """Return Optuna's storage at a URL, its tables made where there are none.

    Of workers that begin together all try to make them, and all but one find another's in their way: "table
    studies already exists" (SQLite), "duplicate key value" (PostgreSQL). They look again, for `MEETING_S`.
    """
    until = time.monotonic() + MEETING_S
    while True:
        try:
            return optuna_module().storages.get_storage(url)
        except Exception as error:
            met = any(word in str(error).lower() for word in ("already exists", "unique", "duplicate"))
            if not met or time.monotonic() > until:
                raise
        time.sleep(0.2)


def _differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each entry that differs, of nested mappings the inner ones."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{path} {key}".strip())
    elif before != now:
        yield path, before, now


def worker_name() -> str:
    """Return the name of this process: machine, process number and, where the system tells it, its start."""
    return f"{socket.gethostname()}:{os.getpid()}@{_began(os.getpid())}"


def _began(process: int) -> str:
    """Return when a process began, in ticks since the boot, which no change of the clock moves."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:  # not Linux, or it is gone
        return ""
    return stat.rpartition(")")[2].split()[19]


def queue(study: Any, params: Mapping[str, Any], seed: int) -> None:
    """Put a trial with given parameters into the queue."""
    study.enqueue_trial(dict(params), user_attrs={"seed": seed})


def queued(study: Any) -> bool:
    """Return whether a trial waits in the queue."""
    return bool(study.get_trials(deepcopy=False, states=(optuna_module().trial.TrialState.WAITING,)))


def take_over(study: Any, *, nameless_s: float = NAMELESS_S) -> int:
    """Give up trials whose worker is dead, and queue them again; return how many.

    A worker is known to be dead if it ran on this machine and there is no such process any more, or one that
    began at another time.

    Args:
        study: of the search.
        nameless_s: age from which a running trial without the name of its worker is given up; 0 where the
            caller holds the lock under which workers begin and name their trials.
    """
    lost = 0
    for trial in study.get_trials(deepcopy=False, states=(optuna_module().trial.TrialState.RUNNING,)):
        if _abandoned(trial, nameless_s):
            give_up(study, trial)
            lost += 1
    return lost


def give_up(study: Any, trial: Any) -> None:
    """Mark a trial as failed and queue the same one again.

    A worker that dies while it draws settings leaves a trial with some of them. What the queue had fixed
    for it is queued again in full, what was drawn as far as it was drawn: the sampler draws the rest.

    Args:
        study: of the search.
        trial: a trial of it that runs, as `Study.get_trials` returns it.
    """
    study.tell(trial.number, state=optuna_module().trial.TrialState.FAIL)
    settings = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if settings:
        queue(study, settings, trial.user_attrs.get("seed", 0))


def _abandoned(trial: Any, nameless_s: float) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is None:
        started = trial.datetime_start
        return started is not None and datetime.now() - started >= timedelta(seconds=nameless_s)
    host, _, number = worker.rpartition(":")
    number, _, began = number.partition("@")
    process = int(number)
    if host != socket.gethostname():
        return False
    another = bool(began) and _began(process) not in ("", began)  # a program that has the number by now
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is somebody else's
        return another
    return another or process == os.getpid()  # an earlier search in this very process left it


def rows_of(study: Any) -> tuple[TrialRow, ...]:
    """Return all trials that have begun and whose settings are drawn.

    Settings are drawn one after another: a trial that another worker has just begun, or that died then, may
    have a choice and no rate yet. It is left out.
    """
    found = []
    for trial in study.get_trials(deepcopy=False):
        if SETTINGS - trial.params.keys():
            continue
        state = _state(trial)
        seconds = trial.duration.total_seconds() if trial.duration is not None else None
        found.append(
            TrialRow(
                number=trial.number,
                choice=trial.params["choice"],
                lr=float(trial.params["lr"]),
                decay=float(trial.params["decay"]),
                seed=int(trial.user_attrs.get("seed", 0)),
                state=state,
                value=trial.value if state == "complete" else None,
                epochs=len(trial.intermediate_values),
                seconds=seconds,
                error=trial.user_attrs.get("error", ""),
            )
        )
    return tuple(found)


def _state(trial: Any) -> State:
    names: dict[str, State] = {
        "COMPLETE": "complete",
        "PRUNED": "pruned",
        "RUNNING": "running",
        "WAITING": "waiting",
    }
    return names.get(trial.state.name, "failed")
