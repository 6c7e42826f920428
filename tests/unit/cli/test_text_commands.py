"""`layerwise fit` and `predict` on texts: every kind of label, and one clear message for bad input."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from layerwise.cli.main import app
from layerwise.training.run import load_run
from tiny_text import save_tiny, topic_rows, write_csv

pytest.importorskip("transformers")


def command(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def fit(model: Path, data: Path, out: Path, *arguments: object) -> dict:
    """Fit for one epoch and return the JSON that the command prints."""
    result = command(
        *("fit", "--model", f"hf:{model}", "--data", data, "--out", out, "--epochs", 1, "--batch-size", 8),
        *("--lr", "1e-3", "--cache", "off", "--json", *arguments),
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with tiny models and a table."""
    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "bert", "bert")
    save_tiny(folder / "gpt2", "gpt2")
    save_tiny(folder / "t5", "t5")
    write_csv(folder / "train.csv", topic_rows(24))
    return folder


def test_a_dry_run_tells_that_the_language_model_comes_first(work):
    # Its part is not measured and may be the longest.
    result = command(
        *("fit", "--model", f"hf:{work / 'bert'}", "--data", work / "train.csv", "--label-column", "topic"),
        *("--strategy", "linear_probe", "--lm-epochs", 2, "--dry-run"),
    )
    assert result.exit_code == 0, result.stderr
    assert "2 epochs of the language model (--lm-epochs)" in result.stderr


def test_files_lines_and_standard_input_give_the_same(work, tmp_path):
    # The same texts get the same labels, whichever way they come in.
    fit(work / "bert", work / "train.csv", tmp_path / "run", "--label-column", "topic", "--strategy", "full")
    rows = topic_rows(7, seed=5)
    lines = "\n".join(row["text"] for row in rows) + "\n"
    write_csv(tmp_path / "new.csv", rows)
    (tmp_path / "new.txt").write_text(lines)
    ways = [(["-"], lines), ([], lines), ([tmp_path / "new.txt"], None), ([tmp_path / "new.csv"], None)]
    found = []
    for arguments, stdin in ways:
        result = command("predict", tmp_path / "run", *arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout)["predictions"])
    assert [row["text"] for row in found[0]] == [row["text"] for row in rows]
    assert found[0] == found[1] == found[2] == found[3]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in found[0])
    shown = command("predict", tmp_path / "run", tmp_path / "new.csv").stdout
    assert rows[0]["text"] in shown


def test_files_are_read_in_the_encoding_of_training(work, tmp_path):
    # Tables and lines alike; standard input is utf-8, and a named encoding wins.
    text = "".join(f"caf\xe9 red {row['text']},{row['topic']}\n" for row in topic_rows(16))
    (tmp_path / "latin.csv").write_text(f"text,topic\n{text}", encoding="latin-1")
    (tmp_path / "latin.txt").write_text("caf\xe9\n", encoding="latin-1")
    (tmp_path / "utf8.txt").write_text("caf\xe9\n", encoding="utf-8")
    options = ["--label-column", "topic", "--strategy", "linear_probe", "--encoding", "latin-1"]
    fit(work / "bert", tmp_path / "latin.csv", tmp_path / "run", *options)
    table = command("predict", tmp_path / "run", tmp_path / "latin.csv", "--json")
    assert table.exit_code == 0, table.stderr
    assert json.loads(table.stdout)["predictions"][0]["text"].startswith("caf\xe9 ")
    ways = [([tmp_path / "latin.txt"], None), ([tmp_path / "utf8.txt", "--encoding", "utf-8"], None)]
    for arguments, stdin in [*ways, ([], "caf\xe9\n"), (["-"], "caf\xe9\n")]:
        result = command("predict", tmp_path / "run", *arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["predictions"][0]["text"] == "caf\xe9"


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (("words", "topic"), ["--text-column", "words", "--label-column", "topic", "--encoding", "latin-1"]),
        (("tokens", "tags"), ["--task", "token_classification", "--encoding", "latin-1"]),
    ],
)
def test_the_language_model_s_run_reads_tables_as_its_classifier_s_does(work, tmp_path, columns, options):
    # its own texts have that column and encoding; its length is told as well, and a pair is two texts to it
    rows = [{"text": f"caf\xe9 {row['text']}", "label": row["topic"]} for row in topic_rows(16)]
    text, label = columns
    if label == "tags":
        rows = [
            {"text": row["text"].split(), "label": ["O", *(["B-X"] * (len(row["text"].split()) - 1))]}
            for row in rows
        ]
    file = tmp_path / "a.jsonl"
    lines = [
        json.dumps({text: row["text"], label: row["label"], "other": "red"}, ensure_ascii=False)
        for row in rows
    ]
    file.write_text("\n".join(lines), encoding="latin-1")
    options = [*options, "--strategy", "linear_probe", "--lm-epochs", 1, "--max-length", 12]
    options += [] if label == "tags" else ["--pair-column", "other"]
    fit(work / "bert", file, tmp_path / "run", *options)
    result = command("predict", tmp_path / "run" / "language-model", file, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["predictions"][0]["text"].startswith("caf\xe9 ")
    assert load_run(tmp_path / "run" / "language-model").about["data"]["max_length"] == 12


def test_several_labels(work, tmp_path):
    # Names joined by a comma are several labels; a prediction names those that are on.
    rows = [
        {"text": f"red {word}", "label": label} for word, label in zip("abcdefgh", ["x", "x,y", "y", ""] * 2)
    ]
    write_csv(tmp_path / "a.csv", rows)
    result = fit(
        *(work / "bert", tmp_path / "a.csv", tmp_path / "run", "--task", "multi_label", "--strategy", "full"),
        *("--val-frac", "0.25"),
    )
    assert {"macro_f1", "micro_f1", "exact_match"} <= set(result["metrics"])
    answer = json.loads(command("predict", tmp_path / "run", "--json", stdin="red a\n").stdout)[
        "predictions"
    ][0]
    assert set(answer["probabilities"]) == {"x", "y"}
    assert isinstance(answer["labels"], list)


def test_numbers(work, tmp_path):
    # Predictions come in the unit of the column, not in standardised numbers.
    rows = [{"text": f"{'red ' * n}bread", "price": 1000 + 100 * n} for n in (1, 2, 3, 4) * 4]
    write_csv(tmp_path / "a.csv", rows)
    result = fit(
        *(work / "bert", tmp_path / "a.csv", tmp_path / "run", "--task", "regression", "--strategy", "full"),
        *("--label-column", "price"),
    )
    assert {"rmse", "mae", "r2", "pearson"} <= set(result["metrics"])
    answer = json.loads(command("predict", tmp_path / "run", "--json", stdin="red bread\n").stdout)
    assert 900 < answer["predictions"][0]["value"] < 1600
    # for people: numbers have no classes, and the commands to go on with follow the metrics
    shown = command("fit", "--resume", tmp_path / "run").stdout
    assert "validation rmse" in shown
    assert "Per class" not in shown
    assert "Confusion" not in shown
    assert "FILE (or texts on standard input)" in " ".join(shown.split())


def test_tags_of_words(work, tmp_path):
    # A table of words and BIO tags; predictions name entities in the words that were given.
    lines = ["Anna\tB-PER", "sells\tO", "red\tB-COL", "bread\tO", "", "the\tO", "team\tB-PER", ""] * 5
    (tmp_path / "train.conll").write_text("\n".join(lines))
    result = fit(
        *(work / "bert", tmp_path / "train.conll", tmp_path / "run", "--task", "token_classification"),
        *("--strategy", "top_k:k=2"),
    )
    assert {"entity_f1", "entity_precision", "entity_recall"} <= set(result["metrics"])
    output = command("predict", tmp_path / "run", "--json", stdin="Anna likes red bread\n").stdout
    answer = json.loads(output)["predictions"][0]
    assert answer["words"] == ["Anna", "likes", "red", "bread"]
    assert len(answer["tags"]) == 4
    assert all(entity["text"] in "Anna likes red bread" for entity in answer["entities"])
    result = command("predict", tmp_path / "run", tmp_path / "train.conll", "--json")
    assert [row["text"] for row in json.loads(result.stdout)["predictions"][:2]] == [
        "Anna sells red bread",
        "the team",
    ]


def test_tags_as_a_table(work, tmp_path):
    # words and tags side by side, a dash for the word that was cut off; entities with their types
    lines = ["Anna\tB-PER", "sells\tB-COL", "red\tB-COL", ""] * 8
    (tmp_path / "train.conll").write_text("\n".join(lines))
    fit(
        *(work / "bert", tmp_path / "train.conll", tmp_path / "run", "--task", "token_classification"),
        *("--strategy", "top_k:k=2", "--max-length", 5),
    )
    text = "Anna likes red bread\n"
    answer = json.loads(command("predict", tmp_path / "run", "--json", stdin=text).stdout)["predictions"][0]
    result = command("predict", tmp_path / "run", "--format", "csv", stdin=text)
    (row,) = csv.DictReader(io.StringIO(result.stdout))
    assert row["words"] == "Anna likes red bread"
    assert row["tags"].split() == [*answer["tags"][:3], "-"]
    assert answer["entities"]
    assert row["entities"] == "; ".join(f"{e['text']} ({e['type']})" for e in answer["entities"])
    assert row["cut"] == "1"


def test_fillers_as_a_table(work, tmp_path):
    # the token that fits best at each mask, with its probability
    (tmp_path / "a.csv").write_text("\n".join(["text", *(row["text"] for row in topic_rows(24))]))
    fit(work / "bert", tmp_path / "a.csv", tmp_path / "run", "--task", "masked_lm", "--strategy", "full")
    text = "the [MASK] of the [MASK]\n"
    answer = json.loads(command("predict", tmp_path / "run", "--json", stdin=text).stdout)["predictions"][0]
    (row,) = csv.DictReader(
        io.StringIO(command("predict", tmp_path / "run", "--format", "csv", stdin=text).stdout)
    )
    assert len(answer["fillers"]) == 2
    told = command("predict", tmp_path / "run", stdin="no mask at all\n").stderr
    assert "no text holds [MASK], so there is nothing to fill in; write it where a word is asked for" in told
    assert "[MASK]" not in command("predict", tmp_path / "run", stdin=text).stderr
    told = command("predict", tmp_path / "run", stdin=f"{'the ' * 40}[MASK]\n").stderr
    assert "no text holds" not in told
    assert "1 mask was cut off with the end of its text" in told
    assert row["fillers"] == " ".join(f"{f['token']} ({f['probability']:.2f})" for f in answer["fillers"])


def test_a_table_of_many_classes_shows_no_probabilities(work, tmp_path):
    # a dozen columns would leave nothing of the texts; CSV has them all
    rows = [{"text": f"red {n}", "label": f"c{n % 8}"} for n in range(48)]
    write_csv(tmp_path / "a.csv", rows)
    fit(work / "bert", tmp_path / "a.csv", tmp_path / "run", "--strategy", "linear_probe")
    shown = command("predict", tmp_path / "run", stdin="red bread\n").stdout
    assert "red bread" in shown
    assert "probability" in shown
    assert "p_c" not in shown
    assert "p_c7" in command("predict", tmp_path / "run", "--format", "csv", stdin="red bread\n").stdout


def test_instructions_of_a_decoder(work, tmp_path):
    # Prompts are not learned; the run writes a continuation of a prompt.
    rows = [{"prompt": f"the {row['text']}", "answer": row["topic"]} for row in topic_rows(16)]
    write_csv(tmp_path / "a.csv", rows)
    result = fit(
        *(work / "gpt2", tmp_path / "a.csv", tmp_path / "run", "--task", "causal_lm"),
        *("--text-column", "prompt", "--response-column", "answer", "--strategy", "top_k:k=1"),
    )
    assert result["metrics"]["perplexity"] > 1
    output = command("predict", tmp_path / "run", "--json", "--new-tokens", 3, stdin="red engine\n").stdout
    assert isinstance(json.loads(output)["predictions"][0]["completion"], str)


def test_an_encoder_decoder_classifies_pairs(work, tmp_path):
    # T5's classifier, pairs of texts, and a run that is read back.
    rows = [{"a": row["text"], "b": row["text"][::-1], "label": row["topic"]} for row in topic_rows(18)]
    write_csv(tmp_path / "a.csv", rows)
    fit(
        *(work / "t5", tmp_path / "a.csv", tmp_path / "run", "--text-column", "a", "--pair-column", "b"),
        *("--strategy", "discriminative:decay=0.8"),
    )
    result = command("predict", tmp_path / "run", tmp_path / "a.csv", "--format", "csv")
    assert result.exit_code == 0, result.stderr
    assert len(list(csv.DictReader(io.StringIO(result.stdout)))) == 18
    output = command("predict", tmp_path / "run", "--format", "csv", stdin="red\tdaer\n").stdout
    assert [row["pair"] for row in csv.DictReader(io.StringIO(output))] == ["daer"]
    result = command("predict", tmp_path / "run", stdin="red\n")
    assert result.exit_code == 1
    assert "texts 1 have no second text" in result.stderr


def test_the_model_says_that_a_table_is_of_texts(work, tmp_path):
    # Without an option for texts a text model reads texts; what is for images is named and not used.
    rows = [{"text": row["text"], "label": row["topic"], "split": "train"} for row in topic_rows(18)]
    write_csv(tmp_path / "a.csv", rows)
    result = command(
        *(
            "fit",
            "--model",
            f"hf:{work / 'bert'}",
            "--data",
            tmp_path / "a.csv",
            "--strategy",
            "linear_probe",
        ),
        *("--epochs", 1, "--augment", "light", "--skip-bad-images", "--out", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.stderr
    assert "--augment is for images" in result.stderr
    assert "--skip-bad-images is for images" in result.stderr
    assert "the column 'split' is not used" in " ".join(result.stderr.split())


def test_language_model_first_needs_a_language_model(work, tmp_path):
    # An encoder-decoder has no masked or causal language model of one text.
    result = command(
        *("fit", "--model", f"hf:{work / 't5'}", "--data", work / "train.csv", "--label-column", "topic"),
        *("--strategy", "linear_probe", "--epochs", 1, "--lm-epochs", 1, "--out", tmp_path / "run"),
    )
    assert result.exit_code == 1
    assert "is an encoder-decoder (t5)" in result.stderr


BAD = {
    "a column that is not there": (
        ["--label-column", "topics"],
        "no column 'topics'; its columns are 'text', 'topic'. Did you mean 'topic'? Name yours: --label-c",
    ),
    "a column of groups that is not there": (["--group-column", "who"], "Name yours: --group-column."),
    "a column of parts that is not there": (["--split-column", "part"], "Name yours: --split-column."),
    "a model without a tokenizer": (
        ["--model", "timm:resnet18"],
        "for texts give a model that reads them",
    ),
    "texts and a model of images": (
        ["--model", "timm:resnet18", "--text-column", "text"],
        "texts need a model that brings its tokenizer",
    ),
    "a folder without weights": (["--model", "hf:empty"], "has no weights"),
    "no folder": (["--model", "hf:./nothing"], "there is no folder"),
    "another encoding": (["--data", "latin.csv"], "is not utf-8"),
    "an empty text": (["--data", "empty.csv"], "has an empty 'text'"),
    "a label only in val": (["--val-data", "val.csv"], "'music' is in val and never in train"),
    "a huge text": (["--data", "huge.csv"], "10,000,000 characters"),
    "too long a length": (["--max-length", "4000"], "tokens at most"),
    "mean pooling of tags": (["--task", "token_classification", "--pooling", "mean"], "is for whole texts"),
    "a tokenizer that does not fit": (
        ["--model", "hf:misfit"],
        "tokenizer of 'hf:misfit' does not fit its model",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(name, work, monkeypatch):
    # One message that names what is wrong, exit code 1, and no run folder.
    arguments, words = BAD[name]
    bad_inputs(work)
    monkeypatch.chdir(work)
    result = command(
        *("fit", "--model", "hf:bert", "--data", "train.csv", "--label-column", "topic"),
        *("--strategy", "linear_probe", "--epochs", "1", "--out", "bad", *arguments),
    )
    assert result.exit_code == 1, result.output
    assert words in " ".join(result.stderr.split()), result.stderr
    assert not (work / "bad").exists()


def bad_inputs(folder: Path) -> None:
    if (folder / "latin.csv").exists():
        return
    rows = topic_rows(12)
    (folder / "latin.csv").write_bytes("text,topic\ncaf\xe9,food\nred,cars\n".encode("latin-1"))
    write_csv(folder / "empty.csv", [*rows, {"text": " ", "topic": "food"}])
    write_csv(folder / "val.csv", [*rows, {"text": "a song", "topic": "music"}])
    write_csv(folder / "huge.csv", [*rows, {"text": "x" * 10_000_000, "topic": "food"}])
    shutil.copytree(folder / "bert", folder / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "bert", folder / "misfit")
    tokenizer = json.loads((folder / "misfit/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 500
    (folder / "misfit/tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("name", ["search", "curve", "fit"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_trials_store_no_keys_and_values(work, tmp_path, monkeypatch, name, family):
    # Only generation needs them; `fit` alone stores none either.
    if family == "t5":
        pytest.importorskip("transformers", minversion="5", reason="T5 rounded by the place in the batch")
    from layerwise.choosing import auto, curve, trials

    told = []

    def noted(*given, **options):
        result = real(*given, **options)
        told.extend(note for note in result.notes if note.startswith("prefix cache: memory"))
        return result

    real = trials.fit
    monkeypatch.setattr(trials, "fit", noted)
    monkeypatch.setattr(curve, "fit", noted)
    monkeypatch.setattr(auto.choose_plan, "__kwdefaults__", {**auto.choose_plan.__kwdefaults__, "trials": 2})
    more = {"search": ["--depths", "1", "--trials", 1], "curve": ["--depths", "1"]}
    model = f"hf:{work / family}"
    shown = command(
        *([name, model] if name in more else ["fit", "--model", model, "--strategy", "auto"]),
        *("--data", work / "train.csv", "--label-column", "topic", "--max-length", 16),
        *("--out", tmp_path / "out", "--batch-size", 8, "--epochs", 3, *more.get(name, [])),
    )
    assert shown.exit_code == 0, shown.output
    assert told
    assert not any("keys and values" in note for note in told), told
