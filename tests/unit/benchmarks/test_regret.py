"""The tables of regret, on results made by hand."""

import json

import pytest
from benchmarks import advice
from benchmarks.advice import FIRST, GRID, GROUPS, each, regrets, table
from benchmarks.held_out import MissingPackageError


def rows(task, samples, seed, accuracies, advised=None):
    found = [
        {"task": task, "samples": samples, "seed": seed, "plan": plan, "accuracy": value}
        for plan, value in zip(GRID, accuracies)
    ]
    if advised is not None:
        found.append({**found[0], "plan": "advise", "accuracy": advised, "chosen": "full"})
    return found


TWO_SEEDS = [
    *rows("elpv", 100, 0, [0.8, 0.7, 0.7, 0.7, 0.7, 0.7], advised=0.7),
    *rows("elpv", 100, 1, [0.7, 0.9, 0.7, 0.7, 0.7, 0.7], advised=0.9),
]


def test_regret_is_of_the_means_over_the_seeds():
    # means .75 and .8 of the first two plans: the advice regrets nothing, though one seed lost 10 points
    by_size, by_cell, whole = regrets(TWO_SEEDS)
    assert by_size["advise"] == pytest.approx([0.0])
    assert by_size["linear_probe"] == pytest.approx([5.0])
    assert by_cell["advise"] == pytest.approx([10.0, 0.0])
    assert whole == 2


def test_a_cell_without_its_whole_grid_does_not_count():
    # the best plan may be the one that was not trained
    assert regrets(TWO_SEEDS[1:])[2] == 1
    assert "no cell has its whole grid" in table(TWO_SEEDS[1:5], cells=9)


def test_a_chooser_that_has_not_all_seeds_of_a_size_is_not_averaged_with_those_that_have():
    # auto ran with the first seed alone: no row by size, one by cell
    more = [*TWO_SEEDS, {**TWO_SEEDS[0], "plan": "auto", "accuracy": 0.8}]
    by_size, by_cell, _ = regrets(more)
    assert by_size["auto"] == []
    assert by_cell["auto"] == pytest.approx([0.0])


def test_what_was_advised_first_differs_where_it_was_kept():
    # one seed has another first advice; in the other it is what is advised now
    first = {**TWO_SEEDS[0], "plan": FIRST, "accuracy": 0.75}
    _, by_cell, _ = regrets([*TWO_SEEDS, first])
    assert by_cell["advise"] == pytest.approx([10.0, 0.0])
    assert by_cell[FIRST] == pytest.approx([5.0, 0.0])
    assert FIRST not in regrets(TWO_SEEDS)[1]


def test_the_table_says_of_how_many_cells_it_is():
    # two of nine, whatever other groups have
    assert "2 of 9 cells" in table(TWO_SEEDS, cells=9)


def test_each_size_names_its_best_plan_and_what_was_advised():
    # the best of the means over seeds, once what was said twice
    last = each(TWO_SEEDS).splitlines()[-1]
    assert last.split() == ["elpv", "100", "2", "0.00", "top_k(k=2)", "(0.800),", "full"]


def test_groups_are_printed_apart(tmp_path, capsys):
    # a held-out task's results are in its own table only
    (tmp_path / "elpv.json").write_text(json.dumps(TWO_SEEDS))
    (tmp_path / "emoji.json").write_text(json.dumps(rows("emoji", 100, 0, [0.5] * 6)))
    assert advice.main(["--results", str(tmp_path), "--each"]) == 0
    printed = capsys.readouterr().out
    development, held_out = printed.split("held out\n")
    assert development.startswith("development\n")
    assert "2 of 36 cells" in development
    assert f"1 of {9 * len(GROUPS['held out'])} cells" in held_out
    assert "emoji" not in development


def test_a_task_without_its_data_is_named_and_the_others_run(tmp_path, capsys, monkeypatch):
    # exit code 1 and a message, and the task after it has been measured
    class Cell:
        def __init__(self, task, samples, seed):
            self.key = {"task": task, "samples": samples, "seed": seed}

    def load(name):
        if name == "emoji":
            raise MissingPackageError("the font is missing")
        return name

    monkeypatch.setattr(advice, "load_task", load)
    monkeypatch.setattr(advice, "Cell", Cell)
    monkeypatch.setattr(advice, "measure", lambda cell, plan, rows: {"accuracy": 0.5})
    options = ["--run", "--tasks", "emoji,elpv", "--sizes", "100", "--seeds", "0,1", "--plans", "full"]
    assert advice.main([*options, "--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "emoji is left out: the font is missing\n"
    assert len(json.loads((tmp_path / "elpv.json").read_text())) == 2
    assert not (tmp_path / "emoji.json").exists()
