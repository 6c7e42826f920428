"""`layerwise diagnose`, `signature`, `advise`, `search`, and `fit --strategy auto`, on images in folders."""

import json
import re

import pytest
import torch
from rich.table import Table
from safetensors.torch import load_file
from typer.testing import CliRunner

from image_folders import make_images
from layerwise.choosing.shift import shift
from layerwise.choosing.signature import Signature
from layerwise.cli.choosing_tables import shift_tables
from layerwise.cli.main import app
from layerwise.plans.plan import Plan

MODEL = "timm:test_efficientnet"
SIZE = ["--input-size", "64"]


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    # the network has no packaged weights, so random ones stand in for pretrained ones
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return ["--weights", path]


def test_diagnose_prints_groups_and_json(images, weights, tmp_path):
    # a table for people; the same as JSON; and a picture
    shown = command("diagnose", MODEL, "--data", images, *SIZE, *weights)
    assert shown.exit_code == 0, shown.output
    assert "Shift against running statistics" in shown.output
    assert "linear probe" in shown.output
    out = tmp_path / "shift.svg"
    told = command("diagnose", MODEL, "--data", images, *SIZE, *weights, "--json", "--plot", out)
    data = json.loads(told.stdout)
    assert data["method"] == "norms"
    assert len(data["groups"]) > 2
    assert out.read_text().startswith("<svg")


def test_what_cannot_be_read_is_left_out_by_options_that_there_are(tmp_path):
    # fit has them; these commands would refuse them
    make_images(tmp_path / "photos", count=4)
    (tmp_path / "photos" / "red" / "1.png").write_text("no image")
    told = command("advise", "timm:resnet10t", "--no-pretrained", "--data", tmp_path / "photos").stderr
    assert "--skip-bad-images of layerwise fit and predict" in told.replace("\n", " ")
    (tmp_path / "t.csv").write_text("path,label\nphotos/red/0.png,\n")
    told = command("advise", "timm:resnet10t", "--no-pretrained", "--data", tmp_path / "t.csv").stderr
    assert "--skip-bad-rows of layerwise fit" in told.replace("\n", " ")


def test_signature_of_a_source_and_its_use(images, weights, tmp_path):
    # a flat folder is a source too; the target measured against its own images shows no shift
    path = tmp_path / "sig.safetensors"
    made = command("signature", MODEL, "--data", images, "-o", path, *SIZE, *weights, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["bytes"] == path.stat().st_size
    assert Signature.load(path).samples == json.loads(made.stdout)["samples"]
    told = command("diagnose", MODEL, "--data", images, "--signature", path, *SIZE, *weights, "--json")
    data = json.loads(told.stdout)
    assert data["method"] == "signature"
    assert data["where"] == "none"
    both = command(
        "diagnose", MODEL, "--data", images, "--signature", path, "--source", images, *SIZE, *weights
    )
    assert both.exit_code == 1
    assert "give one of them" in both.stderr


def test_a_table_of_images_needs_no_labels(images, weights, tmp_path):
    # what a folder tells, a table of the same images tells
    named = sorted(images.glob("*/*"))
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["file", *map(str, named)]))
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, path in enumerate(named):
        (loose / f"{number:03}{path.suffix}").write_bytes(path.read_bytes())
    signatures = []
    for data in ([table, "--path-column", "file"], [loose]):
        out = tmp_path / f"{len(signatures)}.safetensors"
        made = command("signature", MODEL, "--data", *data, "-o", out, *SIZE, *weights)
        assert made.exit_code == 0, made.output
        signatures.append(load_file(out))
    one, other = signatures
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    told = command("diagnose", MODEL, "--data", table, "--path-column", "file", *SIZE, *weights)
    assert told.exit_code == 0, told.output
    assert "names no classes" in told.stderr


def test_images_without_class_folders_are_diagnosed(images, weights, tmp_path):
    # the shift of the inputs needs no labels; all images are measured, and the label side is left out
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted(images.rglob("*.png"))):
        (loose / f"{number}.png").write_bytes(file.read_bytes())
    told = command("diagnose", MODEL, "--data", loose, *SIZE, *weights, "--json")
    assert told.exit_code == 0, told.output
    assert "names no classes" in told.stderr
    data = json.loads(told.stdout)
    assert data["labels"] is None
    assert data["samples"] == len(list(loose.iterdir()))
    labelled = json.loads(command("diagnose", MODEL, "--data", images, *SIZE, *weights, "--json").stdout)
    assert labelled["samples"] == data["samples"]  # nothing is split off
    assert labelled["labels"] is not None


@pytest.mark.parametrize("given", ["diagnose", "search", "curve"])
def test_a_wrong_picture_is_told_before_any_work(tmp_path, given):
    # neither model nor data exist, and still the message is about the picture
    more = [] if given == "diagnose" else ["--out", tmp_path / "out"]
    told = command(given, "timm:nothing", "--data", "nowhere", *more, "--plot", tmp_path / "a.pdf")
    assert told.exit_code == 1
    assert "a.pdf" in told.stderr


@pytest.mark.parametrize("given", [["--source", "gone"], ["--signature", "gone"]])
@pytest.mark.parametrize("name", ["diagnose", "advise"])
def test_a_wrong_source_is_told_before_any_work(name, given):
    # neither model nor data exist, and still the message is about the source
    told = command(name, "timm:nothing", "--data", "nowhere", *given)
    assert told.exit_code == 1
    assert "gone" in told.stderr


def test_tables_of_a_shift_keep_each_figure_in_one_line(images, weights):
    # against a source there are five figures with intervals: two tables, nothing broken in two lines
    told = command("diagnose", MODEL, "--data", images, "--source", images, *SIZE, *weights)
    assert told.exit_code == 0, told.output
    assert "nan" not in told.stdout
    assert "all equally frequent" in told.stdout
    groups = [line for line in told.stdout.splitlines() if line.lstrip().startswith("classifier ")]
    assert len(groups) == 3  # moments, sketches, transferability
    assert sum(line.count("[") for line in groups) == sum(line.count("]") for line in groups) == 5


def test_a_class_with_one_sample_has_a_dash_for_its_probe(images, weights):
    # three samples of two classes: no held-out accuracy, and no "nan" in the table
    told = command("diagnose", MODEL, "--data", images, *SIZE, *weights, "--max-samples", 3)
    assert told.exit_code == 0, told.output
    assert "nan" not in told.stdout
    assert [line.split()[2] for line in told.stdout.splitlines() if line.lstrip().startswith("classifier ")][
        -1
    ] == "-"


def test_values_of_one_class_are_shown_without_tables_of_labels():
    # no figures of images; why the label side is missing is a note
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).eval()
    x = torch.randn(40, 4)
    found = shift(net, (x + 1, torch.zeros(40).long()), x, draws=20)
    shown = list(shift_tables(found))
    titles = [part.title for part in shown if isinstance(part, Table)]
    assert len(titles) == 2
    assert all("Inputs" not in title and "Frozen" not in title for title in titles)
    assert str(shown[-1]).startswith("note: label side not measured: all 40 samples have the label 0")


def test_advise_writes_a_plan_that_fit_takes(images, weights, tmp_path):
    # the plan file is the advised plan, and training by it works
    path = tmp_path / "plan.yaml"
    told = command("advise", MODEL, "--data", images, *SIZE, *weights, "-o", path, "--epochs", 1, "--json")
    assert told.exit_code == 0, told.output
    advice = json.loads(told.stdout)
    assert Plan.load(path) == Plan(**advice["plan"])
    assert advice["reasons"]
    assert "layerwise fit" in told.stderr
    trained = command(
        "fit", "--model", MODEL, "--data", images, *SIZE, *weights, "--plan", path, "--out", tmp_path / "run"
    )
    assert trained.exit_code == 0, trained.output


def test_advise_tells_the_training_that_it_is_for(images, weights, tmp_path):
    # norms and length follow from size of batch and training part: others would be another task
    plan = tmp_path / "plan.yaml"
    given = ["--batch-size", 8, "--val-frac", 0.3]
    told = command("advise", MODEL, "--data", images, *SIZE, *weights, "-o", plan, *given)
    assert "--batch-size 8 --val-frac 0.3 --out RUN" in told.stderr
    told = command("advise", MODEL, "--data", images, *SIZE, *weights, "-o", tmp_path / "b.yaml")
    assert "--batch-size" not in told.stderr


def test_advise_prints_reasons_alternatives_and_yaml(images, weights):
    # what a person reads
    shown = command("advise", MODEL, "--data", images, *SIZE, *weights)
    assert shown.exit_code == 0, shown.output
    for part in ("Reasons", "similarity", "Alternatives", "Advice:", "phases:"):
        assert part in shown.output


def test_search_makes_plan_run_and_curve(images, weights, tmp_path):
    # two trials, a journal, a plan, the winner's run to predict with, the picture; called again it only reads
    out, picture = tmp_path / "s", tmp_path / "curve.png"
    arguments = [
        "search", MODEL, "--data", images, *SIZE, *weights, "--out", out, "--trials", 2, "--depths", "1,2",
        "--epochs", 1, "--batch-size", 8, "--json",
    ]  # fmt: skip
    told = command(*arguments, "--plot", picture)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [t["choice"] for t in found["trials"]] == ["last 1", "last 2"]
    assert (out / "plan.yaml").exists()
    predicted = command("predict", found["run"]["out"], images, "--json")
    assert predicted.exit_code == 0, predicted.output
    assert json.loads(predicted.stdout)["predictions"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = json.loads(command(*arguments).stdout)
    assert again["trials"] == found["trials"]


def test_search_prints_the_curve_and_takes_class_weights(images, weights, tmp_path):
    # for people: a row a choice, the best one marked; the weights reach every training
    shown = command(
        "search", MODEL, "--data", images, *SIZE, *weights, "--out", tmp_path / "s", "--trials", 2,
        "--depths", "1,2", "--epochs", 1, "--batch-size", 8, "--class-weights", "balanced",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "* best: last" in shown.stdout
    assert "its run on the test data" not in shown.stdout
    assert f"plan: {tmp_path / 's' / 'plan.yaml'}; run: " in shown.stdout
    (run,) = (tmp_path / "s").glob("winner-trial-*/run.json")
    assert json.loads(run.read_text())["settings"]["class_weights"] == "balanced"


@pytest.mark.parametrize(("name", "kept"), [("search", "trials"), ("curve", "trainings")])
def test_ctrl_c_says_that_the_same_command_goes_on(images, weights, tmp_path, monkeypatch, name, kept):
    # exit code 130, no traceback
    from layerwise.choosing import curve, trials

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "fit", interrupt)
    monkeypatch.setattr(curve, "fit", interrupt)
    told = command(name, MODEL, "--data", images, *SIZE, *weights, "--out", tmp_path / "out")
    assert told.exit_code == 130
    assert told.stderr.endswith(f"Interrupted; finished {kept} are kept; the same command goes on.\n")


def test_search_tells_the_test_metrics_of_the_winner(images, weights, tmp_path):
    # they are what to report: the search never saw these data
    shown = command(
        "search", MODEL, "--data", images, *SIZE, *weights, "--out", tmp_path / "s", "--trials", 1,
        "--depths", 1, "--epochs", 1, "--batch-size", 8, "--test-frac", 0.2,
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert "its run on the test data: loss" in shown.stdout


def test_fit_with_strategy_auto_says_every_choice(images, weights, tmp_path):
    # advice alone (no search), told on stderr and kept in the run
    out = tmp_path / "run"
    trained = command(
        "fit", "--model", MODEL, "--data", images, *SIZE, *weights, "--strategy", "auto", "--search-share", 0,
        "--epochs", 1, "--batch-size", 8, "--out", out,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    for part in ("similarity", "advice:", "no search", "chosen:"):
        assert part in trained.stderr
    about = json.loads((out / "run.json").read_text())
    assert about["advice"]["strategy"] in trained.stderr
    assert about["job"]["strategy"] == "auto"


def test_fit_auto_searches_within_trials(images, weights, tmp_path, monkeypatch):
    # with a search, trials are told one by one and the chosen plan is one of them
    from layerwise.choosing import auto

    monkeypatch.setattr(auto.choose_plan, "__kwdefaults__", {**auto.choose_plan.__kwdefaults__, "trials": 2})
    trained = command(
        "fit", "--model", MODEL, "--data", images, *SIZE, *weights, "--strategy", "auto", "--epochs", 1,
        "--batch-size", 8, "--out", tmp_path / "run",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert trained.stderr.count("\ntrial ") == 2
    assert "chosen:" in trained.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["diagnose", MODEL], 2, "--data"),
        (["diagnose", MODEL, "--data", "nowhere"], 1, "nowhere"),
        (["advise", "timm:no_such_net", "--data", "IMAGES"], 1, "no_such_net"),
        (
            ["search", MODEL, "--data", "IMAGES", "--out", "OUT", "--lr", "fast"],
            2,
            "--lr is 'fast'; expected numbers",
        ),
        (["search", MODEL, "--data", "IMAGES", "--out", "OUT", "--lr", "1,0.1"], 1, "lr is"),
        (
            ["search", MODEL, "--data", "IMAGES", "--out", "OUT", "--decay", "0.7,0.8,1"],
            2,
            "expected one number or two",
        ),
        (["signature", MODEL, "--data", "nowhere", "-o", "OUT"], 1, "nowhere"),
    ],
)
def test_bad_input_is_one_message(images, weights, tmp_path, arguments, code, message):
    # usage errors are 2, failures 1, and the message names the value
    places = {"IMAGES": images, "OUT": tmp_path / "out"}
    given = [places.get(a, a) for a in arguments]
    result = command(*given, *SIZE, *weights)
    assert result.exit_code == code
    assert message in result.output + result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("inside", [".", "s", "red/s"])
def test_a_search_is_not_put_into_its_data(images, weights, inside):
    # its folders would be taken for classes, and the same command could not go on
    result = command("search", MODEL, "--data", images, "--out", images / inside, *SIZE, *weights)
    assert result.exit_code == 2
    assert "lies in the data" in " ".join(re.sub("[│─╭╮╰╯]", " ", result.stderr).split())
    assert sorted(path.name for path in images.iterdir()) == ["green", "red"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["search", "--depths", "1,x"], "--depths is '1,x'"),
        (["search", "--lr", "fast"], "--lr is 'fast'"),
        (["search", "--decay", "1,2,3"], "--decay is '1,2,3'"),
        (["curve", "--depths", " "], "--depths is ' '"),
        (["curve", "--depths", "1,0"], "--depths is '1,0'; expected numbers of at least 1"),
        (["search", "--depths", "-1"], "--depths is '-1'; expected numbers of at least 1"),
    ],
)
def test_lists_of_numbers_are_read_before_the_data(tmp_path, arguments, told):
    # what was typed wrongly is told at once, not after minutes; here there are no data at all
    name, *given = arguments
    result = command(name, MODEL, "--data", tmp_path / "nowhere", "--out", tmp_path / "o", *given)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_search_that_cannot_be_is_told_before_the_data(tmp_path):
    # all of it at once; here there are no data at all
    given = ["--lr", "nan,1", "--decay", "0.5,2", "--strategy", "fulll"]
    result = command("search", MODEL, "--data", tmp_path / "nowhere", "--out", tmp_path / "o", *given)
    assert result.exit_code == 1
    assert all(told in result.stderr for told in ("lr is (nan, 1.0)", "decay is (0.5, 2.0)", "'fulll'"))


def test_an_output_of_something_else_is_told_before_the_data(tmp_path):
    # not after minutes; here there are no data at all
    (tmp_path / "run.json").write_text("{}")
    given = [MODEL, "--data", tmp_path / "nowhere", "--out"]
    assert "holds a run that is none of a search's" in command("search", *given, tmp_path).stderr
    assert "no curve's values are in it" in command("curve", *given, tmp_path / "run.json").stderr


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    # a tiny BERT and tables of topic texts, ours and a source's
    from tiny_text import save_tiny, topic_rows, write_csv

    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "bert", "bert")
    write_csv(folder / "a.csv", topic_rows(90))
    write_csv(folder / "source.csv", topic_rows(90, seed=1))
    return folder


COLUMNS = ["--text-column", "text", "--label-column", "topic"]


def test_texts_are_diagnosed_against_a_signature(texts, tmp_path):
    # the figures of texts, and no shift between two draws from one kind of text
    model, path = f"hf:{texts / 'bert'}", tmp_path / "sig.safetensors"
    made = command("signature", model, "--data", texts / "source.csv", *COLUMNS, "-o", path)
    assert made.exit_code == 0, made.output
    told = command("diagnose", model, "--data", texts / "a.csv", *COLUMNS, "--signature", path, "--json")
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert {entry["name"] for entry in data["inputs"]} == {"length", "fertility", "unknown"}
    assert data["moved"] == []


def test_texts_need_no_labels_for_signature_and_diagnosis(texts, tmp_path):
    # all rows of a table, or of a file of lines; and a table as the source itself
    model, path = f"hf:{texts / 'bert'}", tmp_path / "sig.safetensors"
    made = command(
        "signature", model, "--data", texts / "source.csv", "--text-column", "text", "-o", path, "--json"
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["samples"] == 90
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(["a fine day", "rain again", "no more wind"] * 8))
    for source in (["--signature", path], ["--source", texts / "source.csv"]):
        told = command("diagnose", model, "--data", lines, "--text-column", "text", *source, "--json")
        assert told.exit_code == 0, told.output
        data = json.loads(told.stdout)
        assert data["labels"] is None
        assert data["samples"] == 24
        assert {entry["name"] for entry in data["inputs"]} == {"length", "fertility", "unknown"}


def test_weights_for_other_classes_lose_their_head_if_asked(images, tmp_path):
    # the error names an option, which only fit had
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=5).state_dict(), path)
    given = [MODEL, "--data", images, *SIZE, "--weights", path]
    refused = command("advise", *given)
    assert refused.exit_code == 1
    assert "is for 5 classes, not 2" in refused.stderr
    option = re.search(r"--\w+ drop_head", refused.stderr)[0].split()
    told = command("advise", *given, *option, "-o", tmp_path / "plan.yaml")
    assert told.exit_code == 0, told.output
    assert "--mismatched drop_head" in told.stderr  # of the fit command to go on with
    vain = command("advise", MODEL, "--data", images, *option)
    assert vain.exit_code == 2
    assert "--mismatched: it is for the file of --weights" in " ".join(vain.stderr.replace("│", "").split())


def test_a_signature_of_texts_takes_weights_of_any_classes(texts, tmp_path):
    # it does not look at the head, which is made up
    from safetensors.torch import save_file

    from layerwise.sources.models import open_model

    model, path = f"hf:{texts / 'bert'}", tmp_path / "w.safetensors"
    save_file(open_model(model, num_classes=3).model.state_dict(), path)
    made = command("signature", model, "--data", texts / "a.csv", "--text-column", "text", "--weights", path,
                   "-o", tmp_path / "sig.safetensors")  # fmt: skip
    assert made.exit_code == 0, made.output


def test_texts_without_a_source_say_how_to_make_a_signature(texts):
    # BERT has no batch-norm; the message holds the command
    result = command("diagnose", f"hf:{texts / 'bert'}", "--data", texts / "a.csv", *COLUMNS)
    assert result.exit_code == 1
    assert "layerwise signature MODEL" in result.stderr


def test_curve_of_texts_goes_on_and_draws(texts, tmp_path):
    # two depths, frozen and fine-tuned; called again it reads the file; the picture has both series
    out, picture = tmp_path / "curve.json", tmp_path / "curve.svg"
    arguments = [
        "curve", f"hf:{texts / 'bert'}", "--data", texts / "a.csv", *COLUMNS, "--out", out, "--depths", "1,3",
        "--epochs", 1, "--plot", picture,
    ]  # fmt: skip
    told = command(*arguments, "--json")
    assert told.exit_code == 0, told.output
    points = json.loads(told.stdout)["points"]
    assert [(p["series"], p["trained_groups"]) for p in points] == [
        ("frozen", 1), ("frozen", 3), ("fine-tuned", 1), ("fine-tuned", 3)
    ]  # fmt: skip
    assert told.stderr.count("new group") == 4
    assert {"frozen", "fine-tuned"} <= set(picture.read_text().replace("<", ">").split(">"))
    again = command(*arguments)
    assert "new group" not in again.stderr
    assert "Training on top of each depth" in again.stdout


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("advise", ["-o", "nowhere/p.yaml"], "does not exist"),
        ("advise", ["-o", "there.yaml"], "is there already"),
        ("diagnose", ["--plot", "nowhere/a.svg"], "does not exist"),
        ("curve", ["--out", "nowhere/c.json"], "does not exist"),
        ("search", ["--out", "there.yaml/s"], "is a file"),
        ("signature", ["-o", "."], "is a folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_any_work(name, given, told, tmp_path, monkeypatch):
    # neither model nor data exist, and yet it is the output that is told; what is there stays
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    result = command(name, "timm:nothing", "--data", "nothing", *given)
    assert result.exit_code == 2, result.output
    assert told in " ".join("".join(c for c in result.stderr if c not in "│╭╮╰╯─").split())
    assert (tmp_path / "there.yaml").read_text() == "mine"


def test_random_weights_can_be_asked_for(images, tmp_path):
    # the option that the hint "random weights: --no-pretrained" names; advice passes it on to fit
    told = command("advise", MODEL, "--data", images, *SIZE, "--no-pretrained", "-o", tmp_path / "p.yaml")
    assert told.exit_code == 0, told.output
    assert "--no-pretrained" in told.stderr
    assert command("diagnose", MODEL, "--data", images, *SIZE, "--no-pretrained").exit_code == 0


def test_commands_share_the_options_of_a_task():
    # the five commands take model, data and texts alike, and each has the help of its own
    for name in ("diagnose", "advise", "search", "signature", "curve"):
        shown = command(name, "--help").output
        for option in (
            "--data",
            "--weights",
            "--no-pretrained",
            "--input-size",
            "--granularity",
            "--seed",
            "--text-column",
        ):
            assert option in shown, (name, option)


def test_texts_are_advised_on_searched_and_fitted(texts, tmp_path):
    # advice, two trials, and fit's auto on a table of texts
    model = f"hf:{texts / 'bert'}"
    data = tmp_path / "a.csv"
    data.write_text((texts / "a.csv").read_text().replace("text", "body", 1))
    given = ["--data", data, "--text-column", "body", "--label-column", "topic"]
    told = command("advise", model, *given, "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["similarity"] == "unknown"
    found = command("search", model, *given, "--out", tmp_path / "s", "--trials", 2, "--epochs", 1, "--json")
    (winner,) = (tmp_path / "s").glob("winner-trial-*")
    for named in ([], [data]):  # of a table the columns of training
        told = CliRunner().invoke(app, ["predict", str(winner), *map(str, named), "--json"], input="red\n")
        assert told.exit_code == 0, told.output
        assert "label" in json.loads(told.stdout)["predictions"][0]
    assert (winner / "transformers" / "tokenizer.json").exists()
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["trials"]) == 2
    trained = command(
        "fit", "--model", model, *given, "--strategy", "auto", "--search-share", 0, "--epochs", 1,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "chosen:" in trained.stderr
