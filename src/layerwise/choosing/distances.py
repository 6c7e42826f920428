"""Distances between two sets of feature vectors, as pure functions of arrays: no model, no files.

Each takes arrays of shape ``(samples, dimensions)``, or the moments of such arrays. `bootstrap` gives
any of them an interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from layerwise.errors import DataError, MissingExtraError

Array = npt.NDArray[np.float64]
"""What the functions here compute with and return."""


@dataclass(frozen=True)
class Estimate:
    """A figure with an interval.

    Attributes:
        value: the estimate, with its sampling bias removed.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def nothing(self) -> bool:
        """Whether the interval contains zero, so that no difference has been shown."""
        return self.low <= 0.0 <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def as_features(values: npt.ArrayLike, what: str = "features") -> Array:
    """Return `values` as a float64 array of shape (samples, dimensions).

    Args:
        values: anything numpy reads; float16 and bfloat16 tensors must be made float32 before.
        what: what the values are, for the message.

    Raises:
        DataError: not two dimensions, no sample, no dimension, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(
            f"{what} have the shape {array.shape}; expected (samples, dimensions) with at least one of each."
        )
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        raise DataError(
            f"{what} hold NaN or infinite values in {bad} of {len(array)} samples. "
            "Look at those inputs, or run the model in float32."
        )
    return array


def _pair(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Array, Array]:
    first, second = as_features(x), as_features(y)
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"the two feature sets have {first.shape[1]} and {second.shape[1]} dimensions; a distance needs "
            "the same features on both sides. Collect both with the same model and the same layer group."
        )
    return first, second


def frechet(
    mean_a: npt.ArrayLike, cov_a: npt.ArrayLike, mean_b: npt.ArrayLike, cov_b: npt.ArrayLike
) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians.

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2))`` for the covariances A and B. It is 0
    for equal moments, grows with the square of the unit of the features, and has no upper limit. From few
    samples in many dimensions it is too large: compare in a few leading directions, or use `bootstrap`.

    Args:
        mean_a: shape (d,).
        cov_a: shape (d, d), or (d,) for a diagonal covariance given by its variances.
        mean_b: shape (d,).
        cov_b: like `cov_a`; both diagonal is computed per dimension, in O(d).

    Raises:
        DataError: the shapes do not belong together.

    >>> frechet([0.0], [[1.0]], [3.0], [[4.0]])   # 3^2 + (2 - 1)^2
    10.0

    Source: Dowson and Landau 1982; as a distance of features, Heusel et al. 2017 (FID).
    """
    mu_a, mu_b = np.asarray(mean_a, dtype=np.float64), np.asarray(mean_b, dtype=np.float64)
    a, b = np.asarray(cov_a, dtype=np.float64), np.asarray(cov_b, dtype=np.float64)
    d = len(mu_a)
    if (
        mu_a.shape != (d,)
        or mu_b.shape != (d,)
        or a.shape not in ((d,), (d, d))
        or b.shape not in ((d,), (d, d))
    ):
        raise DataError(
            f"means of shape {mu_a.shape} and {mu_b.shape} with covariances of shape {a.shape} and {b.shape} "
            "do not belong together; expected (d,) with (d, d), or (d,) for a diagonal."
        )
    shift = float(((mu_a - mu_b) ** 2).sum())
    if a.ndim == b.ndim == 1:
        spread = (np.sqrt(np.maximum(a, 0)) - np.sqrt(np.maximum(b, 0))) ** 2
        return shift + float(spread.sum())
    a, b = (np.diag(c) if c.ndim == 1 else c for c in (a, b))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
    return max(0.0, shift + float(np.trace(a) + np.trace(b) - 2 * cross))


def kl_per_channel(
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    ref_mean: npt.ArrayLike,
    ref_var: npt.ArrayLike,
    *,
    eps: float = 1e-5,
) -> Array:
    """Return KL(target || reference) of one-dimensional Gaussians, for each channel, in nats.

    ``1/2 (log(s / t) + (t + (m - r)^2) / s - 1)`` with the target's mean m and variance t and the
    reference's mean r and variance s; 0 where they are equal. It punishes a reference that is narrower than
    the target much more than a wider one, so dead channels can dominate: prefer the Fréchet distance for a
    single figure.

    Args:
        mean: of the target, shape (channels,).
        var: of the target.
        ref_mean: of the reference, a batch-norm's running mean.
        ref_var: of the reference, its running variance.
        eps: added to both variances, as batch-norm does; default that of torch.

    >>> kl_per_channel([0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], eps=0).tolist()
    [0.0, 0.5]
    """
    m, r = np.asarray(mean, dtype=np.float64), np.asarray(ref_mean, dtype=np.float64)
    t, s = np.asarray(var, dtype=np.float64) + eps, np.asarray(ref_var, dtype=np.float64) + eps
    result: Array = 0.5 * (np.log(s / t) + (t + (m - r) ** 2) / s - 1)
    return result


def squared_distances(x: Array, y: Array) -> Array:
    """Return all squared Euclidean distances, shape ``(len(x), len(y))``."""
    raw = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    result: Array = np.maximum(raw, 0)
    return result


def median_gamma(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return ``gamma = 1 / median`` of the squared distances between all different pooled samples.

    The median heuristic for ``exp(-gamma |a - b|^2)``; 1 when all samples are equal.
    """
    pooled = np.concatenate(_pair(x, y))
    upper = squared_distances(pooled, pooled)[np.triu_indices(len(pooled), 1)]
    median = float(np.median(upper)) if len(upper) else 0.0
    return 1.0 / median if median > 0 else 1.0


def mmd(x: npt.ArrayLike, y: npt.ArrayLike, *, gamma: float | None = None) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy with an RBF kernel.

    ``E k(x, x') + E k(y, y') - 2 E k(x, y)`` over pairs of different samples. Its expectation is 0 when both
    sets come from one distribution, so single values may be negative; at most 2.

    Args:
        x: shape (n, d), n at least 2.
        y: shape (m, d), m at least 2.
        gamma: of the kernel ``exp(-gamma |a - b|^2)``; None for the median heuristic, see `median_gamma`.

    Raises:
        DataError: fewer than two samples on a side, or different dimensions.

    Source: Gretton et al. 2012, Lemma 6.
    """
    first, second = _pair(x, y)
    if min(len(first), len(second)) < 2:
        raise DataError(f"MMD needs two samples on each side, not {len(first)} and {len(second)}.")
    g = median_gamma(first, second) if gamma is None else gamma
    within = [np.exp(-g * squared_distances(z, z)) for z in (first, second)]
    cross = np.exp(-g * squared_distances(first, second))
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within]
    return float(sum(means) - 2 * cross.mean())


def mmd_estimate(
    x: npt.ArrayLike, y: npt.ArrayLike, *, draws: int = 200, level: float = 0.9, seed: int = 0
) -> Estimate:
    """Return `mmd` with a bootstrap interval, from one kernel matrix.

    A draw weighs samples instead of copying them; pairs of a sample with itself stay out, as in the estimate.

    Args:
        x: shape (n, d).
        y: shape (m, d).
        draws: bootstrap draws.
        level: of the interval.
        seed: of the draws; the result is a function of the arguments alone.
    """
    first, second = _pair(x, y)
    value = mmd(first, second)
    pooled = np.concatenate([first, second])
    kernel = np.exp(-median_gamma(first, second) * squared_distances(pooled, pooled))
    rng = np.random.default_rng(seed)
    n, m = len(first), len(second)
    a = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    b = rng.multinomial(m, np.full(m, 1 / m), size=draws).astype(np.float64)

    def within(w: Array, k: Array) -> Array:
        pairs = w.sum(1) ** 2 - (w**2).sum(1)
        total: Array = (((w @ k) * w).sum(1) - (w**2) @ np.diag(k)) / np.maximum(pairs, 1)
        return total

    cross = ((a @ kernel[:n, n:]) * b).sum(1) / (n * m)
    drawn = within(a, kernel[:n, :n]) + within(b, kernel[n:, n:]) - 2 * cross
    return interval(value, drawn, level=level, unbiased=True)


def proxy_a_distance(
    x: npt.ArrayLike, y: npt.ArrayLike, *, folds: int = 5, draws: int = 200, level: float = 0.9, seed: int = 0
) -> Estimate:
    """Return the proxy A-distance ``2 (1 - 2 error)`` of a linear classifier that tells `x` from `y`.

    0 where the two cannot be told apart, 2 where they always can. The error is balanced (the mean of both
    sides' errors), cross-validated with logistic regression (C = 0.1, both sides weighing the same) on
    standardised features, so it needs no equal sizes. It saturates at 2 for moderate shifts in many
    dimensions: it says *whether* there is a shift better than how large it is.

    Args:
        x: shape (n, d), n at least `folds`.
        y: shape (m, d), m at least `folds`.
        folds: of the cross-validation.
        draws: bootstrap draws over the held-out predictions.
        level: of the interval.
        seed: of folds and draws.

    Raises:
        DataError: fewer samples than folds on a side.
        MissingExtraError: scikit-learn is not installed.

    Source: Ben-David et al. 2007, section 4.
    """
    first, second = _pair(x, y)
    if min(len(first), len(second)) < folds:
        raise DataError(
            f"the proxy A-distance needs {folds} samples on each side for {folds} folds, "
            f"not {len(first)} and {len(second)}. Give more samples, or fewer folds."
        )
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "search", "the proxy A-distance") from error
    features = np.concatenate([first, second])
    side = np.repeat([0, 1], [len(first), len(second)])
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
    )
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    wrong = cross_val_predict(classifier, features, side, cv=split) != side
    wrong_x, wrong_y = wrong[side == 0].astype(np.float64), wrong[side == 1].astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = [
        rng.binomial(len(w), w.mean(), size=draws) / len(w) for w in (wrong_x, wrong_y)
    ]  # the bootstrap of a mean of zeros and ones is a binomial
    return interval(
        2 * (1 - (wrong_x.mean() + wrong_y.mean())),
        2 * (1 - (drawn[0] + drawn[1])),
        level=level,
        unbiased=True,
        ceiling=2.0,
    )


def linear_cka(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return the linear centred kernel alignment of two representations of the same rows, in [0, 1].

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms, columns centred. 1 for representations that are equal up
    to rotation, uniform scale and offset; 0 when one of them is constant. Rows are paired: the same samples
    seen by two networks, or the same channels seen on two sets of samples (give both arrays transposed),
    which is how `layerwise.shift` uses it. With few rows and many columns it is too large (1 for unrelated
    noise in the limit).

    Args:
        x: shape (rows, d).
        y: shape (rows, e).

    Raises:
        DataError: the numbers of rows differ.

    Source: Kornblith et al. 2019, equation 10.
    """
    first, second = as_features(x), as_features(y)
    if len(first) != len(second):
        raise DataError(f"CKA pairs rows, but there are {len(first)} and {len(second)} of them.")
    first, second = first - first.mean(0), second - second.mean(0)
    if first.shape[1] + second.shape[1] > 2 * len(first):  # the same figure from the smaller Gram matrices
        a, b = first @ first.T, second @ second.T
        cross, norms = float((a * b).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))
    else:
        cross = float(((second.T @ first) ** 2).sum())
        norms = float(np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second))
    return cross / norms if norms > 0 else 0.0


def interval(
    value: float,
    drawn: npt.ArrayLike,
    *,
    level: float = 0.9,
    unbiased: bool = False,
    floor: float = 0.0,
    ceiling: float = np.inf,
) -> Estimate:
    """Return an estimate with its interval from bootstrap draws.

    A squared distance computed from samples is too large by its sampling noise, and a bootstrap draw is too
    large by about the same amount once more. So that excess ``b = mean(drawn) - value`` is taken off the
    value once and off the draws twice; otherwise two equal distributions would never show a distance of 0.

    Args:
        value: the figure computed from the samples.
        drawn: the figure computed from each bootstrap draw.
        level: share of draws inside the interval, above 0 and below 1.
        unbiased: the figure itself has no such excess; only the draws are re-centred.
        floor: lowest possible value of the true figure: 0 for distances; ends and value are not allowed
            below. ``-np.inf`` for none.
        ceiling: highest possible value likewise.
    """
    draws = np.asarray(drawn, dtype=np.float64)
    excess = float(draws.mean()) - value
    value, draws = (value, draws - excess) if unbiased else (value - excess, draws - 2 * excess)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(*(float(end) for end in np.clip([value, low, high], floor, ceiling)))


def bootstrap(
    figure: Callable[..., float],
    *samples: npt.NDArray[Any],
    draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
    unbiased: bool = False,
    floor: float = 0.0,
    ceiling: float = np.inf,
) -> Estimate:
    """Return `figure` of `samples` with an interval, re-drawing the rows of each array on its own.

    Args:
        figure: takes the arrays in the order given, returns a number.
        samples: arrays whose first axis are independent samples.
        draws: number of bootstrap draws; each costs one call of `figure`.
        level: of the interval.
        seed: of the draws; the result is a function of the arguments alone.
        unbiased: see `interval`.
        floor: likewise.
        ceiling: likewise.

    >>> x = np.arange(100.0)[:, None]
    >>> bootstrap(lambda a, b: float((a.mean() - b.mean()) ** 2), x, x + 50).nothing
    False
    """
    rng = np.random.default_rng(seed)
    drawn = [
        figure(*(rows[rng.integers(len(rows), size=len(rows))] for rows in samples)) for _ in range(draws)
    ]
    return interval(figure(*samples), drawn, level=level, unbiased=unbiased, floor=floor, ceiling=ceiling)
