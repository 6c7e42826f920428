"""`layerwise fit` and `predict` on texts, as a user types them, in processes of their own."""

import csv
import io
import json
import os
import shutil

import pytest

import forked
from forked import Forked
from tiny_text import save_tiny, topic_rows, write_csv

transformers = pytest.importorskip("transformers")


def layerwise(*arguments, folder, stdin=""):
    """Run the command in `folder`; return (exit code, stdout, stderr)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = Forked(forked.layerwise, *arguments, environment=environment, folder=folder, stdin=stdin).finish()
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a tiny encoder, and a run of it on a table of topics."""
    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "bert", "bert")
    write_csv(folder / "train.csv", topic_rows(90))
    code, out, err = layerwise(
        *("fit", "--model", "hf:bert", "--data", "train.csv", "--label-column", "topic"),
        *("--strategy", "ulmfit", "--epochs", "5", "--lr", "1e-2", "--lm-epochs", "1"),
        *("--pooling", "mean", "--batch-size", "8", "--out", "run", "--json"),
        folder=folder,
    )
    assert code == 0, err
    (folder / "result.json").write_text(out)
    return folder


def test_the_ulmfit_recipe_is_one_command(work):
    # Language model first, then gradual unfreezing of the classifier; the run holds both.
    result = json.loads((work / "result.json").read_text())
    phases = list(dict.fromkeys(line["phase"] for line in result["history"]))
    assert phases[0] == "from classifier"
    assert phases[-1] == "all groups"
    assert len(phases) > 2
    notes = " ".join(result["notes"])
    assert "masked_lm: perplexity of the validation texts" in notes
    assert "moved into the classifier" in notes
    language_model = json.loads((work / "run/language-model/run.json").read_text())
    assert language_model["task"]["name"] == "masked_lm"
    assert language_model["result"]["steps"] > 0


def test_from_pretrained_loads_the_tuned_encoder(work):
    # The folder is one of transformers: its encoder has the run's weights, its tokenizer is there.
    from safetensors.torch import load_file

    body = transformers.AutoModel.from_pretrained(work / "run/transformers", add_pooling_layer=False)
    kept = load_file(work / "run/model.safetensors")
    pretrained = transformers.AutoModel.from_pretrained(work / "bert", add_pooling_layer=False)
    moved = 0
    for name, value in body.state_dict().items():
        assert value.equal(kept[f"body.{name}"]), name
        moved += not value.equal(pretrained.state_dict()[name])
    assert moved > 10
    assert transformers.AutoTokenizer.from_pretrained(work / "run/transformers").mask_token == "[MASK]"
    config = transformers.AutoConfig.from_pretrained(work / "run/transformers")
    assert config.id2label == {0: "cars", 1: "food", 2: "sport"}


def test_predict_reads_standard_input(work, tmp_path):
    # Lines in, one prediction each, in order; the run is whole, so its pretrained folder may be gone.
    shutil.copytree(work / "run", tmp_path / "elsewhere")
    rows = topic_rows(5, seed=5)
    lines = "\n".join(row["text"] for row in rows) + "\n"
    code, out, err = layerwise("predict", "elsewhere", "--format", "csv", folder=tmp_path, stdin=lines)
    assert code == 0, err
    table = list(csv.DictReader(io.StringIO(out)))
    assert [row["text"] for row in table] == [row["text"] for row in rows]
    assert {row["label"] for row in table} <= {"cars", "food", "sport"}
