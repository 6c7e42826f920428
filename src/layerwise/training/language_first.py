"""The first half of ULMFiT on a transformer: the language model is tuned on the target's texts.

An encoder is tuned as a masked language model, a decoder as a causal one; then its body (embeddings and
layers) moves into the classifier, whose head is new. What follows is the classifier's own plan; with
``--strategy ulmfit`` it is unfrozen group by group, so that the whole recipe is one command.

Source: Howard and Ruder 2018, Universal Language Model Fine-tuning for Text Classification, sections 3.2
and 3.3. Theirs is a three-layer LSTM tuned at rates divided by 2.6 a layer; over twelve layers that would
leave the first ones where they are, so the language model's rates fall by 0.9 a layer here unless another
strategy is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from layerwise.errors import ModelError
from layerwise.layers.randomness import seed_everything
from layerwise.sources.texttable import TextPart, TextTable, default_text_column
from layerwise.training.fit import fit
from layerwise.training.token_tasks import LanguageModelling
from layerwise.training.transformers_folder import move_body

if TYPE_CHECKING:
    from layerwise.training.text_job import PreparedText

TOKENS_A_BATCH = 4096
"""At most so many tokens in a batch: a language model's outputs are as wide as its vocabulary, so 32
blocks of 256 tokens would take a gigabyte for each copy of them."""

_PASSED_ON = (
    "batch_size",
    "seed",
    "precision",
    "accumulate",
    "clip_norm",
    "optimizer",
    "workers",
    "cache",
    "progress",
)
"""Options of the classifier's `fit` that hold for the language model too."""


def language_model_of(spec: str, config: Any) -> Literal["masked_lm", "causal_lm"]:
    """Return how a transformers model is tuned as a language model, from its configuration.

    Raises:
        ModelError: it is an encoder-decoder, or transformers has no language model of its kind.
    """
    from transformers.models.auto import modeling_auto as tables

    if config.is_encoder_decoder:
        raise ModelError(
            f"{spec!r} is an encoder-decoder ({config.model_type}), whose pretraining is neither masked nor "
            "causal language modelling of one text. Leave --lm-epochs out, or take an encoder or a decoder."
        )
    if config.model_type in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked_lm"
    if config.model_type in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal_lm"
    raise ModelError(
        f"transformers has no language model of kind {config.model_type!r}. Leave --lm-epochs out."
    )


def texts_of(part: TextPart) -> list[str]:
    """Return all texts of a part, second ones of pairs included; words joined by spaces."""
    if part.words is not None:
        return [" ".join(words) for words in part.words]
    return [*part.texts, *(part.pairs or [])]


def tune_language_model(
    prepared: PreparedText, *, out: Path | None, say: Callable[[str], None] = lambda _: None, **more: Any
) -> list[str]:
    """Tune the language model on the texts of a prepared job, and move its body into the classifier.

    The classifier's body is changed in place; its head and pooler stay. Only the training part is learned
    from; the validation part, where there is one, tells the perplexity and picks the epoch.

    Args:
        prepared: a job of a labelled task, its classifier not trained yet.
        out: folder of the language model's own run; one that was begun there is gone on with.
        say: told each line as soon as it is known.
        more: options of `layerwise.fit`.

    Returns:
        Lines for people: an output layer that begins at random, perplexity before and after, what moved.

    Raises:
        ModelError: the model has no language model, or the task is language modelling already.
    """
    from layerwise.layers.mapping import layer_map
    from layerwise.plans.parsing import parse_strategy
    from layerwise.sources.models import open_model
    from layerwise.sources.pooled import MeanPooledClassifier
    from layerwise.sources.text import encode
    from layerwise.training.data import open_batches
    from layerwise.training.evaluate import evaluate
    from layerwise.training.text_job import stage_exists

    job, options = prepared.job, prepared.options
    if prepared.data.task in ("causal_lm", "masked_lm"):
        raise ModelError(
            f"the task is {prepared.data.task!r} already, so there is nothing to tune first. "
            "Leave --lm-epochs out."
        )
    target = prepared.opened.model
    classifier: Any = target.body if isinstance(target, MeanPooledClassifier) else target
    kind = language_model_of(job.model, classifier.config)
    seed_everything(job.seed)
    opened = open_model(job.model, weights=job.weights, pretrained=job.pretrained, task=cast(Any, kind))
    parts = {
        name: TextPart(texts=texts_of(part)) for name, part in prepared.table.parts.items() if name != "test"
    }
    data = encode(TextTable(kind, parts), opened.tokenizer, max_length=prepared.data.max_length)
    layers = layer_map(opened.model, opened.example_input, granularity="blocks")
    plan = parse_strategy(
        options.lm_strategy, layers, epochs=options.lm_epochs, schedule="slanted_triangular"
    )
    settings = {name: value for name, value in {**job.options, **more}.items() if name in _PASSED_ON}
    room = max(1, TOKENS_A_BATCH // data.max_length)
    settings["batch_size"] = min(settings.get("batch_size", 32), room)
    column = options.text_column or default_text_column(options.task)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    if opened.replaced_head is not None:
        note(
            f"{kind}: {opened.replaced_head}, at random, since the weights come without a language model's; "
            "its first gradients are noise, from which the layers below learn too"
        )
    task = LanguageModelling(kind)
    if data.val is not None:
        batches = open_batches(data.val, train=False, batch_size=settings["batch_size"], seed=job.seed)
        before = evaluate(opened.model, batches, task).values["perplexity"]
    result = fit(
        opened.model,
        data.train,
        data.val,
        plan=plan,
        layers=layers,
        task=task,
        lr=options.lm_lr,
        out=out,
        resume=stage_exists(out),
        about={
            "model": opened.to_dict(),
            "data": {"source": job.data, "task": kind, "max_length": data.max_length},
            "table": {"text_column": column, "encoding": options.encoding},  # a pair is two texts here
            "whole": {"job": prepared.about["job"], "plan": prepared.plan.model_dump(mode="json")},
        },
        **settings,
    )
    if data.val is not None:
        after = result.metrics["perplexity"]
        note(f"{kind}: perplexity of the validation texts {before:.1f} -> {after:.1f}")
    note(str(move_body(result.model, classifier)))
    return notes
