"""`layerwise demo text` on a generated table and a tiny encoder: what it prints and what it leaves."""

import json

import pytest
from typer.testing import CliRunner

from layerwise.cli.main import app
from layerwise.sources import debian
from layerwise.training.run import load_run
from tiny_text import save_tiny, topic_rows, write_csv

pytest.importorskip("transformers")


def test_three_arms_on_one_split(tmp_path):
    # Three runs that differ in what learned, with equal data, each readable and a transformers folder.
    save_tiny(tmp_path / "bert", "bert")
    rows = [{"text": row["text"], "label": row["topic"]} for row in topic_rows(60)]
    write_csv(tmp_path / "a.csv", rows)
    arguments = ["demo", "text", "--data", tmp_path / "a.csv", "--model", f"hf:{tmp_path / 'bert'}"]
    arguments += ["--epochs", 2, "--out", tmp_path / "runs", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["arm"] for row in found["rows"]] == ["linear probe", "full fine-tuning", "selective"]
    trained = [row["trained_parameters"] for row in found["rows"]]
    assert trained[0] < trained[2] < trained[1]
    abouts = [load_run(row["run"]).about for row in found["rows"]]
    assert abouts[0]["data"]["samples"] == abouts[1]["data"]["samples"] == abouts[2]["data"]["samples"]
    assert all(
        (tmp_path / "runs" / name / "transformers/config.json").is_file()
        for name in ("linear-probe", "full-fine-tuning", "selective")
    )
    assert found["predict"].startswith("echo ")


def test_without_package_lists_it_says_how_to_go_on(tmp_path, monkeypatch):
    # A machine that is no Debian gets the reason and the way out, before any weights are read.
    save_tiny(tmp_path / "bert", "bert")
    monkeypatch.setattr(debian.shutil, "which", lambda name: None)
    arguments = ["demo", "text", "--model", f"hf:{tmp_path / 'bert'}", "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "apt-cache" in result.stderr
    assert "layerwise demo text --data FILE.csv" in result.stderr
    # a table of one's own that is missing is just that
    result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "gone.csv")])
    assert result.exit_code == 1
    assert "gone.csv' does not exist" in result.stderr
    assert "Debian" not in result.stderr.split("DataError")[1]


def test_a_table_without_the_columns_is_not_told_of_options_of_fit(tmp_path):
    # The demo has no --label-column.
    write_csv(tmp_path / "a.csv", topic_rows(9))
    arguments = ["demo", "text", "--data", str(tmp_path / "a.csv"), "--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "no column 'label'; its columns are 'text', 'topic'." in result.stderr
    assert "--label-column" not in result.stderr


@pytest.mark.parametrize("what", ["images", "text"])
def test_a_file_in_place_of_the_folder_is_told_before_anything_is_read(tmp_path, what):
    # By its own name, and not that of a run in it.
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(app, ["demo", what, "--out", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "is a file. Name another place." in " ".join(result.stderr.replace("│", " ").split())
    assert "Model:" not in result.stderr
