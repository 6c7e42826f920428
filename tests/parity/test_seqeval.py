"""Entity scores against seqeval, where somebody has it (pip install seqeval; it is no dependency of ours)."""

import random
import warnings

import pytest

from layerwise.training.entities import EntityCounts, precision_recall_f1

metrics = pytest.importorskip("seqeval.metrics")
TAGS = ["O", "B-a", "I-a", "B-b", "I-b"]


def test_precision_recall_and_f1_equal_those_of_seqeval():
    # Over 2,000 random taggings, sequences that are no proper BIO included.
    draw = random.Random(0)
    for _ in range(2000):
        true = [[draw.choice(TAGS) for _ in range(draw.randint(1, 8))] for _ in range(draw.randint(1, 4))]
        guess = [[draw.choice(TAGS) for _ in sentence] for sentence in true]
        counts = EntityCounts(("a", "b"))
        counts.update(guess, true)
        ours = precision_recall_f1(*counts.compute().sum(dim=1).tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns where a figure is not defined
            theirs = (
                metrics.precision_score(true, guess),
                metrics.recall_score(true, guess),
                metrics.f1_score(true, guess),
            )
        assert ours == pytest.approx(theirs)
