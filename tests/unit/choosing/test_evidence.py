"""Evidence that is measured before anything is decided: what class weights do to a probe."""

import numpy as np
import pytest

from layerwise.choosing.evidence import Weighting, try_weights


def overlapping(distance):
    """270 samples around 0 and 30 around `distance`, standard deviation 1."""
    rng = np.random.default_rng(0)
    y = np.array([0] * 270 + [1] * 30)
    return (rng.normal(size=300) + distance * y)[:, None], y


def test_weights_trade_accuracy_where_a_rare_class_can_be_told():
    # the best cut moves to the middle: the rare class gains more recall than the common one loses
    found = try_weights(*overlapping(2.0))
    assert found.balanced_gain > 0.1
    assert found.wins
    assert found.accuracy_gain < -found.accuracy_error
    assert not found.pays


def test_weights_only_cost_where_nothing_tells_the_classes():
    # every sample was named common, nine of ten rightly; with weights half of them are not
    found = try_weights(*overlapping(0.0))
    assert found.accuracy_gain < -0.2
    assert abs(found.balanced_gain) < 0.15
    assert not found.pays


def test_names_of_classes_do_not_matter():
    # text labels, and two samples of the rarest class: two folds
    x, y = overlapping(2.0)
    keep = np.flatnonzero(y == 0)[:20].tolist() + np.flatnonzero(y == 1)[:2].tolist()
    named = np.array(["good", "bad"])[y]
    assert try_weights(x[keep], named[keep]) == try_weights(x[keep], y[keep])


@pytest.mark.parametrize(
    ("balanced", "accuracy", "pays"),
    [(0.05, 0.0, True), (0.05, -0.01, True), (0.05, -0.02, False), (0.03, 0.0, False), (0.0, 0.0, False)],
)
def test_weights_pay(balanced, accuracy, pays):
    # two standard errors of balanced accuracy must be won, and no more than one of accuracy lost
    assert Weighting(balanced, accuracy, balanced_error=0.02, accuracy_error=0.015).pays == pays


def test_errors_are_those_of_the_same_samples_asked_twice():
    # 10 of 20 rare samples are won: a standard deviation of 0.5 and its error; no other sample changes
    change = np.array([1.0] * 10 + [0.0] * 10)
    found = Weighting.of(
        np.zeros(120), np.concatenate([change, np.zeros(100)]), np.array([1] * 20 + [0] * 100)
    )
    assert found.balanced_gain == pytest.approx(0.25)
    assert found.accuracy_gain == pytest.approx(10 / 120)
    assert found.balanced_error == pytest.approx(change.std(ddof=1) / 20**0.5 / 2)
