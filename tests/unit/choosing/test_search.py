"""Search on a tiny network: what is tried, the budget, continuation, two workers, the winner."""

import dataclasses
import gc
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from forked import Forked, script
from layerwise.choosing import trials as module
from layerwise.choosing.budget import Budget
from layerwise.choosing.search import _unconfirmed, search
from layerwise.choosing.search_result import best_point, depth_curve
from layerwise.choosing.space import make_space, spread_depths
from layerwise.choosing.study import (
    TrialRow,
    _differences,
    open_study,
    optuna_module,
    quiet,
    rows_of,
    take_over,
    worker_name,
)
from layerwise.choosing.terms import metric_and_mode
from layerwise.errors import DataError, LayerwiseWarning, PlanError, RunError, TrainingError
from layerwise.layers.mapping import layer_map
from layerwise.plans.plan import Plan
from layerwise.report.page import write_report
from layerwise.training.classification import Classification
from layerwise.training.resuming import resume_job
from layerwise.training.run_folder import read_run
from layerwise.training.tasks import Scores
from layerwise.training.text_tasks import Regression
from layerwise.training.token_tasks import LanguageModelling

from .small import images, map_of, pretrained


@pytest.fixture(scope="module")
def model():
    return pretrained(norm=False, widths=(4, 4, 6, 6))


@pytest.fixture(scope="module")
def data():
    x, y = images(96, seed=5, size=12)
    return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])


def searched(model, data, **options):
    given = {"epochs": 2, "batch_size": 16, "depths": (1, 2, 5), **options}
    return search(model, *data, layers=map_of(model), **given)


def test_depths_are_about_six_with_both_ends():
    # a probe and everything are always among them, ascending, at most six
    for groups in range(1, 80):
        found = spread_depths(groups)
        assert found[0] == 1
        assert found[-1] == groups
        assert list(found) == sorted(set(found))
        assert len(found) <= 6


def test_every_choice_is_the_plan_it_says(model):
    # last 1 is the head, last 3 three groups with decayed rates, last 5 everything; and strategies by name
    layers = map_of(model)
    space = make_space(layers, strategies=["lp_ft"], epochs=4)
    learning = {
        choice: [n for n in layers.names if space.plan(layers, choice, 0.8).phases[-1].rate(n) > 0]
        for choice in space.choices
    }
    assert learning["last 1"] == ["fc"]
    assert learning["last 3"] == ["stage2", "stage3", "fc"]
    assert learning["last 5"] == list(layers.names)
    rates = space.plan(layers, "last 3", 0.8).phases[0].rates
    assert rates["stage2"] == pytest.approx(0.64)
    for decay in (1.0, 0.99996):  # a decay is drawn with all its digits, and rounded in the plan
        assert space.plan(layers, "last 3", decay).phases[0].rates["stage2"] == 1
    assert len(space.plan(layers, "lp_ft", 1.0).phases) == 2


def test_depths_of_groups_called_by_numbers_can_be_planned():
    # "frozen=1" was the first group or the one called so: depths of an nn.Sequential failed as trials
    parts = [layer for _ in range(4) for layer in (torch.nn.Linear(6, 6), torch.nn.ReLU())]
    layers = layer_map(torch.nn.Sequential(*parts, torch.nn.Linear(6, 2)), torch.randn(2, 6))
    space = make_space(layers)
    assert "2" in layers.names
    for k in space.depths:
        plan = space.plan(layers, f"last {k}", 0.9)
        assert [name for name in layers.names if plan.phases[0].rate(name) > 0] == list(layers.names[-k:])


def test_search_tries_each_depth_first_and_returns_the_best(model, data):
    # five trials: the three depths, then two that TPE draws; the winner has the highest value of all
    said = []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = searched(model, data, trials=5, say=said.append)
    assert [row.choice for row in found.trials[:3]] == ["last 1", "last 2", "last 5"]
    assert len(found.trials) == len(said) - 1 == 5
    assert said[-1] == f"best: {found.best.choice} at lr {found.best.lr:.2g}; making its run"
    values = [row.value for row in found.trials if row.value is not None]
    assert found.best.mean == max(values)
    assert {point.choice for point in found.curve} == {"last 1", "last 2", "last 5"}
    assert found.run is not None
    assert found.run.metrics["balanced_accuracy"] == pytest.approx(found.best.mean)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert "balanced_accuracy" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["best"]["choice"] == found.best.choice


def test_in_memory_search_is_repeatable(model, data):
    # the same seed draws the same settings and reaches the same values
    one, two = (searched(model, data, trials=5, refit="none") for _ in range(2))
    assert [(t.choice, t.lr, t.value) for t in one.trials] == [(t.choice, t.lr, t.value) for t in two.trials]
    assert one.run is None


def test_more_seeds_give_error_bars_and_decide(model, data):
    # each choice's best setting runs with three seeds; means and standard errors are over them
    found = searched(model, data, trials=3, seeds=3, refit="none", depths=(1, 5))
    for point in found.curve:
        own = [
            t.value
            for t in found.trials
            if (t.choice, t.lr, t.decay) == (point.choice, point.lr, point.decay)
        ]
        assert point.seeds == len(own) == 3
        assert point.mean == pytest.approx(sum(own) / 3)
        assert point.error == pytest.approx(torch.tensor(own).std().item() / 3**0.5, abs=1e-6)
    assert {t.seed for t in found.trials} == {0, 1, 2}


def test_trials_share_the_frozen_prefix(model, data, monkeypatch):
    # every trial gets the same pool
    pools = []
    real = module.fit

    def spied(*args, **options):
        pools.append(options["cache_pool"])
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", spied)
    searched(model, data, trials=3, refit="none")
    assert len(pools) == 3
    assert all(pool is pools[0] for pool in pools)


def test_models_of_former_trials_are_given_back(model, data, monkeypatch):
    # what a run leaves in reference cycles would pile up, a network a trial
    seen, alive = [], []
    real = module.fit

    def spied(trial_model, *args, **options):
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(trial_model))
        return real(trial_model, *args, **options)

    monkeypatch.setattr(module, "fit", spied)
    gc.disable()
    try:
        searched(model, data, trials=4, refit="none")
    finally:
        gc.enable()
    assert max(alive) <= 1  # the run that was just told may be at hand


def test_bad_trials_are_pruned_but_never_the_first_of_a_choice(model, data, monkeypatch):
    # a pruner that says yes to everything: only later trials of a choice that has a result are cut
    monkeypatch.setattr(optuna_module().trial.Trial, "should_prune", lambda self: True)
    found = searched(model, data, trials=6, refit="none")
    assert [row.state for row in found.trials[:3]] == ["complete"] * 3
    assert all(row.state == "pruned" and row.epochs == 1 for row in found.trials[3:])


def test_interrupted_search_goes_on_without_losing_a_trial(model, data, tmp_path, monkeypatch):
    # Ctrl-C in the fourth trial; the second call keeps three, runs the fourth again with its settings
    real, calls = module.fit, []

    def interrupted(*args, **options):
        calls.append(options["lr"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searched(model, data, trials=5, out=tmp_path / "s")
    found = searched(model, data, trials=5, out=tmp_path / "s")
    finished = [row for row in found.trials if row.state in ("complete", "pruned")]
    assert len(finished) == 5
    assert calls[4] == calls[3]
    assert [row.state for row in found.trials].count("failed") == 1
    assert "1 interrupted" in found.counted
    assert Plan.load(tmp_path / "s" / "plan.yaml") == found.plan
    saved = json.loads((tmp_path / "s" / "search.json").read_text())
    assert saved["run"]["out"] == str(found.run.out)
    assert (found.run.out / "model.safetensors").exists()


class Odd(Classification):
    """Measures something that is not defined on these data."""

    def scores(self, metrics):
        found = super().scores(metrics)
        return Scores({**found.values, "odd": float("nan")}, found.tables)


def test_a_metric_that_is_not_a_number_does_not_lose_the_result(model, data, tmp_path):
    # JSON knows no NaN: null, as in the winner's own record
    found = searched(model, data, trials=2, out=tmp_path / "s", fit_options={"task": Odd(tuple("0123"))})
    assert math.isnan(found.run.metrics["odd"])
    saved = json.loads((tmp_path / "s" / "search.json").read_text())
    assert saved["run"]["metrics"]["odd"] is None
    write_report(tmp_path / "s", tmp_path / "page.html")


def test_finished_search_called_again_only_reads(model, data, tmp_path):
    # nothing is run twice: the same trials, and the winner's run is read, its weights untouched
    first = searched(model, data, trials=3, out=tmp_path / "s")
    stamp = (first.run.out / "model.safetensors").stat().st_mtime_ns
    again = searched(model, data, trials=3, out=tmp_path / "s")
    assert again.trials == first.trials
    assert again.run.metrics == first.run.metrics
    assert again.run.history == first.run.history
    weights = first.run.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in again.run.model.state_dict().items())
    assert (first.run.out / "model.safetensors").stat().st_mtime_ns == stamp


def test_storage_of_another_search_is_refused(model, data, tmp_path):
    # other epochs are another space; the difference is named
    searched(model, data, trials=1, out=tmp_path / "s", refit="none")
    with pytest.raises(RunError, match="\n  - space epochs: 2 there, 3 given\nGive the same"):
        searched(model, data, trials=1, out=tmp_path / "s", epochs=3)


def test_other_data_of_the_same_size_is_refused(model, data, tmp_path):
    # trials about other images are not taken for trials about these
    searched(model, data, trials=1, out=tmp_path / "s", refit="none")
    x, y = images(96, seed=6, size=12)
    other = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
    with pytest.raises(RunError, match=r"train_data.*\n.*val_data"):
        searched(model, other, trials=1, out=tmp_path / "s", refit="none")


def test_any_optuna_storage_url_works(model, data, tmp_path):
    # SQLite by its URL holds the trials for Optuna's own tools to read
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    searched(model, data, trials=2, storage=url, name="mine", refit="none")
    with quiet():
        study = optuna_module().load_study(study_name="mine", storage=url)
    assert len(study.trials) >= 2
    assert study.best_value > 0


def test_workers_that_begin_together_on_a_new_storage_all_open_it(model, data, tmp_path):
    # each tries to make the tables; without a second look all but one found "table studies already exists"
    pytest.importorskip("sqlalchemy")
    space, together = make_space(map_of(model)), threading.Barrier(4)

    def begin(_: int) -> object:
        together.wait()
        return open_study(
            f"sqlite:///{tmp_path / 'study.db'}", "a", about={}, space=space, mode="max", seed=0
        )

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(begin, range(4)))) == 4


def test_minutes_stop_a_search(model, data):
    # a budget of no time: nothing begins, and that is an error that says so
    with pytest.raises(DataError, match=r"no trial of 0 was completed\. Give more minutes"):
        searched(model, data, minutes=1e-9)


def test_a_trial_that_outlasts_the_budget_is_cut_off_and_run_later(model, data, tmp_path, monkeypatch):
    # the first trial is finished all the same; the second ends after an epoch and is the next one's first
    said = []
    monkeypatch.setattr(Budget, "overrun", property(lambda self: True))
    monkeypatch.setattr(Budget, "spent", property(lambda self: any("cut off" in line for line in said)))
    found = searched(model, data, trials=2, out=tmp_path / "s", refit="none", say=said.append)
    assert [row.state for row in found.trials] == ["complete", "failed"]
    monkeypatch.undo()
    assert "cut off" in said[1]
    again = searched(model, data, trials=2, out=tmp_path / "s", refit="none")
    done = [row for row in again.trials if row.state == "complete"]
    assert [row.setting for row in done] == [row.setting for row in found.trials[:2]]


def test_a_search_can_begin_with_a_choice_at_a_rate(model, data):
    # the named one comes first, at its rate; the others as always; wrong ones are refused
    strategies = ["surgical(which=first)"]
    found = searched(
        model, data, trials=2, strategies=strategies, begin_with=[(strategies[0], 0.002)], refit="none"
    )
    assert (found.trials[0].choice, found.trials[0].lr) == (strategies[0], 0.002)
    assert found.trials[1].choice == "last 1"
    # a named strategy has no first group to be told
    assert [cells[:2] for cells in (p.cells() for p in found.curve)] == [
        ["last 1", "fc"],
        [strategies[0], "-"],
    ]
    assert f"best: {found.best.described} at" in str(found)
    assert "(from surgical" not in str(found)
    with pytest.raises(PlanError, match=r"begin_with has 'last 9' at 0\.001"):
        searched(model, data, begin_with=[("last 9", 0.001)])
    with pytest.raises(PlanError, match="begin_with has 'last 1' at 7"):
        searched(model, data, begin_with=[("last 1", 7.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (0, 9)}, "depth 0 .*\n.*depth 9"),
        ({"lr": (1e-2, 1e-4)}, "lr is"),
        ({"decay": (0.5, 1.5)}, "decay is"),
        ({"strategies": ["top_q"]}, "top_q"),
        ({"depths": ()}, "no depth"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_bad_spaces_are_refused_with_all_problems(model, data, options, message):
    # before anything is trained
    with pytest.raises(PlanError, match=f"(?s){message}"):
        searched(model, data, **options)


def test_another_word_for_refit_is_refused(model, data):
    # it left out the winner's run
    with pytest.raises(DataError, match="refit is 'best'; expected 'winner' or 'none'"):
        searched(model, data, refit="best", say=pytest.fail)


def test_bad_budgets_metrics_and_missing_validation(model, data):
    # zero trials, a metric that nobody measures, and no validation data
    with pytest.raises(DataError, match="trials is 0"):
        searched(model, data, trials=0)
    with pytest.raises(
        DataError, match="'speed' is not measured on this data; expected one of val_loss, acc"
    ):
        searched(model, data, trials=1, metric="speed")
    with pytest.raises(DataError, match=r"val is None.*--val-frac"):
        search(model, data[0], None)


@pytest.mark.parametrize("mine", ["run.json", "plan.yaml"])
def test_a_search_does_not_write_over_a_run_or_a_plan(model, data, tmp_path, mine):
    # plan.yaml of a run is what it is resumed with, and of a user what he wrote
    (tmp_path / mine).write_text("mine")
    with pytest.raises(RunError, match=r"holds .*Name another folder: --out \(out=\)"):
        searched(model, data, trials=1, out=tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(mine, "mine")]


@pytest.mark.parametrize("storage", ["nothing://x", "sqlite:////no/such/folder/a.db"])
def test_a_storage_that_cannot_be_opened_is_told(model, data, storage):
    # which one, and what would do
    with pytest.raises(RunError, match=f"storage '{storage}' cannot be opened .*sqlite:///search.db"):
        searched(model, data, trials=1, storage=storage)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("damage", [b"\x00\xff\n", b'{"op_code": 99, "worker_id": "a"}\n', b'{"op_code"\n'])
def test_a_journal_that_was_altered_is_told_and_left_as_it_is(model, data, tmp_path, damage, first):
    # it is named, and nothing is written behind what nobody can read
    searched(model, data, trials=1, epochs=1, out=tmp_path, refit="none")
    journal = tmp_path / "search.journal"
    altered = damage + b"\n" + journal.read_bytes() if first else journal.read_bytes() + damage
    journal.write_bytes(altered)
    with pytest.raises(RunError, match=r"journal .*search.journal cannot be read .*Put the old one back"):
        searched(model, data, trials=2, epochs=1, out=tmp_path, refit="none")
    assert journal.read_bytes() == altered


def test_a_journal_whose_last_line_was_cut_short_is_gone_on_with(model, data, tmp_path):
    # a full disk or a loss of power leaves half a line; it is told, and the trials before it are kept
    searched(model, data, trials=2, epochs=1, out=tmp_path, refit="none")
    journal = tmp_path / "search.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    with pytest.warns(LayerwiseWarning, match=r"last line of .*search.journal was cut short"):
        found = searched(model, data, trials=3, epochs=1, out=tmp_path, refit="none")
    assert sum(row.state == "complete" for row in found.trials) >= 3
    assert searched(model, data, trials=3, epochs=1, out=tmp_path, refit="none").trials == found.trials


def test_a_lock_that_a_killed_worker_left_is_not_waited_for(model, data, tmp_path, monkeypatch):
    # Optuna's own, a link beside the journal, would be waited for without end where the path is relative
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "search.journal.lock").symlink_to("a/search.journal")
    assert len(searched(model, data, trials=1, epochs=1, out="a", refit="none").trials) == 1


WORKER = """
import sys, time
sys.path.insert(0, {tests!r})
from unit.choosing.test_search import searched, pretrained, images, TensorDataset
x, y = images(96, seed=5, size=12)
data = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
model = pretrained(norm=False, widths=(4, 4, 6, 6))
print("ready", flush=True)
found = searched(model, data, trials={trials}, out={out!r}, say=lambda text: print(text, flush=True))
print("done", "run" if found.run else "no run", flush=True)
"""


def start_worker(folder, trials):
    path = folder / "worker.py"
    path.write_text(WORKER.format(tests=str(Path(__file__).parents[2]), out=str(folder / "s"), trials=trials))
    return Forked(script, path)


def test_two_workers_share_one_storage(tmp_path):
    # together they run each trial once; one of them makes the winner's run
    workers = [start_worker(tmp_path, 8) for _ in range(2)]
    ended = [worker.finish(240) for worker in workers]
    assert all(done.returncode == 0 for done in ended), ended
    saved = json.loads((tmp_path / "s" / "search.json").read_text())
    finished = [t for t in saved["trials"] if t["state"] in ("complete", "pruned")]
    assert len(finished) == 8
    settings = [(t["choice"], t["lr"], t["decay"]) for t in finished]
    assert len(set(settings)) == len(settings)
    assert sum(done.stdout.count("trial ") for done in ended) == len(finished)
    assert saved["run"] is not None
    assert len(list((tmp_path / "s").glob("winner-trial-*"))) >= 1


SPACE = make_space(map_of(pretrained(norm=False, widths=(4, 4, 6, 6))), depths=(1, 2, 5))


def half_drawn(study, names, worker, **fixed):
    """A running trial of a worker that died when it had drawn so many settings."""
    if fixed:
        study.enqueue_trial(fixed, user_attrs={"seed": 0})
    trial = study.ask()
    if worker:
        trial.set_user_attr("worker", worker)
        trial.set_user_attr("seed", 0)
    if "choice" in names:
        trial.suggest_categorical("choice", SPACE.choices)
    if "lr" in names:
        trial.suggest_float("lr", *SPACE.lr, log=True)
    return trial


@pytest.mark.parametrize("names", [(), ("choice",), ("choice", "lr")])
@pytest.mark.parametrize("named", [True, False])
def test_a_trial_killed_while_its_settings_were_drawn_is_run_again(names, named):
    # SIGKILL between two draws: the row is left out, and what the queue had fixed is queued again in full
    fixed = {"choice": "last 2", "lr": 3e-3, "decay": 0.9}
    with quiet():
        study = open_study(None, "s", about={}, space=SPACE, mode="max", seed=0)
        half_drawn(study, names, worker_name() if named else None, **fixed)
        assert rows_of(study) == ()
        assert take_over(study, nameless_s=0.0) == 1
        again = half_drawn(study, ("choice", "lr"), worker_name())
        assert again.params == {"choice": "last 2", "lr": 3e-3}
        assert again.suggest_float("decay", *SPACE.decay) == 0.9


def test_what_a_dead_worker_had_drawn_is_kept_and_the_rest_drawn_anew(model, data, tmp_path):
    # a trial in the storage with only a choice, and one with nothing: the search goes on, none of them runs
    out = tmp_path / "s"
    searched(model, data, trials=3, out=out, refit="none")
    optuna = optuna_module()
    with quiet():
        backend = optuna.storages.journal.JournalFileBackend(str(out / "search.journal"))
        study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
        lost = half_drawn(study, ("choice",), worker_name())
        half_drawn(study, (), None)
    found = searched(model, data, trials=4, out=out, refit="none")
    states = [(row.choice, row.state) for row in found.trials]
    assert len(states) == 4
    assert states[3][0] == lost.params["choice"]
    assert "2 trials cut off before" in found.notes[0]


def test_a_nameless_trial_of_another_machine_has_time_to_tell_its_name():
    # without a common lock it is given up only after a minute
    with quiet():
        study = open_study(None, "s", about={}, space=SPACE, mode="max", seed=0)
        half_drawn(study, (), None)
        assert take_over(study) == 0


def test_confirming_runs_are_not_taken_by_depths_that_the_budget_left_out(model, data):
    # two trials for three depths: the third is not run in place of a confirming one
    found = searched(model, data, trials=2, seeds=2, refit="none")
    assert [(t.choice, t.seed) for t in found.trials[:2]] == [("last 1", 0), ("last 2", 0)]
    assert {(t.choice, t.seed) for t in found.trials[2:]} == {("last 1", 1), ("last 2", 1)}


def test_killed_worker_loses_no_trial(model, data, tmp_path):
    # SIGKILL in the middle: the next call finds the trial of the dead process and runs it again
    worker, before = start_worker(tmp_path, 50), 2
    worker.wait_for("\ntrial", times=before)
    time.sleep(0.2)
    worker.kill()
    worker.finish()
    found = searched(model, data, trials=before + 3, out=tmp_path / "s", refit="none")
    assert not any(row.state == "running" for row in found.trials)
    lost = [(t.choice, t.lr, t.decay) for t in found.trials if t.state == "failed"]
    again = [(t.choice, t.lr, t.decay) for t in found.trials if t.state in ("complete", "pruned")]
    assert set(lost) <= set(again)
    assert len(again) == len(set(again)) >= before + 1


@pytest.mark.skipif(sys.platform != "linux", reason="the start of a process is read from /proc")
def test_a_worker_whose_number_another_program_has_is_dead():
    # numbers are used again, after a reboot above all; a name without a start is an earlier version's
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = worker_name().rpartition(":")[0]
    _, _, began = worker_name().partition("@")
    with quiet():
        study = open_study(None, "s", about={}, space=SPACE, mode="max", seed=0)
        for lost, worker in enumerate((f"{host}:{other.pid}", f"{host}:{other.pid}@{int(began) - 1}")):
            half_drawn(study, ("choice",), worker)
            assert take_over(study) == lost
    other.communicate()


def test_a_worker_that_dies_meanwhile_is_not_waited_for(model, data, tmp_path):
    # its trial is run again by the one that is left, which makes the winner's run
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    worker = f"{worker_name().rpartition(':')[0]}:{dead.pid}"
    optuna = optuna_module()
    lost = []

    def say(text):
        if text.startswith("trial 0"):
            backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "s" / "search.journal"))
            study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
            trial = half_drawn(study, ("choice", "lr"), worker)
            trial.suggest_float("decay", *SPACE.decay)
            lost.append(trial.params)

    found = searched(model, data, trials=3, out=tmp_path / "s", say=say)
    done = [row for row in found.trials if row.state in ("complete", "pruned")]
    assert lost[0] in [{"choice": row.choice, "lr": row.lr, "decay": row.decay} for row in done]
    assert len(done) == 3
    assert found.run is not None


@pytest.mark.parametrize("place", ["", "pipe"])
def test_a_storage_that_is_no_file_is_refused(model, data, tmp_path, place):
    # a device such as /dev/zero would be read until memory is full; no lock is left beside it
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="is a folder, a device or a pipe"):
        searched(model, data, trials=1, storage=tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_winner_under_another_name_is_still_known_as_one(model, data, tmp_path):
    # Its search goes on with it under its own name alone; to resume it as a run of objects would be wrong.
    made = searched(model, data, trials=1, epochs=1, out=tmp_path / "s").run.out
    made.rename(tmp_path / "best")
    with pytest.raises(RunError, match=rf"a search's winner.*Move it back to '{re.escape(str(made))}'"):
        resume_job(tmp_path / "best")


def test_the_run_of_an_earlier_winner_is_not_that_of_the_new_one(model, data, tmp_path):
    # search.json keeps the run that is there only if it is the winner's
    out = tmp_path / "s"
    searched(model, data, trials=3, out=out)
    summary = out / "search.json"
    saved = json.loads(summary.read_text())
    searched(model, data, trials=3, out=out, refit="none")
    assert json.loads(summary.read_text())["run"] == saved["run"]
    saved["run"]["out"] = str(out / "winner-trial-99")
    summary.write_text(json.dumps(saved))
    searched(model, data, trials=3, out=out, refit="none")
    assert json.loads(summary.read_text())["run"] is None


CALLS = []


class Counted(torch.nn.Conv2d):
    """A convolution that counts its forward passes on real data."""

    def forward(self, x):
        if type(x) is torch.Tensor:
            CALLS.append(len(x))
        return super().forward(x)


def test_a_second_trial_of_a_depth_does_not_compute_its_prefix_again(data, monkeypatch):
    # with the shared cache a trial is one check on a few batches; without, trials x epochs x samples
    monkeypatch.setattr(optuna_module().trial.Trial, "should_prune", lambda self: False)
    counts, trials = {}, {}
    for cache in ("memory", "off"):
        torch.manual_seed(0)
        model = pretrained(norm=False, widths=(4, 4, 6, 6))
        first = model.stage0[0]
        counted = Counted(3, 4, 3, padding=1)
        counted.load_state_dict(first.state_dict())
        model.stage0[0] = counted
        CALLS.clear()
        trials[cache] = []
        searched(
            model, data, trials=3, depths=(1,), epochs=5, refit="none", fit_options={"cache": cache},
            say=lambda _, sums=trials[cache]: sums.append(sum(CALLS)),
        )  # fmt: skip
        counts[cache] = sum(CALLS)
    assert counts["off"] >= 3 * 5 * 96
    assert counts["memory"] < 0.3 * counts["off"]
    first, second, third = trials["memory"]
    assert third - second == second - first < first


def linear(outputs=1, inputs=6):
    """A small network of three layers with its map, and numbers or classes to learn."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(inputs, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(),
        torch.nn.Linear(8, outputs),
    )  # fmt: skip
    return model, layer_map(model, torch.zeros(2, inputs), granularity="layers")


def numbers(samples=96):
    """Inputs, and a number that is a sum of two of them: for training and for validation."""
    torch.manual_seed(1)
    x = torch.randn(samples, 6)
    y = x[:, 0] * 2 + x[:, 1]
    half = samples // 2
    return TensorDataset(x[:half], y[:half]), TensorDataset(x[half:], y[half:])


@pytest.mark.parametrize("metric", [None, "rmse", "mae", "loss", "val_loss"])
def test_errors_are_minimised_and_the_tasks_monitor_is_the_default(metric):
    # of regression the winner has the lowest error, whichever is asked for; correlation is maximised
    model, layers = linear()
    task = Regression.fitted(numbers()[0].tensors[1])
    options = {"epochs": 3, "depths": (1, 2, 3), "lr": (1e-3, 5e-2), "layers": layers, "refit": "none"}
    found = search(model, *numbers(), trials=3, metric=metric, fit_options={"task": task}, **options)
    assert found.metric == (metric or "rmse")
    assert found.mode == "min"
    values = [row.value for row in found.trials]
    assert found.best.mean == min(values) < max(values)


def test_a_metric_that_the_task_does_not_monitor_is_known_by_its_name():
    # mode from the task for its monitor, else from the table; accuracy and r2 are to rise
    task = Regression(monitor="r2", mode="max")
    assert metric_and_mode(None, None, {"task": task}) == ("r2", "max")
    assert metric_and_mode("mae", None, {"task": task}) == ("mae", "min")
    assert metric_and_mode("perplexity", None, {"task": LanguageModelling("masked_lm")}) == (
        "perplexity",
        "min",
    )
    assert metric_and_mode("val_loss", None, {}) == ("val_loss", "min")
    assert metric_and_mode(None, None, {}) == ("balanced_accuracy", "max")
    assert metric_and_mode("accuracy", None, {}) == ("accuracy", "max")


@pytest.mark.parametrize("metric", ["train_loss", "epoch"])
def test_a_metric_of_the_training_data_is_refused_before_the_first_trial(model, data, metric):
    # the message names a metric that will do, and nothing was trained
    said = []
    with pytest.raises(DataError, match=f"'{metric}' is of the training data.*'balanced_accuracy'"):
        searched(model, data, trials=1, metric=metric, say=said.append)
    assert not said


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (
            {"metric": "accurracy"},
            r"'accurracy' is not measured.*val_loss, accuracy.* Did you mean 'accuracy'",
        ),
        ({"fit_options": {"accumulate": 0}}, "accumulate is 0; expected a whole number"),
        ({"fit_options": {"acumulate": 2}}, "unexpected keyword argument 'acumulate'"),
    ],
)
def test_a_wrong_option_does_not_bind_the_folder(model, data, tmp_path, wrong, error):
    # nothing is written or trained before all are looked at, so the corrected call is no other search
    said = []
    with pytest.raises((DataError, TrainingError, TypeError), match=error):
        searched(model, data, trials=1, out=tmp_path / "s", say=said.append, **wrong)
    assert not said
    assert not (tmp_path / "s").exists()


class Late(Classification):
    """Tells its metrics only where something was counted."""

    def scores(self, metrics):
        if not metrics["accuracy"].update_called:
            raise ValueError
        return super().scores(metrics)


def test_a_metric_that_only_training_can_tell_is_refused_after_an_epoch(model, data):
    # of a task that does not tell its metrics beforehand
    options = {"task": Late(tuple("0123"))}
    assert searched(model, data, trials=1, metric="accuracy", fit_options=options).metric == "accuracy"
    with pytest.raises(
        DataError, match="'speed' is not measured on this data; expected one of val_loss, acc"
    ):
        searched(model, data, trials=1, metric="speed", fit_options=options)


def test_options_that_a_search_sets_itself_are_refused_by_name(model, data):
    # a seed or a folder for all trials would clash with its own
    with pytest.raises(DataError, match="fit_options has seed, out, which search sets"):
        searched(model, data, fit_options={"seed": 3, "out": "x", "clip_norm": 1.0})


def test_storage_of_other_weights_is_refused(model, data, tmp_path):
    # the same class with other weights is another model; what older versions wrote is refused as clearly
    searched(model, data, trials=1, out=tmp_path / "s", refit="none")
    other = pretrained(norm=False, widths=(4, 4, 6, 6), seed=1)
    with pytest.raises(RunError, match=r"\n  - weights: '\w{16}' there, '\w{16}' given\nGive the same"):
        searched(other, data, trials=1, out=tmp_path / "s", refit="none")
    with quiet():
        study = open_study(None, "s", about={}, space=SPACE, mode="max", seed=0)
        differing = list(_differences(study.user_attrs["about"], {"weights": "a"}))
    assert differing == [("weights", None, "a")]


def test_other_options_of_the_optimiser_are_another_search(model, data, tmp_path):
    # a mapping is compared by what it holds
    options = {"optimizer": torch.optim.SGD, "optimizer_options": {"momentum": 0.9}}
    searched(model, data, trials=1, out=tmp_path / "s", refit="none", fit_options=options)
    searched(model, data, trials=1, out=tmp_path / "s", refit="none", fit_options=options)
    options["optimizer_options"] = {"momentum": 0.5}
    with pytest.raises(RunError, match=r"optimizer_options momentum: 0\.9 there, 0\.5 given"):
        searched(model, data, trials=1, out=tmp_path / "s", refit="none", fit_options=options)


def test_a_choice_can_begin_at_several_rates(model, data):
    # both rates are tried, in the order given, before everything else
    begin = [("last 2", 5e-4), ("last 2", 5e-3), ("last 1", 1e-3)]
    found = searched(model, data, trials=4, begin_with=begin, refit="none")
    assert [(row.choice, row.lr) for row in found.trials[:3]] == begin
    assert found.trials[3].choice == "last 5"


def test_strategies_are_checked_with_the_epochs_of_the_search(model, data):
    # a probe and what follows it need two epochs; that is told before any trial
    layers = map_of(model)
    make_space(layers, strategies=["lp_ft"], epochs=2)
    with pytest.raises(PlanError, match="lp_ft: 1 of 1 epochs"):
        make_space(layers, strategies=["lp_ft"], epochs=1)


def row_of(number, value, *, seed=0, lr=1e-3, choice="last 1", state="complete", error=""):
    """A trial with a given outcome."""
    return TrialRow(number, choice, lr, 0.9, seed, state, value, 2, 1.0, error)


def test_a_setting_drawn_twice_with_one_seed_is_one_seed():
    # the twice-drawn one has no error and does not stand before a better one that was drawn once
    layers = map_of(pretrained(norm=False, widths=(4, 4, 6, 6)))
    rows = [row_of(0, 0.5), row_of(1, 0.5), row_of(2, 0.9, lr=2e-3), row_of(3, 0.7, choice="last 2")]
    rows.append(row_of(4, 0.7, choice="last 2"))
    curve = depth_curve(rows, SPACE, layers, "max", seeds=1)
    assert [(p.choice, p.mean, p.seeds, p.error) for p in curve] == [
        ("last 1", 0.9, 1, 0.0),
        ("last 2", 0.7, 1, 0.0),
    ]
    assert best_point(curve, "max", seeds=1).choice == "last 1"
    assert [point.cells()[3] for point in curve] == ["-", "-"]
    assert depth_curve(rows, SPACE, layers, "max", seeds=2) == curve


def counted_fits(monkeypatch):
    """Return the list that grows by a plan and rate with each training."""
    made, fit = [], module.fit

    def counting(*args, **options):
        made.append((options["plan"], options["lr"]))
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit", counting)
    return made


@pytest.mark.parametrize("limit", [{"trials": 8}, {"minutes": 1.0}])
def test_a_search_ends_when_its_ranges_leave_no_other_setting(model, data, monkeypatch, limit):
    # one rate, one decay and three depths are three settings, whatever the budget
    made = counted_fits(monkeypatch)
    found = searched(model, data, lr=(1e-3, 1e-3), decay=(0.9, 0.9), refit="none", **limit)
    assert len(made) == len(found.trials) == 3
    assert "every setting" in str(found)


def test_a_setting_that_is_drawn_again_is_not_trained_again(model, data, monkeypatch):
    # a probe has no decay, so with one rate all its trials are one; other depths have a decay to be drawn
    made, said = counted_fits(monkeypatch), []
    found = searched(model, data, depths=(1, 3), lr=(1e-3, 1e-3), trials=12, refit="none", say=said.append)
    probes = [row for row in found.trials if row.choice == "last 1"]
    assert len(found.trials) == 12
    assert len(probes) > 1
    assert len(made) == 12 - len(probes) + 1
    assert {(row.state, row.value) for row in probes} == {("complete", probes[0].value)}
    assert sum("not trained again" in line for line in said) == len(probes) - 1
    (point,) = (point for point in found.curve if point.choice == "last 1")
    assert (point.seeds, point.error) == (1, 0.0)


@pytest.mark.parametrize(("state", "outcome"), [("PRUNED", "pruned"), ("FAIL", "complete")])
def test_a_setting_that_was_pruned_is_pruned_again_and_one_that_was_cut_off_is_trained(
    model, data, monkeypatch, tmp_path, state, outcome
):
    # a trial that failed, without an error, is one that was cut off
    optuna, made = optuna_module(), counted_fits(monkeypatch)
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: False)
    options = {"depths": (1, 2), "storage": tmp_path / "j.log", "refit": "none"}
    searched(model, data, trials=2, **options)
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "j.log"))
    )
    with quiet():
        study = optuna.load_study(study_name="search", storage=storage)
    params = {"choice": "last 2", "lr": 2e-3, "decay": 0.8}
    ranges = study.trials[0].distributions
    study.add_trial(
        optuna.trial.create_trial(
            params=params,
            distributions=ranges,
            state=optuna.trial.TrialState[state],
            user_attrs={"seed": 0},
        )
    )
    study.enqueue_trial(params, user_attrs={"seed": 0})
    found = searched(model, data, trials=4 if state == "PRUNED" else 3, **options)
    assert found.trials[-1].setting == ("last 2", 2e-3, 0.8)
    assert found.trials[-1].state == outcome
    assert len(made) == 2 + (outcome == "complete")


def test_only_settings_with_all_seeds_are_compared():
    # a lucky single run does not stand before a mean of two, and of two confirmed ones the better mean does
    layers = map_of(pretrained(norm=False, widths=(4, 4, 6, 6)))
    rows = [row_of(0, 0.7), row_of(1, 0.6, seed=1), row_of(2, 0.9, lr=2e-3)]
    (point,) = depth_curve(rows, SPACE, layers, "max", seeds=2)
    assert (point.lr, point.seeds) == (1e-3, 2)
    rows.append(row_of(3, 0.8, lr=2e-3, seed=1))
    (point,) = depth_curve(rows, SPACE, layers, "max", seeds=2)
    assert (point.lr, point.mean) == (2e-3, pytest.approx(0.85))


def test_a_new_leader_is_confirmed_and_one_that_failed_is_not(model, data):
    # continued: the setting that leads by the search's own seed lacks a seed, though another has both
    layers = map_of(model)
    experiment = module.Experiment(
        model, *data, None, layers, SPACE, "balanced_accuracy", "max", 16, 0, {}
    )  # fmt: skip
    rows = [row_of(0, 0.7), row_of(1, 0.6, seed=1)]
    assert _unconfirmed(experiment, rows, 2) is None
    rows.append(row_of(2, 0.9, lr=2e-3))
    assert _unconfirmed(experiment, rows, 2) == ({"choice": "last 1", "lr": 2e-3, "decay": 0.9}, 1)
    assert _unconfirmed(experiment, [*rows, row_of(3, None, lr=2e-3, seed=1, state="running")], 2) is None
    failed = row_of(3, None, lr=2e-3, seed=1, state="failed", error="loss is not finite")
    assert _unconfirmed(experiment, [*rows, failed], 2) is None


def test_more_trials_can_improve_a_search_with_seeds(model, data, tmp_path, monkeypatch):
    # outcomes by rate alone: continued from one trial to six, the winner is the best rate of all
    rates = []
    train_by = module.Experiment.train_by
    for name in ("value_of", "outcome_of"):  # after an epoch, and in the end
        monkeypatch.setattr(module, name, lambda metric, entry: rates[-1])
    monkeypatch.setattr(
        module.Experiment,
        "train_by",
        lambda self, plan, lr, seed, **more: (rates.append(lr), train_by(self, plan, lr, seed, **more))[1],
    )
    options = {"seeds": 2, "depths": (5,), "out": tmp_path / "s", "refit": "none", "epochs": 1}
    first = searched(model, data, trials=1, **options)
    found = searched(model, data, trials=8, **options)
    best = max(row.lr for row in found.trials)
    assert found.best.lr == best > first.best.lr
    assert found.best.seeds == 2


def test_an_interrupted_run_of_the_winner_is_finished(model, data, tmp_path, monkeypatch):
    # Ctrl-C after its first epoch: the next call goes on with it, and returns it finished
    real = module.Experiment.train_by

    def interrupted(self, plan, lr, seed, **more):
        def stop(entry):
            raise KeyboardInterrupt

        return real(self, plan, lr, seed, **more, **({"on_epoch": stop} if "out" in more else {}))

    whole = searched(model, data, trials=3)
    monkeypatch.setattr(module.Experiment, "train_by", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searched(model, data, trials=3, out=tmp_path / "s")
    monkeypatch.undo()
    (target,) = (tmp_path / "s").glob("winner-trial-*")
    assert read_run(target)["result"] is None
    said = []
    found = searched(model, data, trials=3, out=tmp_path / "s", say=said.append)
    assert said == [f"best: {found.best.choice} at lr {found.best.lr:.2g}; its run is in {target}"]
    assert read_run(target)["result"] is not None
    assert [entry["epoch"] for entry in found.run.history] == [0, 1]
    assert found.run.metrics == whole.run.metrics
    assert json.loads((tmp_path / "s" / "search.json").read_text())["run"]["out"] == str(target)


def test_labels_that_are_no_integers_need_no_layer_map():
    # the map is made from the inputs of the training data, whatever its labels are
    model, _ = linear()
    task = Regression.fitted(numbers()[0].tensors[1])
    found = search(model, *numbers(), trials=1, epochs=1, fit_options={"task": task}, refit="none")
    assert found.metric == "rmse"


def test_a_trial_of_another_machine_is_left_to_it(model, data, tmp_path):
    # nobody here can tell whether its process lives: it is not run again, and the winner's run waits for it
    out = tmp_path / "s"
    searched(model, data, trials=2, out=out, refit="none")
    optuna = optuna_module()
    with quiet():
        backend = optuna.storages.journal.JournalFileBackend(str(out / "search.journal"))
        study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
        half_drawn(study, ("choice", "lr"), "elsewhere:1").suggest_float("decay", *SPACE.decay)
    said = []
    found = searched(model, data, trials=2, out=out, say=said.append)
    assert [row.state for row in found.trials] == ["complete", "complete", "running"]
    assert found.run is None
    assert not said  # that its run is made, above all
    assert found.notes == ("still running elsewhere: 1 trial; the last worker makes the winner's run",)


def test_a_trial_of_a_process_of_another_user_is_left_to_it(monkeypatch):
    # the system does not let us signal it, so it lives
    def refuse(process, signal):
        raise PermissionError

    with quiet():
        study = open_study(None, "s", about={}, space=SPACE, mode="max", seed=0)
        half_drawn(study, (), worker_name())
        monkeypatch.setattr(os, "kill", refuse)
        assert take_over(study, nameless_s=0.0) == 0


def test_a_winners_run_that_cannot_be_made_does_not_lose_the_result(model, data, tmp_path):
    # its folder holds a damaged record: the search is written all the same, with a note
    out = tmp_path / "s"
    searched(model, data, trials=1, out=out)
    (record,) = out.glob("winner-trial-*/run.json")
    record.write_text("{")
    found = searched(model, data, trials=1, out=out)
    assert found.run is None
    assert str(record) in found.notes[0]
    assert json.loads((out / "search.json").read_text())["best"]["mean"] == found.best.mean


def failing(monkeypatch, outcomes):
    """Make the trials fail for which `outcomes` has an error; the others are real."""
    real, left = module.Experiment.train_by, iter(outcomes)

    def train_by(self, *args, **options):
        if error := next(left):
            raise error
        return real(self, *args, **options)

    monkeypatch.setattr(module.Experiment, "train_by", train_by)


def test_a_search_ends_when_its_first_three_trials_fail(model, data, monkeypatch):
    # with the error of the last
    said = []
    failing(monkeypatch, [TrainingError(f"the loss is {k}") for k in range(9)])
    with pytest.raises(TrainingError, match="the loss is 2"):
        searched(model, data, trials=9, say=said.append)
    assert len(said) == 3


def test_a_search_whose_trials_all_fail_says_why(model, data, monkeypatch):
    # more of them would fail as well
    failing(monkeypatch, [TrainingError("the loss is infinite.")] * 2)
    with pytest.raises(DataError, match=r"no trial of 2 was completed: the loss is infinite\.$"):
        searched(model, data, trials=2)


def test_trials_that_fail_are_trials_of_the_budget(model, data, monkeypatch):
    # else a search of which only the first trial fits into memory would never end
    failing(monkeypatch, [None, *[TrainingError("out of memory")] * 3])
    found = searched(model, data, trials=4, refit="none")
    assert [row.state for row in found.trials] == ["complete", *["failed"] * 3]
    assert found.best.choice == "last 1"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_trial_whose_metric_is_no_number_has_failed(model, data, monkeypatch, loss):
    # it chooses nothing; left out of the budget, NaN in each trial would make a search that never ends
    real, known = module.fit, []

    def fit(*args, **options):
        result = real(*args, **options)
        known.append(result.metrics)
        return dataclasses.replace(result, metrics={**result.metrics, "loss": loss}) if known[1:] else result

    monkeypatch.setattr(module, "fit", fit)
    found = searched(model, data, trials=3, metric="val_loss", refit="none")
    assert [row.state for row in found.trials] == ["complete", "failed", "failed"]
    assert found.trials[1].error.startswith(f"val_loss is {loss}, by which no plan can be compared.")


def test_a_part_of_the_minutes_is_kept_for_confirming():
    # after 40 of 60 s: no new trial where several seeds are to follow, else as many as there is time for
    began_s = time.monotonic() - 40
    rows = [row_of(number, 0.5) for number in range(50)]
    assert Budget(None, 1, 1, began_s).allows(rows)
    confirming = Budget(None, 1, 2, began_s)
    assert not confirming.allows(rows)
    assert not confirming.spent
