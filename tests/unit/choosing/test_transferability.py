"""Transferability scores against their definitions, scikit-learn and independent optimisation."""

import json

import numpy as np
import pytest

from layerwise.choosing import transferability as tr
from layerwise.choosing.depths import DepthScores, Transferability, score_depths
from layerwise.choosing.features import Features
from layerwise.errors import DataError


def task(seed=0, n=120, d=10, classes=3, apart=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = np.random.default_rng(7).normal(size=(classes, d)) * apart
    return centres[labels] + rng.normal(size=(n, d)), labels


def features_of(values, labels):
    """One group's features, as a pass over the data would have collected them."""
    n = len(values)
    return Features({"fc": values}, {"fc": 0}, labels, None, {}, {}, n, n, values.shape[1:], "values")


@pytest.mark.parametrize(("n", "d"), [(60, 8), (20, 40)])
def test_logme_maximises_the_evidence_of_the_gaussian_model(n, d):
    # y ~ N(0, I/beta + FF'/alpha): its log density, maximised numerically by scipy, is the same number
    optimize = pytest.importorskip("scipy.optimize")
    stats = pytest.importorskip("scipy.stats")
    features, labels = task(n=n, d=d, apart=0.5)
    expected = []
    for k in range(3):
        target = (labels == k).astype(float)

        def loss(logs, target=target):
            alpha, beta = np.exp(logs)
            covariance = np.eye(n) / beta + features @ features.T / alpha
            return -stats.multivariate_normal(np.zeros(n), covariance).logpdf(target)

        found = optimize.minimize(
            loss, [2.0, 2.0], method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-7}
        )
        expected.append(-found.fun / n)
    assert tr.logme(features, labels) == pytest.approx(np.mean(expected), abs=2e-4)


def test_label_permutation_lowers_every_score():
    # labels that have nothing to do with the features score lower on all five
    features, labels = task()
    permuted = np.random.default_rng(0).permutation(labels)
    scores = [tr.logme, tr.h_score, tr.knn_accuracy, tr.probe_accuracy]
    for score in scores:
        assert score(features, labels) > score(features, permuted) + 0.05, score.__name__
    clusters = tr.soft_clusters(features)
    assert tr.leep(clusters, labels) > tr.leep(clusters, permuted) + 0.05


def test_leep_equals_its_definition_in_loops():
    # equations 1-3 of the paper written out with loops
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(4), size=30), rng.integers(0, 3, 30)
    joint = np.zeros((3, 4))
    for i in range(30):
        for z in range(4):
            joint[labels[i], z] += theta[i, z] / 30
    total = 0.0
    for i in range(30):
        total += np.log(sum(joint[labels[i], z] / joint[:, z].sum() * theta[i, z] for z in range(4)))
    assert tr.leep(theta, labels) == pytest.approx(total / 30)


def test_leep_at_its_two_ends():
    # a source class for each label gives 0; uninformative probabilities give the entropy of the labels
    labels = np.array([0, 1, 2, 2])
    assert tr.leep(np.eye(3)[labels], labels) == pytest.approx(0)
    assert tr.leep(np.full((4, 2), 0.5), labels) == pytest.approx(-1.5 * np.log(2))


def test_leep_refuses_logits():
    # values that are no probabilities
    with pytest.raises(DataError, match="softmax"):
        tr.leep(np.array([[2.0, -1.0], [0.5, 0.5]]), [0, 1])


def test_h_score_equals_its_definition():
    # tr(S^-1 B) with scikit-learn's shrunk covariance and the class means put in the place of each sample
    from sklearn.covariance import LedoitWolf

    features, labels = task(n=50, d=80)
    estimator = LedoitWolf().fit(features)
    centred = features - features.mean(0)
    means = np.stack([centred[labels == k].mean(0) for k in labels])
    between = means.T @ means / 50
    expected = np.trace(np.linalg.inv(estimator.covariance_) @ between) * (1 - estimator.shrinkage_)
    assert tr.h_score(features, labels) == pytest.approx(expected, rel=1e-6)
    assert 0 < expected < 2


def test_knn_equals_scikit_learn_leave_one_out():
    # sklearn's classifier with LeaveOneOut on standardised features; one neighbour has no ties
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = task(apart=0.5)
    scaled = (features - features.mean(0)) / features.std(0)
    reference = cross_val_score(KNeighborsClassifier(1), scaled, labels, cv=LeaveOneOut()).mean()
    assert tr.knn_accuracy(features, labels, neighbours=1) == pytest.approx(reference)
    assert 0.4 < reference < 0.95


def test_knn_tie_goes_to_the_nearest():
    # on a line: 0 has the neighbours 1 (class 0) and 2.5 (class 1), a tie that the nearer one wins
    assert tr.knn_accuracy([[0.0], [1.0], [2.5], [3.0]], [0, 0, 1, 1], neighbours=2) == 1.0


def test_probe_equals_scikit_learn_cross_validation():
    # the accuracy that sklearn reports for the same pipeline on the same folds
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = task(apart=0.4)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=300, tol=1e-3))
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    reference = cross_val_score(pipeline, features, labels, cv=folds).mean()
    assert tr.probe_accuracy(features, labels, strength=0.5, seed=3) == pytest.approx(reference)
    assert 0.4 < reference < 0.95


def test_labels_of_any_integers_are_renumbered():
    # 7 and 30 are two classes; the score is that of 0 and 1
    features, labels = task(classes=2)
    assert tr.logme(features, np.array([7, 30])[labels]) == tr.logme(features, labels)
    assert tr.as_labels([30, 7, 30], 3).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1] * 6, "all 6 samples have the label 1"),
        ([0, 1, 0], r"shape \(3,\).*6 samples"),
        ([0.5, 1.5, 0, 1, 2, 3], "class labels"),
        (list("aabbcc"), "labels are <U1 values such as a"),
    ],
)
def test_bad_labels_are_named(labels, message):
    # one class, a wrong count and regression targets
    with pytest.raises(DataError, match=message):
        tr.logme(np.random.default_rng(0).normal(size=(6, 2)), labels)


def test_probe_needs_two_samples_of_each_class():
    # fewer samples than twice the classes cannot be held out
    with pytest.raises(DataError, match="3 of 3 classes have a single sample"):
        tr.probe_accuracy(np.eye(3), [0, 1, 2])


def test_constant_features_score_nothing():
    # features without any information give chance and no error
    labels = np.arange(20) % 2
    constant = np.ones((20, 3))
    assert tr.h_score(constant, labels) == 0
    assert tr.probe_accuracy(constant, labels) == pytest.approx(0.5)
    assert np.isfinite(tr.logme(constant, labels))


def test_clusters_of_features_of_few_values_are_found_in_silence():
    # a dead ReLU, samples that are there several times: all that are equal belong to the same clusters
    for distinct in (1, 3):
        values = np.eye(4)[np.arange(30) % distinct]
        clusters = tr.soft_clusters(values)
        np.testing.assert_allclose(clusters.sum(1), 1)
        np.testing.assert_allclose(clusters, clusters[np.arange(30) % distinct])


@pytest.mark.parametrize("unit", [1e-6, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("shape", [(9, 26), (40, 10)])
def test_logme_does_not_depend_on_the_unit_of_the_features(shape, unit):
    # weights of large features are small, not 0; nor is the noise where features explain all there is
    features, labels = np.random.default_rng(0).normal(size=shape), np.arange(shape[0]) % 2
    assert tr.logme(features * unit, labels) == pytest.approx(tr.logme(features, labels), abs=5e-3)


def test_logme_of_dead_features_is_that_of_no_weights():
    # all features 0: finite, and what features too small to explain anything come to as well
    labels = np.arange(90) % 3
    dead = tr.logme(np.zeros((90, 4)), labels)
    assert dead == pytest.approx(-(np.log(2 * np.pi / 3) + 1) / 2)
    features, labels = task()
    assert tr.logme(features, labels) > tr.logme(np.zeros_like(features), labels)


def test_a_class_of_one_sample_leaves_the_others_their_probe():
    # a draw of 512 from a hundred classes has such: they are missed, and the probe is asked about the rest
    values, labels = task(n=60, apart=3.0)
    whole = features_of(values, labels)
    odd = features_of(np.vstack([values, values[:2]]), np.concatenate([labels, [7, 9]]))
    (before,), (after,) = score_depths(whole).depths, score_depths(odd).depths
    assert before.probe > 0.8
    assert after.probe == pytest.approx(before.probe * 60 / 62)
    assert after.lead == 0


def test_many_classes_of_two_samples_are_probed_in_silence():
    # scikit-learn asks whether such labels are numbers to regress; a warning is an error here
    features, labels = task(n=60, classes=30, apart=3.0)
    assert tr.probe_accuracy(features, labels) > 0.3


def test_without_two_classes_of_two_samples_there_is_no_probe():
    # nothing can be held out of single samples; neighbours are asked all the same
    (scores,) = score_depths(features_of(np.eye(4), np.array([0, 0, 1, 2]))).depths
    assert np.isnan(scores.probe)
    assert scores.lead is None
    assert np.isfinite(scores.knn)


def test_scores_that_are_not_finite_are_none_in_json():
    # whatever field it is, JSON can hold it
    row = DepthScores("a", 0, float("nan"), float("-inf"), 1.0, 0.5, float("nan"), None)
    data = Transferability((row,), 9, 3, 0.4, float("inf")).to_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["depths"][0] == {
        "group": "a", "depth": 0, "logme": None, "leep": None, "h_score": 1.0, "knn": 0.5,
        "probe": None, "lead": None,
    }  # fmt: skip
    assert data["head_leep"] is None


def reference_knn(points, labels, neighbours=5):
    """Leave-one-out votes counted one by one."""
    right = 0
    for i, (own,) in enumerate(points):
        order = sorted((j for j in range(len(points)) if j != i), key=lambda j: abs(points[j][0] - own))
        near = [labels[j] for j in order[:neighbours]]
        most = max(near.count(c) for c in near)
        right += next(c for c in near if near.count(c) == most) == labels[i]
    return right / len(points)


def test_the_best_depth_is_told_by_neighbours_where_there_is_no_probe() -> None:
    """As the advice takes them then: the depth nearest to the output is not the best for want of a figure."""
    missing = float("nan")
    rows = (DepthScores("a", 1, 0, 0, 0, 0.9, missing), DepthScores("b", 0, 0, 0, 0, 0.5, missing))
    assert Transferability(rows, 9, 3, 0.4, None).best.group == "a"


def test_knn_equals_votes_counted_one_by_one():
    # many ties: five classes at random on a line, any number of neighbours
    rng = np.random.default_rng(0)
    for neighbours in (2, 3, 4, 5, 7):
        points, labels = rng.normal(size=(60, 1)).tolist(), rng.integers(0, 4, 60).tolist()
        assert tr.knn_accuracy(points, labels, neighbours=neighbours) == pytest.approx(
            reference_knn(points, labels, neighbours)
        )


def test_a_score_that_rounds_to_zero_has_no_sign():
    # "-0.000" would read as below zero
    assert "-0.000" not in DepthScores("a", 0, -1e-5, -1e-5, 0.0, 0.5, 0.5, None).cells()
