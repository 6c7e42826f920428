"""Tasks whose labels belong to tokens: tags of words, and language modelling.

Each is a frozen dataclass with the members of `layerwise.training.tasks.Task`. The label `IGNORED` marks
what is not scored: padding, further pieces of a word, the prompt of an instruction.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.sources.encoding import IGNORED
from layerwise.training.tasks import (
    Batch,
    Scores,
    class_labels,
    kind_of,
    raise_found,
    run_model,
    same_names,
    settle_mode,
    split_batch,
    too_few,
)

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


@dataclass(frozen=True)
class TokenClassification:
    """One tag for each token: named entities in BIO tags, or plain tags such as parts of speech.

    The loss is the mean cross-entropy over all tokens that are scored. For BIO tags the metrics are
    those of whole entities (type and both ends right), micro-averaged, as in CoNLL.

    Attributes:
        classes: the tags, in the order of the model's outputs.
        name: key in `layerwise.training.known_tasks.TASKS`.
        mode: ``"max"``, as more of either monitor is better.
    """

    classes: tuple[str, ...]
    name: str = "token_classification"
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        """Look at the tags.

        Raises:
            DataError: some are BIO and others are not.
        """
        _ = self.types

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Types of entities; empty for plain tags."""
        from layerwise.training.entities import entity_types

        return entity_types(self.classes)

    @property
    def monitor(self) -> str:
        """``"entity_f1"`` for BIO tags, ``"macro_f1"`` over tokens for plain ones."""
        return "entity_f1" if self.types else "macro_f1"

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples of equal length stacked; texts are padded by the collator of their data."""
        return torch.utils.data.default_collate(samples)

    def size(self, batch: Batch) -> int:
        """Return the number of scored tokens, over which the loss is a mean."""
        return _scored(split_batch(batch)[2])

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, float[N, tokens, tags]."""
        return run_model(model, batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the scored tokens; 0 where none is."""
        return _token_loss(output, class_labels(batch))

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs, labels and tags.

        Raises:
            DataError: there is one tag, or two of one name; the output is not [N, tokens, tags]; or labels
                are no tags of its tokens.
        """
        wrong = _wrong_tokens(output, split_batch(batch)[2], len(self.classes), "tags")
        raise_found(too_few(self.classes, "tag") + same_names(self.classes) + wrong)

    def metrics(self) -> MetricCollection:
        """Return accuracy and macro F1 of tokens and, for BIO tags, counts of entities."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        from layerwise.training.entities import EntityCounts

        k = len(self.classes)
        counts = {"entities": EntityCounts(self.types)} if self.types else {}
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(k, average="micro"),
                "macro_f1": MulticlassF1Score(k, average="macro"),
                **counts,
            },
            compute_groups=False,  # they take different things
        )

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch."""
        labels = split_batch(batch)[2]
        best, scored = output.argmax(dim=-1), labels != IGNORED
        if bool(scored.any()):
            for name in ("accuracy", "macro_f1"):
                metrics[name].update(best[scored], labels[scored])
        if self.types:
            metrics["entities"].update(
                [self._tags(row[keep]) for row, keep in zip(best, scored)],
                [self._tags(row[keep]) for row, keep in zip(labels, scored)],
            )

    def _tags(self, indices: Tensor) -> list[str]:
        return [self.classes[index] for index in indices.tolist()]

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return the metrics as numbers and, for BIO tags, one row a type of entity."""
        from layerwise.training.entities import precision_recall_f1

        values = {name: float(metrics[name].compute()) for name in ("accuracy", "macro_f1")}
        if not self.types:
            return Scores(values)
        counts = metrics["entities"].compute().cpu()
        precision, recall, f1 = precision_recall_f1(*counts.sum(dim=1).tolist())
        rows = []
        for i, kind in enumerate(self.types):
            of_kind = precision_recall_f1(*counts[:, i].tolist())
            named = {key: round(v, 6) for key, v in zip(("precision", "recall", "f1"), of_kind)}
            rows.append({"class": kind, **named, "samples": int(counts[2, i])})
        entities = {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
        return Scores({**entities, **values}, {"per_class": rows})

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return for each sample the tag of every token (padding included), and its probability."""
        probabilities, best = output.float().softmax(dim=-1).max(dim=-1)
        return [
            {"tags": self._tags(row), "probabilities": sure}
            for row, sure in zip(best, probabilities.tolist())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LanguageModelling:
    """The next token, or the masked tokens, from those around; no labels but the text itself.

    The loss is the mean cross-entropy over all scored tokens; its exponential over a whole data set is
    the perplexity: how many tokens the model hesitates between. A causal model's output at a position
    is compared with the token after it; a masked model's with the one that stood there. Prompts of
    instruction data carry `IGNORED` labels and are not scored.

    Attributes:
        name: ``"causal_lm"`` or ``"masked_lm"``.
        classes: empty: the vocabulary belongs to the tokenizer.
        monitor: metric that picks the best epoch: ``"perplexity"``, ``"token_accuracy"`` or ``"loss"``.
        mode: that of the monitor: ``"max"`` for the accuracy, else ``"min"``.
    """

    name: str = "causal_lm"
    classes: tuple[str, ...] = ()
    monitor: str = "perplexity"
    mode: Literal["max", "min"] = "min"

    def __post_init__(self) -> None:
        """Take the mode that the monitor has."""
        settle_mode(self)

    def collate(self, samples: list[Any]) -> Batch:
        """Return samples of equal length stacked; texts are padded by the collator of their data."""
        return torch.utils.data.default_collate(samples)

    def _targets(self, batch: Batch) -> Tensor:
        """Return int64[N, tokens]: what the output at each position is compared with."""
        labels = class_labels(batch)
        if self.name == "masked_lm":
            return labels
        # Labels move, not logits: a shifted copy of [N, tokens, vocabulary] would double the memory.
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def size(self, batch: Batch) -> int:
        """Return the number of scored tokens, over which the loss is a mean."""
        return _scored(self._targets(batch))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, float[N, tokens, vocabulary]."""
        return run_model(model, batch)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the scored tokens; 0 where none is."""
        return _token_loss(output, self._targets(batch))

    def check(self, output: Tensor, batch: Batch) -> None:
        """Compare outputs and labels.

        Raises:
            DataError: the output is not [N, tokens, vocabulary], labels are no tokens, or none of the
                first batch is scored.
        """
        labels = split_batch(batch)[2]
        width = output.shape[-1] if output.ndim == 3 else 0
        found = _wrong_tokens(output, labels, width, "tokens of the vocabulary")
        if not found and not _scored(self._targets(batch)):
            found.append("no token of the first batch is scored; expected some labels other than -100")
        raise_found(found)

    def metrics(self) -> MetricCollection:
        """Return the means over tokens of the negative log-likelihood and of being right."""
        from torchmetrics import MeanMetric, MetricCollection

        # float64: a corpus has more tokens than float32 can count one by one
        means: dict[str, Metric | MetricCollection] = {
            name: MeanMetric().set_dtype(torch.float64) for name in ("nll", "accuracy")
        }
        return MetricCollection(means, compute_groups=False)

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch."""
        targets = self._targets(batch)
        count = _scored(targets)
        if not count:
            return
        right = (output.argmax(dim=-1) == targets)[targets != IGNORED]
        metrics["nll"].update(_token_loss(output, targets).double(), count)
        metrics["accuracy"].update(right.double().mean(), count)

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return perplexity and accuracy of single tokens."""
        nll = float(metrics["nll"].compute())
        perplexity = math.exp(min(nll, 700.0))  # above it a float64 would be infinite
        return Scores({"perplexity": perplexity, "token_accuracy": float(metrics["accuracy"].compute())})

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return for each sample the most likely token at every position, and its probability."""
        probabilities, best = output.float().softmax(dim=-1).max(dim=-1)
        return [
            {"tokens": row, "probabilities": sure} for row, sure in zip(best.tolist(), probabilities.tolist())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data."""
        return dataclasses.asdict(self)


def _scored(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


def _token_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over scored tokens.

    Torch's own mean over no token is 0 / 0; a batch of prompts that were cut before their answers must
    not end a run.
    """
    total = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / max(_scored(targets), 1)


def _wrong_tokens(output: Tensor, labels: Any, width: int, what: str) -> list[str]:
    if output.ndim != 3 or output.shape[2] != width:
        return [
            f"the model's output has shape {tuple(output.shape)}; expected [N, tokens, "
            f"{width or 'vocabulary'}]. Open the model for this task"
        ]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != output.shape[:2]:
        return [f"labels are {kind_of(labels)}; expected integers [{output.shape[0]}, {output.shape[1]}]"]
    scored = labels[labels != IGNORED]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < width:
        return [
            f"labels go from {int(scored.min())} to {int(scored.max())}; expected 0 to {width - 1} ({what}), "
            f"or {IGNORED} for what is not scored"
        ]
    return []
