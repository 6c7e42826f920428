"""`layerwise evaluate`: what `fit` measured on the same files, and one clear message for bad input."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from image_folders import make_images
from layerwise.cli.main import app
from tiny_text import save_tiny, topic_rows, write_csv

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

SHORT = ["--epochs", "2", "--lr", "1e-2", "--batch-size", "8", "--cache", "off"]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fit(*arguments: object) -> dict:
    result = command("fit", *arguments, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def evaluate(*arguments: object) -> dict:
    result = command("evaluate", *arguments, "--batch-size", 8, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "photos"
    for part, count in (("train", 12), ("val", 5), ("test", 7)):
        make_images(folder / part, classes=("green", "red", "blue"), count=count)
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("runs") / "a"
    model = ["--model", "timm:test_efficientnet", "--no-pretrained", "--input-size", 64]
    return out, fit(*model, "--data", images, "--strategy", "full", "--out", out)


def test_images_are_measured_as_fit_measured_them(images: Path, run: tuple[Path, dict]) -> None:
    out, result = run
    assert evaluate(out, images) == {
        "samples": 21,
        "metrics": result["test"],
        "tables": result["test_tables"],
    }
    assert evaluate(out, images, "--part", "val")["metrics"] == result["metrics"]
    shown = command("evaluate", out, images).stdout
    assert re.search(r"samples +21 ", shown)
    assert "Confusion" in shown


def test_fewer_classes_keep_the_runs_numbers(images: Path, run: tuple[Path, dict], tmp_path: Path) -> None:
    # "red" is the run's third class, and the second one of a folder without "blue".
    for name in ("green", "red"):
        (tmp_path / name).symlink_to(images / "test" / name)
    out, result = run
    rows = [row for row in result["test_tables"]["per_class"] if row["class"] != "blue"]
    found = evaluate(out, tmp_path)
    assert found["samples"] == 14
    assert [row["recall"] for row in found["tables"]["per_class"][1:]] == [row["recall"] for row in rows]


def test_one_class_alone_is_measured(images: Path, run: tuple[Path, dict], tmp_path: Path) -> None:
    (tmp_path / "red").symlink_to(images / "test" / "red")
    rows = run[1]["test_tables"]["per_class"]
    found = evaluate(run[0], tmp_path)
    assert found["samples"] == 7
    assert found["metrics"]["accuracy"] == pytest.approx(rows[2]["recall"], abs=1e-6)


def test_classes_that_the_run_does_not_know_are_named(run: tuple[Path, dict], tmp_path: Path) -> None:
    make_images(tmp_path / "photos", count=2)
    (tmp_path / "photos" / "red").rename(tmp_path / "photos" / "rod")
    result = command("evaluate", run[0], tmp_path / "photos")
    assert result.exit_code == 1
    told = "class 'rod' of train is none of the model's (blue, green, red). Did you mean 'red'?"
    assert told in result.stderr


def test_a_part_that_is_not_there_is_named(run: tuple[Path, dict], tmp_path: Path) -> None:
    result = command("evaluate", run[0], make_images(tmp_path / "photos", count=2), "--part", "val")
    assert result.exit_code == 1
    assert "have the parts train, and no val. Name one: --part" in result.stderr


@pytest.mark.parametrize(
    ("task", "label", "samples"),
    [
        ("text_classification", lambda row: row["topic"], 9),
        ("multi_label", lambda row: f"{row['topic']};{'fast' if 'fast' in row['text'] else 'slow'}", 9),
        ("regression", lambda row: len(row["text"]) / 40, 9),
        ("masked_lm", None, 11),  # blocks of the joined texts
    ],
)
def test_texts_are_measured_as_fit_measured_them(task: str, label, samples: int, tmp_path: Path) -> None:
    # With the columns, the separator and the length of training, none of which is named again.
    pytest.importorskip("transformers")
    save_tiny(tmp_path / "bert", "bert")
    rows = [
        {"body": row["text"], "part": "test" if number % 4 == 0 else "train"}
        | ({"kind": label(row)} if label else {})
        for number, row in enumerate(topic_rows(36))
    ]
    write_csv(tmp_path / "texts.csv", rows)
    options = ["--task", task, "--text-column", "body", "--split-column", "part", "--max-length", 6]
    options += ["--label-column", "kind"] if label else []
    options += ["--label-separator", ";"] if task == "multi_label" else []
    result = fit(
        *("--model", f"hf:{tmp_path / 'bert'}", "--data", tmp_path / "texts.csv", *options),
        *("--strategy", "full", "--out", tmp_path / "run"),
    )
    found = evaluate(tmp_path / "run", tmp_path / "texts.csv")
    assert found["samples"] == samples
    assert found["metrics"] == pytest.approx(result["test"], rel=1e-4)  # last digits: other order of batches
    assert found["tables"].keys() == result["test_tables"].keys()
    assert command("evaluate", tmp_path / "run", tmp_path / "texts.csv").exit_code == 0
    with_column = (tmp_path / "texts.csv").read_text()
    (tmp_path / "new.csv").write_text(with_column.replace(",part", ",month"))  # a column of splits no more
    assert command("evaluate", tmp_path / "run", tmp_path / "new.csv").exit_code == 0


def test_scores_on_what_was_learned_from_are_told_as_such(images: Path, run: tuple[Path, dict]) -> None:
    for part, told in (("train", True), ("test", False)):
        result = command("evaluate", run[0], images, "--part", part)
        assert ("the run learned from these data" in result.stderr) is told


def test_options_of_another_kind_of_data_are_refused(images: Path, run: tuple[Path, dict]) -> None:
    result = command("evaluate", run[0], images, "--text-column", "body")
    assert result.exit_code == 2
    assert "--text-column" in result.stderr.replace("\x1b[0m", "")
    assert "on images" in result.stderr


def test_data_of_a_name_are_known_as_those_of_training(tmp_path: Path, monkeypatch) -> None:
    # A name of the hub is no path that could be made absolute; its columns are those of training too.
    pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(topic_rows(18))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": rows})
    model = ["--model", f"hf:{save_tiny(tmp_path / 'bert', 'bert')}", "--label-column", "topic"]
    fit(*model, "--data", "hf:topics", "--strategy", "full", "--out", tmp_path / "run")
    result = command("evaluate", tmp_path / "run", "hf:topics")
    assert result.exit_code == 0, result.output
    assert "the run learned from these data" in result.stderr
