"""Predictions for texts: prompts as in training, positions, words that are cut off, cells that are empty."""

import pytest

from layerwise.errors import DataError
from layerwise.training.job import Job, open_job
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
