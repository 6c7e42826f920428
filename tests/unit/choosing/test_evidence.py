"""Evidence that is measured before anything is decided: what class weights do to a probe."""

import numpy as np

from layerwise.choosing.evidence import Weighting, try_weights


def overlapping(distance):
    """270 samples around 0 and 30 around `distance`, standard deviation 1."""
    rng = np.random.default_rng(0)
    y = np.array([0] * 270 + [1] * 30)
    return (rng.normal(size=300) + distance * y)[:, None], y


def test_weights_help_where_a_rare_class_can_be_told():
    # the best cut moves to the middle: the rare class gains more recall than the common one loses
    found = try_weights(*overlapping(2.0))
    assert found.balanced_gain > 0.1
    assert found.accuracy_gain < 0
    assert found.pays


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


def test_even_trade_pays():
    # nothing won and nothing lost: the weights stay
    assert Weighting(0.0, 0.0).pays
    assert not Weighting(0.01, -0.02).pays
