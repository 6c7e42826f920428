"""Which plan ``--strategy auto`` takes after its search."""

from types import SimpleNamespace

import pytest

from layerwise.choosing.auto import pick
from layerwise.choosing.search_result import CurvePoint


def point(choice, mean):
    return CurvePoint(choice, None, choice, 1e-3, 0.9, mean, 0.0, 1)


def picked(advised, best, *, val_samples, metric="accuracy", strategy="full"):
    advice = SimpleNamespace(strategy="full", plan="advised plan", lr=0.001)
    curve = tuple(point(*entry) for entry in (("full", advised), (strategy, best)) if entry[1] is not None)
    found = SimpleNamespace(
        curve=curve, best=point(strategy, best), plan="found plan", lr=0.01, metric=metric
    )
    return pick(advice, found, val_samples=val_samples)[:2]


@pytest.mark.parametrize(("val_samples", "plan"), [(20, "advised plan"), (2000, "found plan")])
def test_a_gain_counts_where_the_validation_data_can_show_it(val_samples, plan):
    # five points more are luck on 20 samples and none on 2,000
    assert picked(0.80, 0.85, val_samples=val_samples, strategy="last 2")[0] == plan


def test_the_best_of_many_trials_needs_two_standard_errors():
    # 20 points on 20 samples are 1.6 standard errors: such a winner lost 6 points of test accuracy
    assert picked(0.7, 0.9, val_samples=20, strategy="last 2")[0] == "advised plan"
    assert picked(0.7, 0.9, val_samples=40, strategy="last 2")[0] == "found plan"


def test_agreement_and_a_missing_trial_keep_the_advice():
    # the winner is the advised strategy; the budget ended before the advised plan was tried
    assert picked(0.9, 0.9, val_samples=100) == ("advised plan", 0.001)
    assert picked(None, 0.9, val_samples=10_000, strategy="last 2") == ("advised plan", 0.001)


def test_a_loss_is_taken_at_its_word():
    # standard errors of accuracies say nothing about a loss
    found = picked(0.9, 0.3, val_samples=10, metric="val_loss", strategy="last 2")
    assert found == ("found plan", 0.01)
