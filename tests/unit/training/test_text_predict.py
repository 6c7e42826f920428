"""Predictions for texts: prompts as in training, positions, words that are cut off, cells that are empty."""

import dataclasses
import io
import json
import sys

import pytest
import torch

from layerwise.errors import DataError, RunError
from layerwise.sources import encoding
from layerwise.training.job import Job, open_job
from layerwise.training.labelled import open_labelled
from layerwise.training.run import load_run
from layerwise.training.text_predict import Text, predict_texts, read_texts
from tiny_text import save_tiny, write_csv

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "bert", "bert")
    save_tiny(folder / "gpt2", "gpt2", "CausalLM")
    return folder


def trained(work, model, rows, **text):
    data = write_csv(work / f"{model}.csv", rows)
    out = work / f"run-{model}"
    if not out.exists():
        job = Job(model=f"hf:{work / model}", data=str(data), strategy="full", epochs=1, text=text)
        open_job(job).fit(out=out, progress=False)
    return load_run(out)


@pytest.fixture
def writer(work):
    rows = [{"text": "red", "answer": "fast slow"}] * 10
    options = {"task": "causal_lm", "response_column": "answer", "prompt_template": "the {prompt} of"}
    return trained(work, "gpt2", rows, max_length=12, **options)


@pytest.fixture
def tagger(work):
    rows = [{"tokens": "red engine fast", "tags": "O N O"}] * 10
    return trained(work, "bert", rows, task="token_classification", max_length=6)


def given_to_generate(run, monkeypatch):
    seen = []
    real = run.model.generate
    monkeypatch.setattr(run.model, "generate", lambda **inputs: seen.append(inputs) or real(**inputs))
    return seen


def test_prompts_are_written_as_in_training(writer, monkeypatch):
    # The model sees the template it was trained with; of too long a prompt the start is cut off.
    seen = given_to_generate(writer, monkeypatch)
    predict_texts(writer, ["red engine"], new_tokens=4)
    predict_texts(writer, ["slow " * 20 + "red"], new_tokens=4)
    ids = [inputs["input_ids"][0].tolist() for inputs in seen]
    trained_on = open_job(Job(**writer.about["job"])).data.train[0]
    prompt = [i for i, label in zip(trained_on["input_ids"], trained_on["labels"], strict=True) if label < 0]
    assert writer.tokenizer.decode(prompt) == "the red of"
    assert writer.tokenizer.decode(ids[0]) == "the red engine of"
    assert writer.tokenizer.decode(ids[1]) == "slow " * 10 + "red of"


def test_prompts_have_the_template_of_training_where_none_is_named(work, monkeypatch):
    # A job of the command line names none; the table of its texts has them as they are learned.
    save_tiny(work / "plain", "gpt2", "CausalLM")
    rows = [{"text": "red", "answer": "fast slow"}] * 10
    run = trained(work, "plain", rows, task="causal_lm", response_column="answer")
    prompts = []
    real = encoding.encode_givens
    monkeypatch.setattr(
        encoding,
        "encode_givens",
        lambda tokenizer, given, **more: prompts.extend(given) or real(tokenizer, given, **more),
    )
    predict_texts(run, ["red"], new_tokens=4)
    assert prompts == open_job(Job(**run.about["job"])).table.parts["train"].texts[:1] == ["red\n"]


def test_what_a_run_on_texts_was_told_for_images_in_vain_is_passed_over_later(work):
    # The job keeps --path-column, of which fit says that it is not used.
    save_tiny(work / "vain", "gpt2", "CausalLM")
    rows = [{"text": "red", "answer": "fast slow"}] * 10
    run = trained(work, "vain", rows, task="causal_lm", response_column="answer", path_column="file")
    assert predict_texts(run, ["red"], new_tokens=4)
    assert len(open_labelled(run, work / "vain.csv")[0]) == 10


def test_completions_of_several_lengths_are_those_of_each_alone(writer):
    # Padding at the left changes nothing.
    texts = ["red", "red engine of the road", "good bread"]
    together = predict_texts(writer, texts, new_tokens=5)
    assert together == [predict_texts(writer, [text], new_tokens=5)[0] for text in texts]


def test_completions_end_where_the_positions_of_the_model_do(writer, monkeypatch):
    # 32 tokens at most by the tokenizer, of which the prompt keeps its end.
    seen = given_to_generate(writer, monkeypatch)
    for text in ("red", "slow " * 60):
        assert predict_texts(writer, [text], new_tokens=200, max_length=32)[0]["completion"] is not None
        length = seen[-1]["input_ids"].shape[1]
        assert 0 < seen[-1]["max_new_tokens"] == 32 - length
    assert length == 16


def test_a_run_loaded_into_a_model_of_the_callers_has_its_tokenizer(work, tagger):
    # The same answers, whoever built the model.
    fresh = open_job(Job(**tagger.about["job"])).opened.model
    again = load_run(tagger.path, model=fresh)
    assert again.model is fresh
    texts = ["red engine fast"]
    assert predict_texts(again, texts) == predict_texts(tagger, texts)


def left_padding(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))


@pytest.mark.parametrize("task", ["text_classification", "token_classification"])
def test_a_tokenizer_for_generation_does_not_move_the_positions(task, work):
    # GPT-2's tokenizers often pad on the left; a text would stand at other positions in longer company.
    model = save_tiny(work / f"left-{task}", "gpt2")
    left_padding(model)
    words = {"tokens": "red engine fast", "tags": "O N O"}
    rows = [words] * 10 if task.startswith("token") else [{"text": "red", "label": n} for n in "ab" * 10]
    run = trained(work, model.name, rows, task=task)
    assert run.tokenizer.padding_side == "left"  # what other libraries generate with
    alone = predict_texts(run, ["red engine"])[0]
    (beside, _) = predict_texts(run, ["red engine", "the red engine of the fast road " * 3])
    assert {**beside, "probabilities": None} == {**alone, "probabilities": None}
    if "probabilities" in alone:
        assert beside["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
    inputs = run.tokenizer(["red engine"], return_tensors="pt")
    with torch.no_grad():
        logits = run.model(**inputs).logits[0]
    assert alone.get("probabilities", {}) == pytest.approx(
        dict(zip(run.classes, logits.softmax(-1).tolist())) if logits.ndim == 1 else {}, abs=1e-6
    )


def test_padding_predicts_no_token(work, tmp_path):
    # Perplexity is over the tokens of a text but its first, wherever the tokenizer pads.
    found = []
    for side in ("right", "left"):
        folder = save_tiny(work / f"llama-{side}", "llama", "CausalLM")
        if side == "left":
            left_padding(folder)
        rows = [{"text": "the red engine of the fast road"}, {"text": "a wheel"}] * 2  # blocks of 8, 8 and 6
        data = write_csv(tmp_path / "texts.csv", rows)
        text = {"task": "causal_lm", "max_length": 8, "padding": "all", "val": str(data)}
        job = Job(model=f"hf:{folder}", data=str(data), strategy="full", epochs=1, text=text)
        found.append(open_job(job).fit(progress=False).metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_an_empty_text_is_refused(writer, tagger):
    for run in (writer, tagger):
        with pytest.raises(DataError, match="texts 2 are empty"):
            predict_texts(run, ["red", " "])


def test_words_beyond_the_limit_have_no_tag_and_are_counted(tagger):
    # [CLS], four words, [SEP]
    short, long = predict_texts(tagger, ["red engine", "red engine fast slow red engine"])
    assert None not in short["tags"]
    assert short["cut"] == 0
    assert [tag is None for tag in long["tags"]] == [False] * 4 + [True] * 2
    assert long["cut"] == 2


def test_numbers_are_texts_and_empty_cells_are_refused(tmp_path):
    # 0 is a text; null and an empty cell are none.
    (tmp_path / "a.jsonl").write_text('{"text": 0}\n{"text": "red"}\n')
    assert read_texts([tmp_path / "a.jsonl"]) == [Text("0"), Text("red")]
    for cell in ("null", '""'):
        (tmp_path / "b.jsonl").write_text(f'{{"text": "red"}}\n{{"text": {cell}}}\n')
        with pytest.raises(DataError, match=r"row 2 of .*b\.jsonl has an empty 'text'"):
            read_texts([tmp_path / "b.jsonl"])


def test_tables_of_words_are_read_as_for_training(tmp_path):
    # A list of words is a text of words, and a .conll file holds sentences; other lists are refused.
    (tmp_path / "a.jsonl").write_text('{"tokens": ["red", "engine"], "tags": ["O", "N"]}\n')
    assert read_texts([tmp_path / "a.jsonl"], text_column="tokens") == [Text("red engine")]
    (tmp_path / "a.conll").write_text("red O\nengine N\n\nslow O\n")
    assert read_texts([tmp_path / "a.conll"], text_column="tokens") == [Text("red engine"), Text("slow")]
    with pytest.raises(
        DataError, match=r"no column 'words'; its columns are 'tokens', 'tags'\. Name yours: --text-column"
    ):
        read_texts([tmp_path / "a.conll"], text_column="words")
    for cell in ("[1, 2]", "[]", '["red engine"]'):
        (tmp_path / "b.jsonl").write_text(f'{{"text": {cell}}}\n')
        with pytest.raises(DataError, match=r"row 1 of .*b\.jsonl has \[.*\] in 'text'; expected a text, or"):
            read_texts([tmp_path / "b.jsonl"])


@pytest.mark.parametrize(
    ("content", "encoding", "texts"),
    [
        ("red\r\n\r\n  \nslow\n", "utf-8", ["red", "slow"]),
        ("red\u2028engine\x85\x0cfast\nslow", "utf-8", ["red\u2028engine\x85\x0cfast", "slow"]),
        ("\ufeffred\n", "utf-8", ["red"]),
        ("rouge été\n", "latin-1", ["rouge été"]),
        ("rouge été\n", "utf-16", ["rouge été"]),
    ],
)
def test_a_line_is_a_text_in_a_file_and_on_standard_input(content, encoding, texts, tmp_path, monkeypatch):
    # Ends of lines alone divide, a byte-order mark is no text, and both ways read the named encoding.
    raw = content.encode(encoding)
    (tmp_path / "texts.txt").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    assert [text.text for text in read_texts([tmp_path / "texts.txt"], encoding=encoding)] == texts
    assert [text.text for text in read_texts(["-"], encoding=encoding)] == texts


def test_a_line_holds_a_pair_after_a_tab(tmp_path):
    # One with nothing before the tab is not left out: predict_texts tells its number.
    (tmp_path / "pairs.txt").write_text("red\tslow\n\n\tslow\nred\n")
    texts = read_texts([tmp_path / "pairs.txt"], pair_column="second")
    assert texts == [Text("red", "slow"), Text("", "slow"), Text("red")]


def test_a_pair_without_a_second_text_is_told(work):
    # Beside pairs it would be read as one with an empty second text, alone as no pair: two answers to one.
    rows = [{"text": "red", "other": word, "label": word} for word in ("fast", "slow")] * 9
    save_tiny(work / "pairs", "bert")
    run = trained(work, "pairs", rows, pair_column="other")
    whole = Text("red", "slow")
    assert predict_texts(run, [whole, whole])[0]["pair"] == "slow"
    for texts, numbers in (([whole, "red", Text("red", " ")], "2, 3"), (["red"], "1")):
        with pytest.raises(DataError, match=f"texts {numbers} have no second text; expected pairs.*tab"):
            predict_texts(run, texts)


def test_files_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    # Missing, without a text, or in another encoding: the name and what to give.
    with pytest.raises(DataError, match=r"none.txt' cannot be read: No such file.*Give a file of texts"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"blank.txt holds no text"):
        read_texts([tmp_path / "blank.txt"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DataError, match="standard input holds no text"):
        read_texts([])
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xe9t\xe9")))
    for name in (tmp_path / "latin.txt", "-"):
        with pytest.raises(DataError, match=r"cannot be read as utf-8: .*0xe9.*its encoding: --encoding"):
            read_texts([name])
    with pytest.raises(DataError, match=r"cannot be read as utf-99: unknown encoding"):
        read_texts([tmp_path / "latin.txt"], encoding="utf-99")


def test_masks_are_filled_with_the_likeliest_token(work):
    # As the model alone says, whatever else is in the batch; a text without a mask has none.
    save_tiny(work / "masked", "bert", "MaskedLM")
    run = trained(work, "masked", [{"text": "the red engine of the slow engine"}] * 20, task="masked_lm")
    texts = ["the [MASK] engine", "red", "the [MASK] and the slow [MASK] of the red engine"]
    rows = predict_texts(run, texts)
    for row, text in zip(rows, texts, strict=True):
        ids = run.tokenizer(text, return_tensors="pt")
        sure, best = run.model(**ids).logits[0].softmax(dim=-1).max(dim=-1)
        at = (ids["input_ids"][0] == run.tokenizer.mask_token_id).nonzero().flatten()
        assert [f["token"] for f in row["fillers"]] == [run.tokenizer.decode([i]) for i in best[at]]
        torch.testing.assert_close(torch.tensor([f["probability"] for f in row["fillers"]]), sure[at])
    assert [len(row["fillers"]) for row in rows] == [1, 0, 2]


def test_a_run_without_a_tokenizer_is_told(tagger):
    # What to do instead is said.
    with pytest.raises(RunError, match=r"has no tokenizer.*Finish it, or give the predict\(\)"):
        predict_texts(dataclasses.replace(tagger, tokenizer=None), ["red"])
