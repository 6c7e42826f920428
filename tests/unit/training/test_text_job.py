"""Jobs on texts: the language model's part, interruption, padding for the cache, and what a run records."""

import json

import pytest
import torch

from layerwise.errors import DataError, ModelError
from layerwise.training import text_job
from layerwise.training.data import open_batches
from layerwise.training.job import Job, open_job
from layerwise.training.run import load_run
from tiny_text import save_tiny, topic_rows, write_csv

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_tiny(folder / "bert", "bert")
    save_tiny(folder / "gpt2", "gpt2")
    write_csv(folder / "train.csv", topic_rows(40))
    return folder


def job(work, *, model="bert", strategy="linear_probe", epochs=2, cache="off", **text):
    return Job(
        model=f"hf:{work / model}",
        data=str(work / "train.csv"),
        strategy=strategy,
        epochs=epochs,
        options={"lr": 1e-3, "batch_size": 8, "cache": cache},
        text={"label_column": "topic", **text},
    )


def test_the_body_of_the_language_model_is_where_the_classifier_starts(work, tmp_path):
    # With a probe nothing but the head learns afterwards, so the run's body is the language model's.
    out = tmp_path / "run"
    open_job(job(work, lm_epochs=2, lm_lr=1e-2)).fit(out=out, progress=False)
    language_model = load_run(out / "language-model").model.bert.state_dict()
    pretrained = open_job(job(work)).opened.model.bert.state_dict()
    body = load_run(out).model.bert.state_dict()
    moved = [name for name in language_model if not torch.equal(body[name], pretrained[name])]
    assert all(torch.equal(body[name], value) for name, value in language_model.items())
    assert len(moved) > 20


def test_a_decoder_is_tuned_as_a_causal_language_model(work, tmp_path):
    # GPT-2 has no masks; its perplexity is told before and after.
    result = open_job(job(work, model="gpt2", lm_epochs=1)).fit(out=tmp_path / "run", progress=False)
    assert any(note.startswith("causal_lm: perplexity") for note in result.notes)
    about = json.loads((tmp_path / "run/language-model/run.json").read_text())
    assert about["task"]["name"] == "causal_lm"


def test_interrupted_between_the_two_halves_it_goes_on_to_the_same_result(work, tmp_path, monkeypatch):
    # The language model is not tuned again, and the end is that of an uninterrupted run, bit for bit.
    whole = open_job(job(work, lm_epochs=1)).fit(out=tmp_path / "whole", progress=False)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_job, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_job(job(work, lm_epochs=1)).fit(out=tmp_path / "cut", progress=False)
    before = (tmp_path / "cut/language-model/history.jsonl").read_text()
    again = open_job(job(work, lm_epochs=1)).fit(out=tmp_path / "cut", progress=False)
    assert (tmp_path / "cut/language-model/history.jsonl").read_text() == before
    assert again.metrics == whole.metrics
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def lengths_by_sample(prepared):
    """Return the lengths at which each sample of the training data comes in three epochs."""
    seen: dict[int, set[int]] = {}
    batches = open_batches(prepared.data.train, train=True, batch_size=4)
    for epoch in range(3):
        batches.begin(epoch)
        for indices, batch in zip(batches.loader.batch_sampler, batches.loader, strict=True):
            for index in indices:
                seen.setdefault(index, set()).add(batch["input_ids"].shape[1])
    return seen


def test_a_sample_has_one_length_whatever_the_cache(work):
    # A few lengths, each sample always the same one; the cache does not change them, padding= does.
    for cache in ("auto", "off"):
        prepared = open_job(job(work, cache=cache))
        seen = lengths_by_sample(prepared)
        assert all(len(lengths) == 1 for lengths in seen.values())
        for index, length in enumerate(prepared.data.train.lengths):
            assert length <= min(seen[index]) <= max(prepared.data.train.lengths)
    assert any(
        len(lengths) > 1 for lengths in lengths_by_sample(open_job(job(work, padding="batch"))).values()
    )
    longest = max(open_job(job(work)).data.train.lengths)
    assert set().union(*lengths_by_sample(open_job(job(work, padding="all"))).values()) == {longest}


def test_the_cache_does_not_change_what_is_learned(work, caplog):
    # Texts of several lengths, the last layer and its dropout trained: the same bits with the cache.
    caplog.set_level("INFO", logger="layerwise.cache")
    options = {"strategy": "top_k:k=2", "epochs": 3}
    plain, cached = (
        open_job(job(work, cache=cache, **options)).fit(progress=False) for cache in ("off", "memory")
    )
    assert any("memory, cut at" in record.message for record in caplog.records)
    pretrained = open_job(job(work)).opened.model.state_dict()
    moved = [n for n, value in plain.model.state_dict().items() if not torch.equal(value, pretrained[n])]
    assert any("layer.1" in name for name in moved)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(cached.model.state_dict()[name], value), name
    losses = [[entry["train_loss"] for entry in result.history] for result in (plain, cached)]
    assert losses[0] == losses[1]


def test_padding_does_not_change_what_is_learned(work):
    # However it is padded, a run ends at about the same weights. A probe, whose dropout sees pooled
    # vectors: that of a layer draws as many numbers as there are tokens.
    results = [
        open_job(job(work, padding=padding)).fit(progress=False) for padding in ("auto", "batch", "all")
    ]
    pretrained = open_job(job(work)).opened.model.state_dict()
    assert not torch.equal(results[0].model.classifier.weight, pretrained["classifier.weight"])
    for name, value in results[0].model.state_dict().items():
        for other in results[1:]:
            torch.testing.assert_close(other.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)


def test_a_length_above_that_of_the_model_is_refused(work):
    with pytest.raises(DataError, match="max_length is 999"):
        open_job(job(work, max_length=999))


def test_language_modelling_needs_no_language_model_first(work, tmp_path):
    prepared = open_job(
        Job(
            model=f"hf:{work / 'gpt2'}",
            data=str(work / "train.csv"),
            strategy="full",
            epochs=1,
            text={"task": "causal_lm", "lm_epochs": 1},
        )
    )
    with pytest.raises(ModelError, match="the task is 'causal_lm' already"):
        prepared.fit(out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", "causal_lm"), ("llama", "text_classification"), ("t5", "text_classification")],
)
def test_cached_runs_of_every_kind_end_in_the_same_bits(family, task, work, tmp_path):
    # Attention masks, decoders and encoder-decoders: replaying the frozen part changes nothing, and keys and
    # values, which only generation needs, are not stored.
    save_tiny(tmp_path / family, family)
    found = []
    for cache in ("memory", "off"):
        prepared = open_job(
            Job(
                model=f"hf:{tmp_path / family}",
                data=str(work / "train.csv"),
                strategy="top_k:k=1",
                epochs=3,
                options={"cache": cache, "batch_size": 8, "lr": 1e-2},
                text={"task": task, "label_column": "topic", "max_length": 16, "padding": "all"},
            )
        )
        found.append(prepared.fit(progress=False))
        assert prepared.opened.model.config.use_cache
    cached, plain = found
    notes = [note for note in cached.notes if note.startswith("prefix cache")]
    assert notes
    assert all(": memory, cut at" in note and "k_proj" not in note for note in notes), notes
    assert cached.metrics == plain.metrics
    for name, value in cached.model.state_dict().items():
        assert torch.equal(plain.model.state_dict()[name], value), name
