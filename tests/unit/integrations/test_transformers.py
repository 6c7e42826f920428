"""Hugging Face's Trainer carries a plan out: the weights of the Tuner's own loop, also when interrupted."""

import random
import re

import pytest
import torch
from tests.tiny_text import CONFIGS, WORDS, tiny_tokenizer

import layerwise
from layerwise.errors import LayerwiseWarning, ModelError

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("layerwise.integrations.transformers")


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": int(image.mean() > 0)} for image in images]


def start():
    """Return a small residual network with batch-norm, dropout nowhere."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def tuner_of(model, plan=None, steps_per_epoch=3):
    layers = layerwise.layer_map(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, granularity="stages")
    plan = plan or layerwise.lp_ft(layers, probe_epochs=1, epochs=3)
    return layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=0.01, steps_per_epoch=steps_per_epoch, layers=layers
    )


def train(
    model, tuner, data, folder, *, resume=None, callback=None, own=True, metric=None, eval_set=None, **options
):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{"num_train_epochs": 3, "per_device_train_batch_size": 8, **options},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        logging_strategy="no",
        max_grad_norm=0.0,
    )
    callback = callback or integration.TunerCallback(tuner, metric=metric)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=eval_set or data,
        callbacks=[callback],
        **({"optimizers": callback.optimizers} if own else {}),
        compute_metrics=lambda told: {"score": -len(trainer.state.log_history)},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(one, two):
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_trainer_carries_the_plan_out_and_keeps_frozen_norms_still(data, tmp_path):
    model = start()
    tuner = tuner_of(model)
    phases, frozen = [], []

    class Look(integration.TunerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            phases.append(self.tuner.phase.name)
            frozen.append(kwargs["model"].resnet.embedder.training)

    with layerwise.watch(model) as watched:
        train(model, tuner, data, tmp_path, callback=Look(tuner), save_strategy="no")
    assert phases == ["probe"] * 3 + ["tune"] * 6
    assert frozen == [False] * 3 + [True] * 6  # though Trainer calls model.train() at every step
    assert tuner.done
    assert "resnet.embedder.embedder.convolution.weight" in watched.report.moved


class Endless(torch.utils.data.IterableDataset):
    """The same samples again and again, without a length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        while True:
            yield from self.samples


@pytest.mark.parametrize("metric", [None, "eval_score"])
def test_an_endless_stream_goes_through_the_phases(data, tmp_path, metric):
    # Trainer sees one long epoch: those of the plan are counted in steps, and its end stops the training
    model = start()
    tuner = tuner_of(model)
    phases = []

    class Look(integration.TunerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            phases.append(self.tuner.phase.name)

    trainer = train(
        model, tuner, Endless(data), tmp_path, callback=Look(tuner, metric=metric), save_strategy="no",
        eval_set=data[:8], eval_strategy="steps", eval_steps=3, max_steps=20,
    )  # fmt: skip
    assert phases == ["probe"] * 3 + ["tune"] * 6
    assert tuner.done
    assert trainer.state.global_step == 9


def test_a_stream_that_ends_before_the_plan_is_warned_of(data, tmp_path):
    model = start()
    with pytest.warns(LayerwiseWarning, match="stops after 6 optimiser steps"):
        train(model, tuner_of(model), Endless(data), tmp_path, eval_set=data, save_strategy="no", max_steps=6)


def test_the_frozen_phase_moves_nothing_frozen(data, tmp_path):
    model = start()
    tuner = tuner_of(model)
    with (
        layerwise.watch(model) as watched,
        pytest.warns(LayerwiseWarning, match="stops after .* optimiser steps"),
    ):
        train(model, tuner, data, tmp_path, num_train_epochs=1, save_strategy="no")
    assert watched.report.moved == ("classifier.1.weight", "classifier.1.bias")
    assert watched.report.buffers_moved == ()


def test_trainer_ends_in_the_weights_of_the_plain_loop(data, tmp_path):
    model, batches = start(), []
    tuner = tuner_of(model)
    hook = model.register_forward_pre_hook(
        lambda _, args, batch: batches.append({k: batch[k].clone() for k in ("pixel_values", "labels")}),
        with_kwargs=True,
    )
    train(model, tuner, data, tmp_path, save_strategy="no")
    hook.remove()

    ours = start()
    again = tuner_of(ours)
    left = iter(batches)
    for _ in again.epochs():
        for _ in range(3):
            ours.train()
            ours(**next(left)).loss.backward()
            again.step()
    assert_same(model, ours)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_resumed_at_any_step_it_ends_in_the_same_weights(data, tmp_path, step):
    first = start()
    train(first, tuner_of(first), data, tmp_path, save_strategy="steps", save_steps=1)
    second = start()
    tuner = tuner_of(second)
    train(
        second,
        tuner,
        data,
        tmp_path / "again",
        save_strategy="no",
        resume=str(tmp_path / f"checkpoint-{step}"),
    )
    assert tuner.done
    assert_same(second, first)


def test_a_phase_ends_when_the_metric_stalls_and_the_run_with_the_plan(data, tmp_path):
    model = start()
    layers = layerwise.layer_map(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, granularity="stages")
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=5, patience_epochs=1, last_epochs=1)
    tuner = tuner_of(model, plan)
    trainer = train(
        model, tuner, data, tmp_path, metric="eval_score", eval_strategy="epoch", save_strategy="no",
        num_train_epochs=plan.total_epochs(3),
    )  # fmt: skip
    assert tuner.done
    assert trainer.state.global_step == tuner.step_count < plan.total_steps(3)


def test_an_evaluation_of_another_data_set_is_let_pass(data, tmp_path):
    # several sets, of which one has the metric; and the test set, when all is over
    model = start()
    layers = layerwise.layer_map(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, granularity="stages")
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=5, patience_epochs=1, last_epochs=1)
    tuner = tuner_of(model, plan)
    trainer = train(
        model, tuner, data, tmp_path, metric="eval_near_score", eval_strategy="epoch", save_strategy="no",
        num_train_epochs=plan.total_epochs(3), eval_set={"far": data[:8], "near": data},
    )  # fmt: skip
    assert trainer.state.global_step == tuner.step_count < plan.total_steps(3)
    assert "test_score" in trainer.evaluate(data, metric_key_prefix="test")


def test_accumulated_batches_count_as_one_step(data, tmp_path):
    model = start()
    tuner = tuner_of(model, steps_per_epoch=2)
    train(model, tuner, data, tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    assert tuner.step_count == 6
    assert tuner.done


def test_wrong_set_ups_are_refused(data, tmp_path):
    model = start()
    with pytest.raises(ModelError, match="steps_per_epoch=3"):
        train(model, tuner_of(model, steps_per_epoch=7), data, tmp_path, save_strategy="no")
    with pytest.raises(ModelError, match=r"optimizers=callback\.optimizers"):
        train(model, tuner_of(model), data, tmp_path, own=False, save_strategy="no")
    with pytest.raises(ModelError, match="not among the evaluation metrics"):
        train(
            model, tuner_of(model), data, tmp_path, metric="oops", eval_strategy="epoch", save_strategy="no"
        )


class Counted(list):
    """Samples that count how often they are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def train_with(cache_of, samples, folder, *, epochs=4, resume=None, held_out=None, **options):
    """Train the last two groups; `cache_of` returns a cache for model and tuner, or None.

    Returns:
        The weights, the cache, and the losses of the evaluations.
    """
    model = start()
    layers = layerwise.layer_map(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, granularity="stages")
    steps = 3 // options.get("gradient_accumulation_steps", 1)
    tuner = tuner_of(model, layerwise.top_k(layers, k=2, epochs=epochs), steps_per_epoch=steps)
    cache, callback = cache_of(model, tuner), integration.TunerCallback(tuner)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            return loader if cache is None else cache.as_loader(loader)

        def get_eval_dataloader(self, eval_dataset=None):
            loader = super().get_eval_dataloader(eval_dataset)
            return loader if cache is None else cache.as_loader(loader)

    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, use_cpu=True, report_to=[],
            disable_tqdm=True, max_grad_norm=0.0, **options,
        ),
        train_dataset=samples,
        eval_dataset=held_out,
        callbacks=[callback],
        optimizers=callback.optimizers,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    losses = [told["eval_loss"] for told in trainer.state.log_history if "eval_loss" in told]
    return model.state_dict(), cache, losses


def no_cache(model, tuner):
    return None


def a_cache(model, tuner):
    return layerwise.PrefixCache(model, tuner=tuner, storage="memory")


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_trainer_trains_from_a_cache(accumulated, data, tmp_path) -> None:
    # it fetches the batches of a whole update ahead, and gives the model a number that it counts itself
    samples, others = Counted(data), Counted(data)
    options = {"gradient_accumulation_steps": accumulated}
    plain, *_ = train_with(no_cache, samples, tmp_path / "plain", **options)
    weights, cache, _ = train_with(a_cache, others, tmp_path / "cached", **options)
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert "cut at resnet" in cache.describe()
    assert others.reads < samples.reads == 96


def test_the_trainer_resumes_in_mid_epoch_with_a_cache(data, tmp_path) -> None:
    plain, *_ = train_with(no_cache, data, tmp_path, save_strategy="steps", save_steps=4)
    weights, cache, _ = train_with(a_cache, data, tmp_path / "2", resume=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert "cut at resnet" in cache.describe()


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_the_trainer_makes_a_new_loader_for_each_evaluation(kind, data, tmp_path) -> None:
    held_out, options = data[:8], {"eval_strategy": "epoch", "remove_unused_columns": False}
    if kind == "datasets":
        datasets = pytest.importorskip("datasets")
        columns = {name: [sample[name] for sample in held_out] for name in held_out[0]}
        held_out = datasets.Dataset.from_dict(columns | {"name": list("abcdefgh")}).with_format("torch")
        del options["remove_unused_columns"]
    plain, _, expected = train_with(no_cache, data, tmp_path / "plain", held_out=held_out, **options)
    weights, cache, losses = train_with(a_cache, data, tmp_path / "cached", held_out=held_out, **options)
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert losses == expected
    loaders = re.findall(r"\(loader (\d)\): memory, cut at resnet", cache.describe())
    assert set(loaders) == {"1", "2"}  # one for training, one for all evaluations


def train_texts(folder, *, cached, resume=None, also=(), **options):
    """Train the last layer of a small BERT on texts that the collator pads to the longest of a batch."""
    tokenizer = tiny_tokenizer()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 28))) for _ in range(41)]
    samples = [{**tokenizer(text), "label": len(text) % 2} for text in texts]
    kind, config = CONFIGS["bert"]
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(getattr(transformers, kind)(**config))
    layers = layerwise.layer_map(model, {"input_ids": torch.ones(2, 6, dtype=torch.int64)})
    tuner = layerwise.Tuner(
        model,
        layerwise.top_k(layers, k=2, epochs=4),
        torch.optim.AdamW,
        lr=0.01,
        steps_per_epoch=6,
        layers=layers,
    )
    cache = layerwise.PrefixCache(model, tuner=tuner, storage="memory") if cached else None

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            loader = layerwise.by_length(super().get_train_dataloader())
            return loader if cache is None else cache.as_loader(loader)

    callback = integration.TunerCallback(tuner)
    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), num_train_epochs=4, per_device_train_batch_size=8, use_cpu=True, report_to=[],
            disable_tqdm=True, max_grad_norm=0.0, **options,
        ),
        train_dataset=samples,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[callback, *also],
        optimizers=callback.optimizers,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict(), cache


def test_texts_that_the_collator_pads_are_cached_by_length(tmp_path) -> None:
    # what Trainer does with texts by default has no cache; by length it has one, and can be resumed
    plain, _ = train_texts(tmp_path, cached=False, save_strategy="steps", save_steps=9)
    for resume in (None, str(tmp_path / "checkpoint-9"), str(tmp_path / "checkpoint-18")):
        weights, cache = train_texts(tmp_path / "cached", cached=True, resume=resume)
        assert all(torch.equal(value, weights[name]) for name, value in plain.items())
        assert "cut at bert.encoder.layer.0" in cache.describe()


@pytest.mark.parametrize("options", [{"max_steps": 5}, {"num_train_epochs": 1.5}])
def test_runs_that_end_inside_an_epoch_are_no_error(data, tmp_path, options):
    # the number of steps in an epoch is that of the loader, not of the run
    model = start()
    layers = layerwise.layer_map(model, {"pixel_values": torch.randn(2, 3, 8, 8)}, granularity="stages")
    tuner = tuner_of(model, layerwise.linear_probe(layers, steps=5))
    train(model, tuner, data, tmp_path, **options)
    assert tuner.done
    assert tuner.step_count == 5


class NoInputGrads(transformers.TrainerCallback):
    """Takes the hook off that Trainer sets on the embeddings where layers are checkpointed."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.disable_input_require_grads()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_gradient_checkpointing_is_cached_without_its_hook_on_the_embeddings(tmp_path) -> None:
    # the reason says what to do, and doing that is enough
    pytest.importorskip("transformers", minversion="5", reason="older ones set no such hook")
    options = {"gradient_checkpointing": True, "save_strategy": "no"}
    plain, _ = train_texts(tmp_path, cached=False, **options)
    weights, cache = train_texts(tmp_path, cached=True, **options)
    assert "model.disable_input_require_grads() when training begins" in cache.describe()
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    weights, cache = train_texts(tmp_path, cached=True, also=[NoInputGrads()], **options)
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    assert "cut at bert.encoder.layer.0" in cache.describe()
