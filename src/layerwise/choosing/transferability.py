"""How well frozen features separate the classes of a task, without training the network.

All functions take features of shape ``(samples, dimensions)`` and integer labels. They are evidence, not a
verdict: on single tasks such scores can rank models the wrong way round (LEEP's weighted tau on Aircraft is
-0.264 in You et al. 2021), so `layerwise.advise` shows them beside figures of its own.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from layerwise.choosing.distances import Array, as_features, squared_distances
from layerwise.errors import DataError, MissingExtraError

Labels = npt.NDArray[np.int64]


def as_labels(labels: npt.ArrayLike, samples: int) -> Labels:
    """Return class labels renumbered 0, 1, ... in sorted order, shape (samples,).

    Raises:
        DataError: another number of labels than samples, labels that are no integers, or a single class.
    """
    given = np.asarray(labels)
    if given.shape != (samples,):
        raise DataError(f"labels have the shape {given.shape}; expected one for each of {samples} samples.")
    if given.dtype.kind not in "biuf" or (given != np.round(given)).any():
        raise DataError(
            f"labels are {given.dtype} values such as {given[0]}; transferability is defined for class "
            "labels (integers). A regression target has none."
        )
    classes, codes = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"all {samples} samples have the label {classes[0]}; at least two classes are needed to tell how "
            "well features separate them. Give data of every class."
        )
    return codes.astype(np.int64)


def _checked(features: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Array, Labels]:
    x = as_features(features)
    return x, as_labels(labels, len(x))


def logme(
    features: npt.ArrayLike, labels: npt.ArrayLike, *, rounds: int = 100, tolerance: float = 1e-6
) -> float:
    """Return LogME: the log evidence of a Bayesian linear model, per sample, averaged over the classes.

    For each class, the one-hot target y is modelled as ``N(w'f, 1 / beta)`` with prior
    ``w ~ N(0, 1 / alpha)``; alpha and beta maximise ``log p(y | F, alpha, beta)``. Larger is better; the
    value has no fixed range, so compare it between depths or models on one data set only. Features that are
    all 0 (a dead ReLU) have the evidence of ``w = 0``: y is noise of variance ``1 / beta``.

    Args:
        features: shape (n, d); not centred, as in the paper.
        labels: shape (n,), at least two classes.
        rounds: upper limit of fixed-point steps per class.
        tolerance: relative change of alpha / beta at which they end.

    Returns:
        The score; one singular value decomposition of the features is the cost.

    Raises:
        DataError: labels and features do not belong together, or there is one class only.

    Source: You et al. 2021 (LogME), Algorithm 1, in the singular-vector form of its journal version.
    """
    x, y = _checked(features, labels)
    n, d = x.shape
    if not x.any():
        power = np.bincount(y) / n  # mean square of each one-hot target, 1 / beta at its best
        return float(np.mean(-(np.log(2 * np.pi * power) + 1) / 2))
    left, singular, _ = np.linalg.svd(x, full_matrices=False)
    s2 = singular**2
    scores = []
    for k in range(int(y.max()) + 1):
        target = (y == k).astype(np.float64)
        projected = (left.T @ target) ** 2
        outside = max(float(target @ target - projected.sum()), 0.0)
        alpha = beta = 1.0
        for _ in range(rounds):
            ratio = alpha / beta
            gamma = float((s2 / (s2 + ratio)).sum())
            residual = float((projected * (ratio / (s2 + ratio)) ** 2).sum()) + outside
            weight = float((s2 * projected / (s2 + ratio) ** 2).sum())
            alpha = gamma / (weight + 1e-12 / s2[0])
            beta = max(n - gamma, 1e-12) / (residual + 1e-12)
            if abs(alpha / beta - ratio) <= tolerance * ratio:
                break
        # the evidence at the alpha and beta reached, with the posterior mean that belongs to them
        ratio = alpha / beta
        residual = float((projected * (ratio / (s2 + ratio)) ** 2).sum()) + outside
        weight = float((s2 * projected / (s2 + ratio) ** 2).sum())
        log_det = float(np.log(alpha + beta * s2).sum()) + (d - len(s2)) * np.log(alpha)
        evidence = (
            d * np.log(alpha)
            + n * np.log(beta)
            - log_det
            - beta * residual
            - alpha * weight
            - n * np.log(2 * np.pi)
        ) / 2
        scores.append(evidence / n)
    return float(np.mean(scores))


def leep(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return LEEP: the mean log likelihood of labels predicted through the source's own classes.

    With theta_i the source model's class probabilities of sample i, ``P(y | z)`` is read off the joint
    average of theta and the labels, and the score is ``mean_i log sum_z P(y_i | z) theta_i(z)``. At most 0,
    which is reached when each source class has one label.

    Args:
        probabilities: shape (n, source classes), rows that sum to 1: the softmax of the *original* head. For
            depths in the middle, or when the head was replaced, use `soft_clusters` of the features (NLEEP).
        labels: shape (n,), at least two classes.

    Raises:
        DataError: negative probabilities or rows that do not sum to 1 (within 1e-3), besides what all
            functions here raise.

    Source: Nguyen et al. 2020 (LEEP).
    """
    theta, y = _checked(probabilities, labels)
    if (theta < 0).any() or not np.allclose(theta.sum(1), 1, atol=1e-3):
        raise DataError(
            "LEEP needs probabilities: no negative value, each row summing to 1. Apply softmax first."
        )
    onehot = np.eye(int(y.max()) + 1)[y]
    joint = onehot.T @ theta / len(theta)
    conditional = joint / np.maximum(joint.sum(0, keepdims=True), 1e-300)
    likelihood = (theta @ conditional.T)[np.arange(len(y)), y]
    return float(np.log(np.maximum(likelihood, 1e-300)).mean())


def soft_clusters(
    features: npt.ArrayLike, *, clusters: int = 10, dimensions: int = 16, seed: int = 0
) -> Array:
    """Return each sample's probabilities of belonging to the clusters of a Gaussian mixture.

    In place of a source classifier in `leep`, this gives a score at any depth (NLEEP). Features are first
    reduced to their leading principal components. Covariances are diagonal, with 0.001 of the variance of
    all reduced features added to each variance.

    Args:
        features: shape (n, d).
        clusters: at most a fifth of the samples are used as the number of components.
        dimensions: principal components kept at most.
        seed: of the mixture's start.

    Raises:
        MissingExtraError: scikit-learn is not installed.

    Source: Li et al. 2021 (Ranking neural checkpoints).
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "search", "the transferability scores") from error
    x = as_features(features)
    kept = max(1, min(dimensions, x.shape[1], len(x) - 1))
    count = max(1, min(clusters, len(x) // 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are constant, or fewer of them differ than clusters
        reduced = PCA(kept, random_state=seed).fit_transform(x) if len(x) > 1 else x
        mixture = GaussianMixture(
            count,
            covariance_type="diag",
            reg_covar=1e-3 * float(reduced.var()) + 1e-9,
            random_state=seed,
            tol=1e-2,
        )
        result: Array = mixture.fit(reduced).predict_proba(reduced)
    return result


def h_score(features: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the shrinkage H-score ``tr(S^-1 B)``: spread between class means against the whole spread.

    S is the Ledoit-Wolf estimate of the features' covariance and B the covariance of the class means, each
    sample with its class mean, times ``1 - shrinkage``. 0 when all class means are equal; at most
    ``classes - 1``. The plain H-score explodes when there are more dimensions than samples; the shrinkage is
    what makes it usable there.

    Args:
        features: shape (n, d).
        labels: shape (n,), at least two classes.

    Raises:
        DataError: labels and features do not belong together, or there is one class only.
        MissingExtraError: scikit-learn is not installed.

    Source: Bao et al. 2019; with shrinkage, Ibrahim et al. 2021.
    """
    try:
        from sklearn.covariance import ledoit_wolf
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "search", "the H-score") from error
    x, y = _checked(features, labels)
    centred = x - x.mean(0)
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    counts = np.bincount(y)
    means = np.stack([centred[y == k].mean(0) for k in range(len(counts))])
    between = (means * counts[:, None] / len(x)).T @ means
    scale = float(np.trace(covariance)) / x.shape[1]
    if not scale > 0:
        return 0.0
    covariance = covariance + 1e-9 * scale * np.eye(x.shape[1])  # a constant dimension without shrinkage
    return float(np.trace(np.linalg.solve(covariance, (1 - shrinkage) * between)))


def knn_accuracy(features: npt.ArrayLike, labels: npt.ArrayLike, *, neighbours: int = 5) -> float:
    """Return the leave-one-out accuracy of a nearest-neighbour vote in standardised features.

    Nothing is fitted, so it is defined down to one sample a class (which then always misses). Ties go to the
    class of the nearest neighbour among those tied.

    Args:
        features: shape (n, d); each dimension is divided by its standard deviation.
        labels: shape (n,), at least two classes.
        neighbours: how many vote; at most n - 1 do.

    Raises:
        DataError: labels and features do not belong together, or there is one class only.
    """
    x, y = _checked(features, labels)
    spread = x.std(0)
    x = (x - x.mean(0)) / np.where(spread > 0, spread, 1)
    distance = squared_distances(x, x)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : min(neighbours, len(x) - 1)]
    votes = np.eye(int(y.max()) + 1)[y[nearest]]  # (n, neighbours, classes)
    first = votes * (votes.cumsum(1) == 1)  # the nearest of each class alone, else near ones would add up
    tie_break = first * np.linspace(1e-3, 0, nearest.shape[1], endpoint=False)[None, :, None]
    return float(((votes + tie_break).sum(1).argmax(1) == y).mean())


def probe_predictions(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    folds: int = 5,
    strength: float | None = None,
    class_weight: Literal["balanced"] | None = None,
    seed: int = 0,
) -> Labels:
    """Return the held-out predictions of a linear probe: cross-validated logistic regression.

    Features are standardised on each training part. Classes with fewer samples than folds lower the number
    of folds, to two at least.

    Args:
        features: shape (n, d).
        labels: shape (n,), at least two classes with at least two samples each.
        folds: of the stratified cross-validation.
        strength: inverse penalty C of the regression; None for ``1 / d ** 0.5``, weaker features in greater
            number being trusted less.
        class_weight: ``"balanced"`` lets all classes weigh the same.
        seed: of the folds.

    Returns:
        Predicted class codes (see `as_labels`), shape (n,).

    Raises:
        DataError: a class has one sample only, besides what all functions here raise.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "search", "the linear probe") from error
    x, y = _checked(features, labels)
    smallest = int(np.bincount(y).min())
    if smallest < 2:
        single = int((np.bincount(y) == 1).sum())
        raise DataError(
            f"{single} of {y.max() + 1} classes have a single sample; a held-out accuracy needs two of each. "
            "Give more samples, or leave those classes out."
        )
    strength = strength or x.shape[1] ** -0.5
    classifier = LogisticRegression(C=strength, max_iter=300, tol=1e-3, class_weight=class_weight)
    split = StratifiedKFold(max(2, min(folds, smallest)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of classes with hardly more than a sample each it asks if they are any
        warnings.filterwarnings("ignore", "The number of unique classes")
        predicted: Any = cross_val_predict(make_pipeline(StandardScaler(), classifier), x, y, cv=split)
    return np.asarray(predicted, dtype=np.int64)


def probe_accuracy(features: npt.ArrayLike, labels: npt.ArrayLike, **options: Any) -> float:
    """Return the held-out accuracy of a linear probe; see `probe_predictions` for options and errors."""
    return float(
        (probe_predictions(features, labels, **options) == as_labels(labels, len(np.asarray(labels)))).mean()
    )
