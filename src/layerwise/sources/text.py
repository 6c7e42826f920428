"""Texts as token ids, ready for a model: `TextData` of map-style sets, and the collator that pads them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerwise.errors import DataError, ModelError, percent
from layerwise.sources.encoding import (
    IGNORED,
    Encoded,
    Encodings,
    encode_prompts,
    encode_texts,
    encode_words,
    pack_texts,
    padding_side,
)
from layerwise.sources.textlabels import TextTask
from layerwise.sources.texttable import TextPart, TextTable

if TYPE_CHECKING:
    from torch import Tensor

# What `open_model` is asked for: (task, problem).
MODEL_TASKS: dict[TextTask, tuple[str, str | None]] = {
    "text_classification": ("text_classification", "single_label_classification"),
    "multi_label": ("text_classification", "multi_label_classification"),
    "regression": ("text_classification", "regression"),
    "token_classification": ("token_classification", None),
    "causal_lm": ("causal_lm", None),
    "masked_lm": ("masked_lm", None),
}


class TextSet:
    """A map-style data set of token ids: ``set[i]`` is a mapping with ``input_ids`` ... ``labels``.

    Samples have their own lengths; `collate` makes a batch of them.

    Attributes:
        lengths: tokens of each sample.
        targets: class number of each sample where there is one (for weights by class), else None.
        classes: names in order.
        task: what the labels are.
        mask_frac: share of the tokens that are hidden, for ``"masked_lm"``, else 0.
        pad_to: every batch is padded to at least so many tokens; None pads each to its own longest sample.
        pads_samples: `layerwise.fit` pads each sample to a length of its own, the same in every epoch, and
            makes batches of one length. The prefix cache needs that, since padding shifts the last bits of
            a sum. False leaves all padding to `collate`.
    """

    def __init__(
        self,
        samples: Sequence[Encoded],
        *,
        task: TextTask,
        tokenizer: Any,
        classes: Sequence[str] = (),
        targets: Sequence[int] | None = None,
        mask_frac: float = 0.0,
        pad_to: int | None = None,
    ) -> None:
        self.samples = tuple(samples)
        self.task: TextTask = task
        self.tokenizer = tokenizer
        self.classes = tuple(classes)
        self.targets = None if targets is None else tuple(targets)
        self.mask_frac = mask_frac
        self.pad_to = pad_to
        self.pads_samples = True
        self.lengths = tuple(len(sample["input_ids"]) for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        """Return one sample; masks are drawn anew each time, from torch's global generator."""
        sample = dict(self.samples[index])
        if self.mask_frac:
            sample["input_ids"], sample["labels"] = self._masked(sample["input_ids"])
        return sample

    @property
    def deterministic(self) -> bool:
        """Whether an index gives the same sample each time."""
        return self.mask_frac == 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each class; empty where samples have no single class."""
        targets = self.targets or ()
        return {name: targets.count(number) for number, name in enumerate(self.classes)} if targets else {}

    def pad(self, sample: Encoded, length: int) -> Encoded:
        """Return a sample with what belongs to tokens filled up to `length` of them; it may be longer.

        ``input_ids`` are padded with the padding token, ``attention_mask`` with 0, labels of tokens with
        -100. The side is that of `layerwise.sources.encoding.padding_side`.
        """
        filling = {"input_ids": self.tokenizer.pad_token_id, "labels": IGNORED}
        filling["token_type_ids"] = getattr(self.tokenizer, "pad_token_type_id", 0)
        left = padding_side(self.tokenizer) == "left"
        padded = dict(sample)
        for name, value in sample.items():
            if name != "labels" or _per_token(self.task):
                assert isinstance(value, list)
                padding = [filling.get(name, 0)] * (length - len(value))
                padded[name] = [*padding, *value] if left else [*value, *padding]
        return padded

    def collate(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return samples as one batch: a mapping of tensors, padded to the longest of them or to `pad_to`."""
        import torch

        longest = max(self.pad_to or 0, *(len(sample["input_ids"]) for sample in samples))
        rows = [self.pad(sample, longest) for sample in samples]
        numbers = not _per_token(self.task) and self.task != "text_classification"
        kinds = {"labels": torch.float32} if numbers else {}
        return {
            name: torch.tensor([row[name] for row in rows], dtype=kinds.get(name, torch.long))
            for name in samples[0]
        }

    def subset(self, indices: Sequence[int]) -> TextSet:
        """Return the samples at `indices`, in that order, with all else the same."""
        other = copy.copy(self)
        other.samples = tuple(self.samples[index] for index in indices)
        other.lengths = tuple(self.lengths[index] for index in indices)
        other.targets = None if self.targets is None else tuple(self.targets[index] for index in indices)
        return other

    def fingerprint(self) -> str:
        """Return a short hash of what the set yields: all ids, labels and the share of masks."""
        digest = hashlib.sha256(f"{self.task} {self.mask_frac} {self.pad_to}\n".encode())
        for sample in self.samples:
            digest.update(json.dumps(sample, sort_keys=True).encode())
        return digest.hexdigest()[:32]

    def _masked(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return ids with some hidden, and labels that are the hidden ids and `IGNORED` elsewhere.

        Of the hidden ones 80 % become the mask token, 10 % a random token and 10 % stay, as in BERT.

        Source: Devlin et al. 2019, section 3.1 and appendix A.
        """
        import torch

        given = torch.tensor(ids)
        special = torch.tensor([id_ in self.tokenizer.all_special_ids for id_ in ids])
        hidden = (torch.rand(len(ids)) < self.mask_frac) & ~special
        labels = torch.where(hidden, given, IGNORED)
        kind = torch.rand(len(ids))
        random = torch.randint(len(self.tokenizer), (len(ids),))
        changed = torch.where(hidden & (kind < 0.8), self.tokenizer.mask_token_id, given)
        changed = torch.where(hidden & (kind >= 0.9), random, changed)
        return changed.tolist(), labels.tolist()


@dataclass(frozen=True)
class TextData:
    """The parts of a text data set, tokenized.

    Attributes:
        train: what is learned from.
        val: None where there is none.
        test: likewise.
        task: what the labels are.
        classes: names in order; empty for numbers and language models.
        max_length: limit of a sample in tokens.
        truncated: part -> how many of its texts were cut.
        skipped: (row, reason) of what was left out.
        notes: what was chosen and cut, for people.
    """

    train: TextSet
    val: TextSet | None
    test: TextSet | None
    task: TextTask
    classes: tuple[str, ...]
    max_length: int
    truncated: dict[str, int] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, TextSet]:
        """Return the parts that there are, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in named.items() if part is not None}


def encode(table: TextTable, tokenizer: Any, *, max_length: int, mask_frac: float = 0.15) -> TextData:
    """Return the texts of `table` as token ids.

    Texts longer than `max_length` are cut, counted in `TextData.truncated` and told in its notes.
    Language modelling without prompts cuts nothing: texts are joined and dealt out in blocks.

    Args:
        table: see `layerwise.sources.texttable.read_texts`.
        tokenizer: of the model (`OpenedModel.tokenizer`).
        max_length: in tokens, at least 2; `OpenedModel.max_length` is what the model can take. Attention
            costs grow with its square: choose the length that most texts have.
        mask_frac: share of tokens to hide, for ``"masked_lm"``.

    Raises:
        DataError: `max_length` is too small, a part has no rows, or no response has a token.
        ModelError: the tokenizer lacks a token that the task needs.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; expected at least 2 tokens.")
    if table.task == "masked_lm" and tokenizer.mask_token is None:
        raise ModelError(
            "the tokenizer has no mask token, so its model is not for masked language modelling."
        )
    if not 0 < mask_frac < 1:
        raise DataError(f"mask_frac is {mask_frac}; expected a share above 0 and below 1.")
    number = {name: index for index, name in enumerate(table.classes)}
    sets: dict[str, TextSet] = {}
    notes, truncated = list(table.notes), {}
    for name, part in table.parts.items():
        if not len(part):
            raise DataError(f"the {name} part has no rows. Leave it out, or give it some.")
        found = _encode_part(table, part, tokenizer, max_length, number)
        if not found.samples:
            raise DataError(f"the tokenizer makes no tokens of the responses of the {name} part.")
        truncated[name] = found.truncated
        if found.truncated:
            share = percent(found.truncated, len(part), digits=0)
            notes.append(
                f"{name}: {found.truncated} of {len(part)} texts ({share}%) cut to {max_length} tokens; "
                f"the longest has {found.longest}"
            )
        if found.empty:
            notes.append(f"{name}: {found.empty} of {len(part)} rows left out: no tokens in their responses")
        unknown, total = found.unknown
        if unknown > 0.05 * total:
            share = percent(unknown, total, digits=0)
            notes.append(f"{name}: {share}% of the tokens are unknown to the tokenizer")
        samples, targets = _with_labels(table, part, found, number)
        sets[name] = TextSet(
            samples,
            task=table.task,
            tokenizer=tokenizer,
            classes=table.classes,
            targets=targets,
            mask_frac=mask_frac if table.task == "masked_lm" else 0.0,
        )
    return TextData(
        train=sets["train"],
        val=sets.get("val"),
        test=sets.get("test"),
        task=table.task,
        classes=table.classes,
        max_length=max_length,
        truncated=truncated,
        skipped=table.skipped,
        notes=tuple(notes),
    )


def text_list(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    pairs: Sequence[str] | None = None,
) -> TextSet:
    """Return texts without labels, for prediction; cut to `max_length`.

    Raises:
        DataError: there are none, or texts are empty (all are named).
    """
    empty = [str(number) for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty or not texts:
        raise DataError(
            f"texts {', '.join(empty[:10])} are empty; remove them." if empty else "there are no texts."
        )
    found = encode_texts(tokenizer, texts, pairs, max_length=max_length)
    return TextSet(found.samples, task="text_classification", tokenizer=tokenizer)


def _encode_part(
    table: TextTable, part: TextPart, tokenizer: Any, max_length: int, number: dict[str, int]
) -> Encodings:
    if table.task == "token_classification":
        tags = [[number[tag] for tag in row] for row in part.targets or []]
        return encode_words(tokenizer, part.words or [], tags, max_length=max_length)
    if part.responses is not None:
        return encode_prompts(tokenizer, part.texts, part.responses, max_length=max_length)
    if table.task in ("causal_lm", "masked_lm"):
        masked = table.task == "masked_lm"
        return pack_texts(tokenizer, part.texts, block_size=max_length, masked=masked)
    return encode_texts(tokenizer, part.texts, part.pairs, max_length=max_length)


def _with_labels(
    table: TextTable, part: TextPart, found: Encodings, number: dict[str, int]
) -> tuple[tuple[Encoded, ...], list[int] | None]:
    """Return the samples with the labels of their rows, and class numbers where each has one."""
    rows = part.targets or []
    if table.task == "text_classification":
        targets = [number[name] for name in rows]
        labels: list[Any] = list(targets)
    elif table.task == "multi_label":
        targets = None
        labels = [[float(name in row) for name in table.classes] for row in rows]
    elif table.task == "regression":
        targets, labels = None, list(rows)
    else:
        return found.samples, None  # their labels belong to tokens
    samples = tuple({**sample, "labels": label} for sample, label in zip(found.samples, labels, strict=True))
    return samples, targets


def _per_token(task: TextTask) -> bool:
    return task in ("token_classification", "causal_lm", "masked_lm")
