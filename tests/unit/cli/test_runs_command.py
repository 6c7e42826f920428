"""`layerwise runs`: several runs side by side, also those that did not end."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import layerwise
from layerwise.cli.main import app
from layerwise.training.classification import Classification
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of one metric, one of another, one that was cut short, and what is no run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in {
        "a": {"lr": 1e-5},
        "b": {"lr": 1e-2, "test": tiny_data()},
        "c": {"task": Classification(("0", "1", "2"), monitor="loss")},
        "d": {},
    }.items():
        layerwise.fit(
            model := Tiny(),
            *(tiny_data(), tiny_data()),
            plan=tiny_plan(),
            layers=tiny_layers(model),
            out=folder / name,
            cache="off",
            progress=False,
            **options,
        )
    record = folder / "d" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "result": None}))
    (folder / "notes").mkdir()
    return folder


def test_runs_of_one_metric_stand_together_the_best_first(folder: Path) -> None:
    rows = json.loads(command("runs", folder, "--json").stdout)
    assert [Path(row["path"]).name for row in rows][-1] == "c"
    first, second, cut = rows[:3]
    assert first["validation"] >= second["validation"]
    assert {Path(first["path"]).name, Path(second["path"]).name} == {"a", "b"}
    assert (Path(cut["path"]).name, cut["validation"], cut["state"]) == ("d", None, "after 4 epochs")
    tested = next(row for row in rows if row["path"].endswith("b"))
    result = json.loads((folder / "b" / "run.json").read_text())["result"]
    assert tested["test"] == result["test"]["balanced_accuracy"]
    assert tested["validation"] == result["metrics"]["balanced_accuracy"]
    shown = command("runs", folder / "a", folder / "c").stdout
    assert "balanced_accuracy" in shown
    assert "loss" in shown


def test_a_folder_without_runs_and_an_altered_run_are_told(folder: Path, tmp_path: Path) -> None:
    assert "is not a run" in command("runs", tmp_path).stderr
    record = json.loads((folder / "a" / "run.json").read_text())
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text(json.dumps({**record, "settings": {}}))
    result = command("runs", tmp_path)
    assert result.exit_code == 1
    assert "KeyError('lr')" in result.stderr
    assert "layerwise runs RUN" in result.stderr
