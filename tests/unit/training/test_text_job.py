"""Jobs on texts: the language model's part, interruption, padding for the cache, and what a run records."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from layerwise.errors import DataError, LayerwiseError, ModelError, PlanError, RunError
from layerwise.sources.models import open_model
from layerwise.sources.texttable import TextPart, TextTable
from layerwise.training import language_first, text_job
from layerwise.training.data import open_batches
from layerwise.training.fit import fit
from layerwise.training.job import Job, open_job
from layerwise.training.key_cache import without_key_cache
from layerwise.training.language_first import language_model_of, texts_of
from layerwise.training.resuming import resume_job
from layerwise.training.run import load_run
from tiny_text import save_tiny, tiny_model, tiny_tokenizer, topic_rows, write_csv

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


class _BegunError(Exception):
    pass


@pytest.mark.parametrize(("kind", "told"), [(None, True), ("MaskedLM", False)])
def test_a_language_models_head_that_begins_at_random_is_told_before_it_learns(kind, told, work, monkeypatch):
    # An encoder published without it (sentence encoders): perplexity begins above the number of tokens.
    def begin(*args, **options):
        raise _BegunError

    said = []
    monkeypatch.setattr(text_job.Reporter, "say", lambda self, line: said.append(line))
    monkeypatch.setattr(language_first, "fit", begin)
    save_tiny(work / f"from-{kind}", "bert", kind)
    with pytest.raises(_BegunError):
        open_job(job(work, model=f"from-{kind}", lm_epochs=1)).fit(progress=False)
    assert len(said) == told
    assert all(line.startswith("masked_lm: new output layer cls.predictions") for line in said)


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


def test_options_of_texts_that_are_given_in_vain_are_told(work):
    # Each names the option, and what it is for.
    given = {"lm_lr": 1e-3, "lm_strategy": "full", "label_separator": ";"}
    notes = open_job(job(work, **given)).notes
    assert [note.split(";")[0] for note in notes if "not used" in note][:3] == [
        "--label-separator is for the task 'multi_label', not 'text_classification'",
        "--lm-lr is for --lm-epochs, of which there are none",
        "--lm-strategy is for --lm-epochs, of which there are none",
    ]
    (note,) = [n for n in open_job(job(work, task="masked_lm")).notes if n.startswith("--")]
    assert note == "--label-column is for labels; the task 'masked_lm' has none, so it is not used"


def test_the_language_models_strategy_is_looked_at_before_the_texts(work):
    # Also where these cannot be read.
    named = dataclasses.replace(job(work, lm_epochs=1, lm_strategy="fulll"), data="nowhere.csv")
    with pytest.raises(PlanError, match="strategy 'fulll' is not known"):
        open_job(named)


def test_a_length_above_that_of_the_model_is_refused(work):
    with pytest.raises(DataError, match="--max-length is 999"):
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
    if family == "t5":
        pytest.importorskip("transformers", minversion="5", reason="T5 rounded by the place in the batch")
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
        configs = [module.config for module in prepared.opened.model.modules() if hasattr(module, "config")]
        assert configs[0].use_cache
        assert configs[-1].use_cache  # T5's decoder has one of its own
    cached, plain = found
    notes = [note for note in cached.notes if note.startswith("prefix cache")]
    assert notes
    assert all(": memory, cut at" in note and "keys and values" not in note for note in notes), notes
    assert cached.metrics == plain.metrics
    for name, value in cached.model.state_dict().items():
        assert torch.equal(plain.model.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["fit", "search", "transfer_curve"])
def test_calls_from_python_store_no_keys_and_values(work, monkeypatch, name):
    # Whatever trains, it is `fit` that turns them off, and on again.
    from layerwise.choosing import curve, search, trials

    told = []

    def noted(*given, **options):
        result = fit(*given, **options)
        told.extend(note for note in result.notes if note.startswith("prefix cache: memory"))
        return result

    monkeypatch.setattr(trials, "fit", noted)
    monkeypatch.setattr(curve, "fit", noted)
    opened = open_job(job(work, model="gpt2", padding="all"))
    model, data = opened.opened.model, opened.data
    more = {"layers": opened.layers, "batch_size": 8}
    if name == "fit":
        noted(model, data.train, data.val, plan=opened.plan, progress=False, **more)
    elif name == "search":
        search.search(model, data.train, data.val, trials=1, depths=[1], epochs=2, **more)
    else:
        curve.transfer_curve(model, data.train, data.val, depths=[1], epochs=2, **more)
    assert told
    assert not any("keys and values" in note for note in told), told
    assert model.config.use_cache


def test_a_configuration_that_is_not_of_transformers_is_left_alone():
    # What it calls use_cache is its own affair; it may be frozen.
    @dataclasses.dataclass(frozen=True)
    class Own:
        use_cache: bool = True

    model = torch.nn.Linear(2, 2)
    model.config = Own()
    with without_key_cache(model):
        assert model.config.use_cache


def test_interrupted_in_the_language_model_it_says_how_to_go_on(work, tmp_path, monkeypatch):
    # By its folder, or by the same command: from the epoch that was saved, to the end of a run in one go.
    whole = open_job(job(work, lm_epochs=2)).fit(out=tmp_path / "whole", progress=False)
    real = language_first.fit

    def interrupted(*args, **options):
        def stop(entry):
            raise KeyboardInterrupt

        return real(*args, on_epoch=stop, **options)

    with monkeypatch.context() as patch:
        patch.setattr(language_first, "fit", interrupted)
        for name in ("cut", "by command"):
            with pytest.raises(KeyboardInterrupt, match=f"part; go on with it: .* --resume .*{name}"):
                open_job(job(work, lm_epochs=2)).fit(out=tmp_path / name, progress=False)
        with pytest.raises(KeyboardInterrupt, match=r"language model's part$"):  # without a folder it is lost
            open_job(job(work, lm_epochs=2)).fit(progress=False)
    history = tmp_path / "cut/language-model/history.jsonl"
    assert len(history.read_text().splitlines()) == 1
    with pytest.raises(RunError, match=r"first half of a run.*: layerwise fit --resume .*cut'?$"):
        resume_job(tmp_path / "cut" / "language-model")
    again = resume_job(tmp_path / "cut", progress=False)
    assert len(history.read_text().splitlines()) == 2
    by_command = open_job(job(work, lm_epochs=2)).fit(out=tmp_path / "by command", progress=False)
    for result in (again, by_command):
        assert result.metrics == whole.metrics
        for name, value in whole.model.state_dict().items():
            assert torch.equal(result.model.state_dict()[name], value)


def test_the_language_model_needs_no_validation_texts(work):
    # Without them there is no perplexity to tell, and its last weights are taken.
    small = dataclasses.replace(job(work, epochs=1, lm_epochs=1), val_frac=0.0)
    result = open_job(small).fit(progress=False)
    assert not any("perplexity" in note for note in result.notes)
    assert any("moved into the classifier" in note for note in result.notes)


def test_words_are_texts_of_the_language_model(work):
    # Joined by spaces; of pairs both texts count.
    assert texts_of(TextPart(words=[["red", "engine"], ["slow"]])) == ["red engine", "slow"]
    assert texts_of(TextPart(texts=["red", "slow"], pairs=["fast", "engine"])) == [
        "red",
        "slow",
        "fast",
        "engine",
    ]


def test_a_model_without_a_language_model_of_its_kind_is_told():
    # An encoder-decoder, and a kind that transformers has no language model of.
    from transformers import T5Config, ViTConfig

    with pytest.raises(ModelError, match=r"'hf:a' is an encoder-decoder \(t5\).*Leave --lm-epochs out"):
        language_model_of("hf:a", T5Config())
    with pytest.raises(ModelError, match=r"no language model of kind 'vit'. Leave --lm-epochs out"):
        language_model_of("hf:a", ViTConfig())


def test_a_dry_run_of_texts_measures_their_own_task(work):
    # Without it the labels of a language model would be taken for classes.
    write_csv(work / "plain.csv", [{"text": row["text"]} for row in topic_rows(20)])
    plain = dataclasses.replace(
        job(work, model="gpt2", strategy="full", task="causal_lm", label_column=None),
        data=str(work / "plain.csv"),
    )
    prepared = open_job(plain)
    before = {name: value.clone() for name, value in prepared.opened.model.state_dict().items()}
    (cost,) = prepared.dry_run().costs
    assert cost.trainable == sum(p.numel() for p in prepared.opened.model.parameters())
    assert cost.epoch_s > cost.step_s > 0
    assert all(torch.equal(before[n], value) for n, value in prepared.opened.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        (
            {},
            {"pooling": "mean", "task": "token_classification"},
            r"'mean' is for whole texts.*Leave pooling",
        ),
        ({"data": "demo:elpv"}, {}, r"'demo:elpv' are images, and 'hf:.*reads texts. Give a table"),
        ({"data": "demo:debian:many"}, {}, r"'demo:debian:many': expected demo:debian or demo:debian:NUMBER"),
        ({"data": "demo:debian:3²"}, {}, r"'demo:debian:3²': expected demo:debian or demo:debian:NUMBER"),
        (
            {"data": "demo:debian"},
            {"task": "regression", "val": "more.csv"},
            "--label-column, --task, --val-data: 'demo:debian' is no table. Leave it out, or give a table",
        ),
        (
            {"model": "timm:resnet18"},
            {"val": "more.csv"},
            "'timm:resnet18' takes images. Give hf:FOLDER_OR_ID, or leave --val-data out",
        ),
        (
            {"model": "timm:resnet18"},
            {"lm_epochs": 1},
            r"'timm:resnet18' takes images. Give hf:FOLDER_OR_ID, or leave --lm-epochs out",
        ),
        (
            {"strategy": None},
            {},
            "exactly one of a strategy and a plan file says what learns; neither is given",
        ),
        (
            {"plan": "plan.yaml"},
            {},
            "exactly one of a strategy and a plan file says what learns; both are given",
        ),
    ],
)
def test_jobs_that_contradict_themselves_are_told(changes, text, message, work):
    # What was given, and what to give instead.
    with pytest.raises(LayerwiseError, match=message):
        open_job(dataclasses.replace(job(work, **text), **changes))


def test_shares_are_told_where_the_demo_is_split_already(work, monkeypatch):
    # As of the demo's images.
    part = TextPart(texts=["red", "blue"] * 2, targets=["a", "b"] * 2)
    ready = TextTable("text_classification", dict.fromkeys(("train", "val", "test"), part), ("a", "b"))
    monkeypatch.setattr("layerwise.sources.debian.debian_texts", lambda **_: ready)
    demo = dataclasses.replace(job(work), data="demo:debian", text=None, val_frac=0.4)
    assert [note for note in open_job(demo).notes if "frac" in note] == [
        "--val-frac 0.4 (val_frac=) is not used: the data have a val part of their own"
    ]


def test_held_out_texts_of_which_nothing_is_scored_are_told(work):
    # In one word no token is masked: no perplexity of NaN.
    rows = [{"text": "the red engine of the slow engine", "split": "train"}] * 16 + [
        {"text": "red", "split": "val"}
    ]
    masked = job(work, strategy="full", task="masked_lm", label_column=None, split_column="split")
    prepared = open_job(dataclasses.replace(masked, data=str(write_csv(work / "masked.csv", rows))))
    with pytest.raises(DataError, match=r"nothing in the held-out data is scored.*Give more of them"):
        prepared.fit(progress=False)


def test_weights_for_other_classes_lose_their_head_if_asked(work, tmp_path):
    # As for images; what was asked for on the command line was not passed on.
    weights = tmp_path / "two.safetensors"
    theirs = open_model(job(work).model, num_classes=2).model.state_dict()
    safetensors.torch.save_file(theirs, weights)
    given = dataclasses.replace(job(work), weights=str(weights))
    with pytest.raises(ModelError, match=r"is for 2 classes, not 3.* --mismatched drop_head \(mismatched=\)"):
        open_job(given)
    opened = open_job(dataclasses.replace(given, mismatched="drop_head")).opened
    assert opened.model.classifier.out_features == 3
    assert torch.equal(opened.model.bert.pooler.dense.weight, theirs["bert.pooler.dense.weight"])


def save_classifier(folder, names):
    model = tiny_model("bert", num_labels=3)
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def test_a_published_classifier_keeps_the_order_of_its_classes(work, tmp_path):
    # Its output layer knows which output is which class; sorted, they would begin as one another.
    model = save_classifier(work / "published", ["Sport", "CARS", "food"])
    prepared = open_job(job(work, model="published"))
    assert prepared.data.classes == ("sport", "cars", "food")
    assert torch.equal(prepared.opened.model.classifier.weight, model.classifier.weight)
    assert "classes in the order of the model's own output layer: sport, cars, food" in prepared.notes
    topics = [row["topic"] for row in topic_rows(40)]
    part = prepared.data.train
    assert part.counts == {name: prepared.table.parts["train"].targets.count(name) for name in set(topics)}
    result = prepared.fit(out=tmp_path / "run", progress=False)
    assert result.task.classes == load_run(tmp_path / "run").classes == ("sport", "cars", "food")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["cars", "food", "sport"], False),
        (["LABEL_0", "LABEL_1", "LABEL_2"], False),
        (["good", "bad", "ugly"], True),
    ],
)
def test_an_output_layer_of_other_classes_is_told(names, told, work):
    # As many outputs by chance: nothing else would say what they were learned for.
    save_classifier(work / names[0], names)
    prepared = open_job(job(work, model=names[0]))
    assert prepared.data.classes == ("cars", "food", "sport")
    note = (
        "the output layer is kept: it was for the classes good, bad, ugly, and goes on as that for "
        "cars, food, sport, in this order"
    )
    assert [entry for entry in prepared.notes if "output layer" in entry] == ([note] if told else [])
