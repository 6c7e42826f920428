"""`layerwise fit` and `predict`: what they print, and one clear message for every bad input."""

import csv
import io
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import layerwise
from image_folders import make_images
from layerwise.cli.main import app
from layerwise.layers.randomness import seed_everything
from layerwise.sources.images import open_images
from layerwise.sources.models import open_model
from layerwise.training.history import read_history

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

MODEL = ["--model", "timm:test_efficientnet", "--no-pretrained", "--input-size", "64"]
SHORT = ["--epochs", "2", "--lr", "1e-2", "--batch-size", "8", "--cache", "off"]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fit(*arguments: object, strategy: str = "top_k:k=2") -> Result:
    return command("fit", *MODEL, "--strategy", strategy, *SHORT, *arguments)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    result = fit("--data", images, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def test_the_command_line_and_python_do_the_same(images: Path, run: Path) -> None:
    # The same steps in Python: the same history to the last digit, the same weights.
    seed_everything(0)
    opened = open_model("timm:test_efficientnet", num_classes=2, pretrained=False, input_size=64)
    assert opened.preprocessing is not None
    data = open_images(images, opened.preprocessing, seed=0)
    layers = layerwise.layer_map(opened.model, opened.example_input, granularity="blocks")
    result = layerwise.fit(
        opened.model,
        data.train,
        data.val,
        plan=layerwise.top_k(layers, k=2, epochs=2),
        lr=1e-2,
        batch_size=8,
        cache="off",
        progress=False,
    )
    assert result.history == read_history(run / "history.jsonl")
    loaded = layerwise.load_run(run).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in opened.model.state_dict().items())


def test_what_the_frozen_part_gives_is_kept_for_later_runs(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The second run finds it in the folder; both end in the weights of one without a cache.
    kept = ["--cache", "disk", "--cache-folder", tmp_path / "kept"]
    weights = {}
    for name, options in {"plain": [], "first": kept, "second": kept}.items():
        caplog.clear()
        with caplog.at_level("INFO", logger="layerwise.cache"):
            result = fit("--data", images, "--val-frac", "0", "--out", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert ("computed before" in caplog.text) is (name == "second")
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["plain"] == weights["first"] == weights["second"]
    assert "EfficientNet" in command("cache", "ls", tmp_path / "kept").output


def test_a_table_of_images_by_its_own_column_names(images: Path, tmp_path: Path) -> None:
    # A table whose columns have other names trains an image model; unlabelled rows can be left out.
    files = sorted(images.rglob("*.png")) + sorted(images.rglob("*.jpg"))
    rows = [
        f"{file};{file.parent.name};{'val' if number % 4 == 0 else 'train'}"
        for number, file in enumerate(files)
    ]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["file;kind;part", *rows, f"{files[0]};;train"]))
    columns = ["--path-column", "file", "--label-column", "kind", "--split-column", "part"]
    bad = fit("--data", table, *columns, "--out", tmp_path / "a")
    assert bad.exit_code == 1
    assert "--skip-bad-rows" in bad.stderr
    done = fit("--data", table, *columns, "--skip-bad-rows", "--out", tmp_path / "a", "--json")
    assert done.exit_code == 0, done.stderr
    assert f"left out row {len(files) + 1}: has no kind" in done.stderr
    samples = json.loads((tmp_path / "a" / "run.json").read_text())["data"]["samples"]
    assert sum(samples.values()) == len(files)
    assert samples["val"] == -(-len(files) // 4)
    unnamed = fit("--data", table, "--out", tmp_path / "b")
    assert unnamed.exit_code == 1
    assert "--path-column" in unnamed.stderr
    wrong = fit("--data", table, "--out", tmp_path / "c", *columns[:-1], "parts")
    assert "Did you mean 'part'? Name yours: --split-column." in " ".join(wrong.stderr.split())
    folder = fit("--data", images, *columns, "--out", tmp_path / "b")
    assert folder.exit_code == 1
    assert "is no table" in folder.stderr
    told = command("predict", tmp_path / "a", table, "--skip-bad-images", "--json")
    assert told.exit_code == 0, told.output
    (tmp_path / "other.csv").write_text(f"image\n{images / 'red' / '0.png'}\n")
    without = command("predict", tmp_path / "a", tmp_path / "other.csv")
    assert "no column 'file'; its columns are 'image'. Name yours: --path-column." in " ".join(
        without.stderr.split()
    )
    named = command("predict", tmp_path / "a", tmp_path / "other.csv", "--path-column", "image", "--json")
    assert len(json.loads(named.stdout)["predictions"]) == 1


def test_what_would_not_be_used_is_refused(images: Path, run: Path, tmp_path: Path) -> None:
    # Options of another strategy, kind of data or demo are usage errors that name the option and the reason.
    started = ["fit", *MODEL, "--data", images, "--strategy", "full", "--out", tmp_path / "a"]
    for arguments, option, why in (
        (started, "--budget-minutes", "auto"),
        (started, "--search-share", "auto"),
        (started, "--mismatched", "--weights"),
        (["predict", run, images], "--text-column", "is a run on images"),
        (["demo", "images", "--out", tmp_path / "b"], "--per-topic", "demo on texts"),
        (["demo", "text", "--out", tmp_path / "b"], "--image-size", "demo on images"),
    ):
        result = command(
            *arguments, option, {"--search-share": "0.5", "--mismatched": "drop_head"}.get(option, "64")
        )
        assert result.exit_code == 2, result.output
        told = " ".join(result.stderr.replace("│", " ").split())
        assert option in told
        assert why in told


def test_results_are_printed_for_people_and_for_machines(images: Path, tmp_path: Path) -> None:
    # Tables on stdout, progress on stderr; --json prints one document and nothing else on stdout.
    table = fit("--data", images, "--out", tmp_path / "a", "--test-frac", "0.2")
    assert table.exit_code == 0, table.output
    for part in ("test balanced_accuracy", "trained parameters", "Per class (test)", "Confusion", "predict"):
        assert part in table.stdout
    title, blank, first, *_ = [line.strip() for line in table.stdout.splitlines()]
    assert (title, blank) == ("Result", "")
    assert first.startswith("validation ")
    assert "epoch 2/2" in table.stderr
    machine = fit("--data", images, "--out", tmp_path / "b", "--json")
    data = json.loads(machine.stdout)
    assert data["metrics"].keys() >= {"accuracy", "balanced_accuracy", "macro_f1"}
    assert len(data["history"]) == 2


def test_predictions_come_in_three_forms(images: Path, run: Path) -> None:
    # The same labels and probabilities as a table, CSV and JSON; a folder stands for its images.
    files = [images / "red" / "0.png", images / "green" / "0.png"]
    data = json.loads(command("predict", run, *files, "--format", "json").stdout)["predictions"]
    rows = list(csv.DictReader(io.StringIO(command("predict", run, *files, "--format", "csv").stdout)))
    assert [row["image"] for row in data] == [row["image"] for row in rows] == list(map(str, files))
    for one, other in zip(data, rows):
        assert one["label"] == other["label"]
        assert one["probabilities"]["red"] == pytest.approx(float(other["p_red"]), abs=1e-6)
        assert sum(one["probabilities"].values()) == pytest.approx(1)
    table = command("predict", run, *files).stdout
    assert all(f"{row['probability']:.3f}" in table for row in data)
    every = json.loads(command("predict", run, images, "--json").stdout)["predictions"]
    assert len(every) == 24


def test_a_dry_run_prints_and_trains_nothing(images: Path, tmp_path: Path) -> None:
    # Timeline, heat map, time and memory; no folder is made.
    out = tmp_path / "run"
    shown = fit("--data", images, "--out", out, "--dry-run", strategy="lp_ft")
    assert shown.exit_code == 0, shown.output
    for part in ("time per epoch", "peak memory", "trainable parameters", "classifier", "2 phases"):
        assert part in shown.stdout
    data = json.loads(fit("--data", images, "--dry-run", "--json", strategy="lp_ft").stdout)
    first, second = data["costs"]
    assert 0 < first["trainable"] < second["trainable"]
    assert first["step_s"] > 0
    assert first["peak_bytes"] > 2**20
    assert len(data["plan"]["phases"]) == 2
    assert not out.exists()


def test_a_dry_run_of_auto_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    # There is no plan yet that could be shown; before data are read.
    result = fit("--data", tmp_path / "nowhere", "--dry-run", strategy="auto")
    assert result.exit_code == 2
    assert "advise" in result.output


def test_a_plan_file_is_used_and_kept(images: Path, run: Path, tmp_path: Path) -> None:
    # The plan of one run trains another the same way.
    result = command(
        "fit", *MODEL, "--plan", run / "plan.yaml", "--data", images, "--out", tmp_path / "b",
        "--lr", "1e-2", "--batch-size", "8", "--cache", "off",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b" / "history.jsonl").read_bytes() == (run / "history.jsonl").read_bytes()


def fails(result: Result, *parts: str) -> None:
    """Expect exit code 1, one message on stderr with all `parts`, no traceback, nothing on stdout."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr, result.stderr


def test_unknown_names_come_with_the_closest(images: Path, tmp_path: Path) -> None:
    # Model, strategy, option of a strategy, optimiser.
    out = tmp_path / "run"
    arguments = ["--strategy", "full", "--data", images, "--out", out]
    fails(command("fit", "--model", "timm:resnet19", *arguments), "resnet19", "resnet18")
    fails(command("fit", "--model", "resnet18", *arguments), "resnet18", "timm:resnet18")
    fails(fit("--data", images, "--out", out, strategy="top_q:k=2"), "'top_q'", "top_k")
    fails(fit("--data", images, "--out", out, strategy="top_k:n=2"), "no option 'n'")
    fails(fit("--data", images, "--out", out, "--optimizer", "adam_w"), "adamw")
    assert not out.exists()


def test_data_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    # Missing, one class, an empty class, classes that differ between train and val.
    out = ["--out", tmp_path / "run"]
    fails(fit("--data", tmp_path / "nothing", *out), "nothing", "does not exist")
    one = make_images(tmp_path / "one", classes=("green",))
    fails(fit("--data", one, *out), "one class", "'green'")
    empty = make_images(tmp_path / "empty")
    (empty / "blue").mkdir()
    fails(fit("--data", empty, *out), "blue", "has no images")
    parts = tmp_path / "parts"
    make_images(parts / "train")
    make_images(parts / "val", classes=("green", "blue"))
    fails(fit("--data", parts, *out), "'blue' is in val and not in train", "'red' is in train and not in val")
    assert not (tmp_path / "run").exists()


def test_broken_images_are_named_or_left_out(tmp_path: Path) -> None:
    # A truncated file and a file of text: both named; with --skip-bad-images listed, and training goes on.
    images = make_images(tmp_path / "images")
    whole = (images / "red" / "1.png").read_bytes()
    (images / "red" / "1.png").write_bytes(whole[: len(whole) // 2])
    (images / "green" / "2.png").write_text("not an image")
    fails(fit("--data", images, "--out", tmp_path / "run"), "red/1.png", "green/2.png", "--skip-bad-images")
    result = fit("--data", images, "--out", tmp_path / "run", "--skip-bad-images")
    assert result.exit_code == 0, result.output
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {Path(path).name for path, _ in about["data"]["skipped"]} == {"1.png", "2.png"}
    assert "left out" in result.stderr
    assert "red/1.png" in result.stderr
    bad = images / "red" / "1.png"
    fails(command("predict", tmp_path / "run", bad), "1.png")
    left = command("predict", tmp_path / "run", bad, images / "red" / "2.png", "--skip-bad-images", "--json")
    assert len(json.loads(left.stdout)["predictions"]) == 1
    assert "1.png" in left.stderr


def test_a_folder_that_cannot_be_made_is_told_first(tmp_path: Path) -> None:
    # Before the data, which are not there, are looked for.
    (tmp_path / "file").write_text("")
    told = fit("--data", tmp_path / "nowhere", "--out", tmp_path / "file" / "run")
    assert told.exit_code == 2
    assert "cannot be written" in told.stderr


def test_wrong_numbers_are_told(images: Path, tmp_path: Path) -> None:
    # k larger than the number of groups, negative and NaN rates, on the command line and in a file.
    data = ["--data", images, "--out", tmp_path / "run"]
    fails(fit(*data, strategy="top_k:k=99"), "k=99", "groups")
    for rate in ("-1", "nan", "0"):
        told = fit(*data, "--lr", rate)
        assert told.exit_code == 2
        assert "'--lr'" in told.stderr
    fails(fit(*data, strategy="full:epochs=3"), "epochs is given twice: 3 and 2")
    made = tmp_path / "plan.yaml"
    text = "granularity: blocks\ngroups: [a, b]\nphases:\n- {name: p, epochs: 1, rates: {a: -1.0, b: .nan}}\n"
    made.write_text(text)
    fails(command("fit", *MODEL, *data, "--plan", made), "-1.0", "nan")
    made.write_text("groups: [a, b\n")
    fails(command("fit", *MODEL, *data, "--plan", made), "plan.yaml")
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_model_lists_the_differences(images: Path, run: Path, tmp_path: Path) -> None:
    # Both sides: groups that only the plan has, and groups that only the model has.
    other = ["--model", "timm:test_vit", "--no-pretrained"]
    arguments = ["--plan", run / "plan.yaml", "--data", images, "--out", tmp_path / "run"]
    fails(
        command("fit", *other, *arguments), "only the plan has: conv_stem", "only the model has: patch_embed"
    )


def test_a_folder_with_a_run_is_refused_before_anything_else(images: Path, run: Path) -> None:
    # Also when nothing else about the command is right.
    fails(fit("--data", images, "--out", run), "already holds a run", "--resume")
    fails(
        command("fit", "--model", "timm:x", "--data", "y", "--strategy", "z", "--out", run), "already holds"
    )


def test_a_run_is_not_resumed_on_other_data(images: Path, run: Path, tmp_path: Path) -> None:
    # A class more, or a file less, since the run began: told, and nothing is overwritten.
    mine = tmp_path / "photos"
    shutil.copytree(images, mine)
    out = tmp_path / "run"
    assert fit("--data", mine, "--out", out).exit_code == 0
    make_images(mine, classes=("blue",))
    before = (out / "model.safetensors").read_bytes()
    fails(command("fit", "--resume", out), "classes", "'blue'")
    shutil.rmtree(mine / "blue")
    (mine / "red" / "0.png").unlink()
    fails(command("fit", "--resume", out), "data.")
    assert (out / "model.safetensors").read_bytes() == before


def test_weights_for_other_classes_are_refused_or_lose_their_head(run: Path, tmp_path: Path) -> None:
    # Two classes in the file, three in the data: told; with --mismatched drop_head the rest is taken.
    three = make_images(tmp_path / "three", classes=("green", "red", "blue"))
    start = ["--data", three, "--weights", run / "model.safetensors"]
    fails(fit(*start, "--out", tmp_path / "a"), "is for 2 classes (green, red), not 3")
    result = fit(*start, "--out", tmp_path / "b", "--mismatched", "drop_head")
    assert result.exit_code == 0, result.output
    assert layerwise.load_run(tmp_path / "b").classes == ("blue", "green", "red")


def test_a_pickle_that_would_run_code_is_refused(images: Path, tmp_path: Path) -> None:
    # As weights to start from: named, refused, not run.
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    fails(fit("--data", images, "--out", tmp_path / "run", "--weights", tmp_path / "evil.pth"), "evil.pth")
    assert not ran.exists()


def test_usage_errors_have_exit_code_two(images: Path, run: Path, tmp_path: Path) -> None:
    # What is missing or contradicts itself on the command line.
    where = ["--data", images, "--out", tmp_path / "x"]
    for arguments in (
        ["fit"],
        ["fit", *MODEL, "--data", images, "--out", tmp_path / "x"],
        ["fit", *MODEL, "--data", images, "--out", tmp_path / "x", "--strategy", "full", "--plan", "p.yaml"],
        ["fit", *MODEL, *where, "--plan", "p.yaml", "--granularity", "blocks"],
        ["fit", "--resume", run, "--out", tmp_path / "x"],
        ["fit", "--epochs", "many"],
        ["predict", run],
    ):
        result = command(*arguments)
        assert result.exit_code == 2, arguments
        assert "Traceback" not in result.stderr


def test_warnings_are_one_line_without_the_code_s_place(images: Path, tmp_path: Path) -> None:
    # Batch-norm that trains on eight images at a time draws a warning; a person sees just that.
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = fit("--data", images, "--out", tmp_path / "run", strategy="full")
    (line,) = [line for line in result.stderr.splitlines() if "batch-norm layers train on batches" in line]
    assert line.startswith("warning: ")
    assert ".py:" not in result.stderr


def test_runs_that_are_none_are_told(tmp_path: Path, run: Path, images: Path) -> None:
    # No folder, an empty folder; the runs beside it are named.
    fails(command("predict", tmp_path / "nothing", images), "does not exist")
    fails(command("fit", "--resume", run.parent / "b"), "does not exist", "Runs in", "a")
    fails(command("predict", run, tmp_path / "no.png"), "no.png", "does not exist")


def usage(result: Result) -> str:
    """Expect exit code 2; return what stderr says, without the frame."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join("".join(c for c in result.stderr if c not in "│╭╮╰╯─").split())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_resumed_run_takes_no_other_options(run: Path) -> None:
    # What would be ignored is refused by name, also --dry-run and switches that are off.
    for option in (["--lr", "1e-3"], ["--dry-run"], ["--no-pretrained"], ["--strategy", "full"]):
        assert option[0] in usage(command("fit", "--resume", run, "--workers", "0", *option))


def test_a_finished_run_is_only_shown(run: Path) -> None:
    # It is said that nothing was trained, and no file of the run changes.
    before = files_of(run)
    result = command("fit", "--resume", run, "--workers", "0", "--cache", "off")
    assert result.exit_code == 0, result.output
    assert "was finished already" in result.stderr
    assert "resumed from" not in result.stderr
    assert files_of(run) == before


def test_a_run_is_not_put_among_other_files(images: Path, tmp_path: Path) -> None:
    # A user's plan stays as it was; hidden files do not count.
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "plan.yaml").write_text("mine")
    fails(fit("--data", images, "--out", mine), "none of a run's (plan.yaml)", "--out")
    assert files_of(mine) == {"plan.yaml": b"mine"}
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".gitignore").write_text("*")
    assert fit("--data", images, "--out", hidden, "--epochs", "1").exit_code == 0


def test_a_run_is_not_put_into_its_data(tmp_path: Path) -> None:
    # The folder of the data itself, one in it, one around it.
    photos = make_images(tmp_path / "around" / "photos")
    before = files_of(photos)
    for out in (photos, photos / "runs" / "a", photos.parent):
        fails(fit("--data", photos, "--out", out), "lie in each other", str(out))
    assert files_of(photos) == before


def test_numbers_out_of_range_are_usage_errors(images: Path, tmp_path: Path) -> None:
    # Told at once, with the option, before a model is opened.
    for option, value in (
        ("--batch-size", "0"),
        ("--epochs", "0"),
        ("--workers", "-1"),
        ("--accumulate", "0"),
        ("--lm-epochs", "-1"),
        ("--lm-lr", "0"),
        ("--max-length", "1"),
        ("--val-frac", "1"),
        ("--test-frac", "-0.1"),
    ):
        arguments = [
            "--model",
            "timm:nothing",
            "--data",
            images,
            "--out",
            tmp_path / "x",
            "--strategy",
            "full",
        ]
        assert option in usage(command("fit", *arguments, option, value))


@pytest.mark.parametrize("model", ["timm:nosuch", "torchvision:nosuch", "nosuch.py:build", "nosuch"])
def test_a_wrong_model_is_told_before_wrong_data(tmp_path: Path, model: str) -> None:
    # It is quick to look up; data may take long to read.
    where = ["--data", tmp_path / "none", "--out", tmp_path / "x"]
    result = command("fit", "--model", model, "--strategy", "full", *where)
    assert result.exit_code == 1
    assert "nosuch" in result.stderr
    assert "none" not in result.stderr


def test_commands_to_go_on_with_can_be_pasted(images: Path, tmp_path: Path) -> None:
    # Paths with blanks are quoted.
    out = tmp_path / "my run"
    result = fit("--data", images, "--out", out, "--epochs", "1")
    assert f"layerwise predict {shlex.quote(str(out))}" in result.stdout.replace("\n", "")


def test_the_command_to_predict_takes_no_run_for_an_option(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # --out=-run is a folder; pasted as it stands it would be read as options.
    monkeypatch.chdir(tmp_path)
    result = fit("--data", images, "--out=-run", "--epochs", "1")
    told = re.search(r"layerwise (predict .*) IMAGE", result.stdout)
    assert told is not None, result.output
    predicted = command(*shlex.split(told[1]), images / "red" / "2.png")
    assert predicted.exit_code == 0, predicted.output


def test_predict_runs_a_python_file_only_where_it_is_named(images: Path, tmp_path: Path) -> None:
    # The command that fit prints names it; without that predict refuses and says what to name.
    (tmp_path / "my net.py").write_text(
        "from torch import nn\n"
        "from layerwise.sources.preprocessing import Preprocessing\n"
        "def net(num_classes=2):\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                        nn.Linear(4, num_classes))\n"
        "    return net, Preprocessing(crop=(32, 32), resize=None)\n"
    )
    result = command(
        "fit", "--model", f"{tmp_path / 'my net.py'}:net", "--data", images, "--out", tmp_path / "run",
        "--strategy", "full", "--epochs", "1",
    )  # fmt: skip
    told = re.search(r"layerwise (predict .*) IMAGE", result.stdout.replace("\n", " "))
    assert told is not None, result.output
    picture = images / "red" / "2.png"
    predicted = command(*shlex.split(told[1]), picture, "--json")
    assert predicted.exit_code == 0, predicted.output
    assert json.loads(predicted.stdout)["predictions"][0]["image"] == str(picture)
    refused = command("predict", tmp_path / "run", picture)
    assert refused.exit_code == 1
    assert "does not run unasked. Name it: layerwise predict RUN --model" in refused.stderr


def test_files_left_out_come_without_the_advice_to_leave_them_out(
    run: Path, images: Path, tmp_path: Path
) -> None:
    # --skip-bad-images is given already.
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    result = command("predict", run, bad, images / "red" / "2.png", "--skip-bad-images")
    assert "bad.png" in result.stderr
    assert "--skip-bad-images" not in result.stderr


def test_near_names_of_runs_come_first(run: Path, tmp_path: Path) -> None:
    # Of many runs the closest are shown, and how many more there are.
    for number in range(12):
        shutil.copytree(run, tmp_path / f"a{number:02}")
    shutil.copytree(run, tmp_path / "zebra")
    fails(command("fit", "--resume", tmp_path / "zebrra"), "Runs in", ": zebra, a00", "and 5 more")
    fails(command("report", tmp_path / "zebrra"), "does not exist", "zebra")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--optimizer", "adam_w"], "Did you mean 'adamw'"),
        (["--precision", "fp16"], "precision is 'fp16', which needs a GPU"),
        (["--tracker", "nothing"], "tracker 'nothing' is not known"),
        (["--workers", "999999"], "workers is 999999; expected"),
        (["--workers", "999999", "--dry-run"], "workers is 999999; expected"),
        (["--schedule", "cosin"], "Did you mean 'cosine'"),
        (["--norms", "frezze"], "Did you mean 'freeze'"),
        (["--augment", "flop"], "Did you mean 'flip'"),
        (["--strategy", "lineer_probe"], "Did you mean 'linear_probe'"),
    ],
)
def test_names_that_are_wrong_are_told_before_data_are_read(
    options: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading may take long.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    read = []
    monkeypatch.setattr("layerwise.training.job._open_data", lambda *args: read.append(args))
    result = fit("--data", tmp_path / "data", "--out", tmp_path / "run", *options)
    assert told in result.output.replace("\n", " ")
    assert result.exit_code == 1
    assert not read


def test_too_many_workers_of_a_resumed_run_are_told_before_data_are_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for a new run.
    read = []
    monkeypatch.setattr("layerwise.training.job._open_data", lambda *args: read.append(args))
    fails(command("fit", "--resume", run, "--workers", "999999"), "workers is 999999; expected")
    assert not read
