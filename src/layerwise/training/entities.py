"""Entities in tagged tokens: spans of BIO tags, and their precision, recall and F1.

Written here because the usual package for it, seqeval, has had no release since 2020 and brings
scikit-learn; the counts agree with its default mode, and so with the CoNLL script ``conlleval``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from layerwise.errors import DataError, did_you_mean

Span = tuple[str, int, int]
"""Type of an entity, its first token, and the token after its last."""


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the entities of one sequence of BIO tags, first to last.

    An entity begins at ``B-X``, or at an ``I-X`` that does not continue an entity of type X (a model
    may well name such sequences; the CoNLL script counts them the same way), and ends before the first
    tag that is not ``I-X``.

    Args:
        tags: ``"O"``, ``"B-TYPE"`` or ``"I-TYPE"`` for each token.

    >>> spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5)]
    >>> spans(["I-PER", "I-LOC"])
    [('PER', 0, 1), ('LOC', 1, 2)]
    """
    found: list[Span] = []
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if kind and (prefix != "I" or tag_kind != kind):
            found.append((kind, start, index))
            kind = ""
        if prefix in ("B", "I") and not kind:
            kind, start = tag_kind, index
    return found


def entity_types(tags: Iterable[str]) -> tuple[str, ...]:
    """Return the types in a set of BIO tags, in their order; empty for plain tags (parts of speech).

    Plain tags are those of which none but ``"O"`` looks like BIO.

    >>> entity_types(["O", "B-PER", "I-PER", "B-LOC"])
    ('PER', 'LOC')
    >>> entity_types(["NOUN", "VERB"])
    ()

    Raises:
        DataError: some tags are BIO and others are not.
    """
    tags = list(tags)
    tagged = [tag for tag in tags if tag[:2] in ("B-", "I-") and len(tag) > 2]
    if not tagged:
        return ()
    strange = [tag for tag in tags if tag not in tagged and tag != "O"]
    if strange:
        raise DataError(
            f"tags {', '.join(map(repr, strange))} are not BIO, though {tagged[0]!r} is; expected 'O', "
            f"'B-TYPE' or 'I-TYPE'.{did_you_mean(strange[0], tagged)}"
        )
    return tuple(dict.fromkeys(tag[2:] for tag in tagged))


class EntityCounts(Metric):
    """Entities that were found, named and there, by type; adds up over batches and processes.

    Attributes:
        types: types of entities.
        correct: int64[types], entities whose type and both ends were named right.
        predicted: int64[types], entities that the model named.
        there: int64[types], true entities.
    """

    full_state_update = False
    correct: Tensor
    predicted: Tensor
    there: Tensor

    def __init__(self, types: Sequence[str]) -> None:
        super().__init__()
        self.types = tuple(types)
        for name in ("correct", "predicted", "there"):
            self.add_state(name, torch.zeros(len(self.types), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> None:
        """Count the entities of some sequences of tags, equally long in both."""
        for guess, truth in zip(predicted, true, strict=True):
            guessed, actual = set(spans(guess)), set(spans(truth))
            for state, found in (
                (self.correct, guessed & actual),
                (self.predicted, guessed),
                (self.there, actual),
            ):
                for kind, count in Counter(span[0] for span in found).items():
                    state[self.types.index(kind)] += count

    def compute(self) -> Tensor:
        """Return int64[3, types]: correct, predicted, there."""
        return torch.stack([self.correct, self.predicted, self.there])


def precision_recall_f1(correct: float, predicted: float, there: float) -> tuple[float, float, float]:
    """Return precision, recall and F1 from counts; each is 0 where it is not defined.

    >>> precision_recall_f1(1, 2, 4)
    (0.5, 0.25, 0.3333333333333333)
    >>> precision_recall_f1(0, 0, 3)
    (0.0, 0.0, 0.0)
    """
    total = predicted + there
    return (
        correct / predicted if predicted else 0.0,
        correct / there if there else 0.0,
        2 * correct / total if total else 0.0,
    )
