"""Every distance against a closed form, scikit-learn, scipy or a public implementation."""

import numpy as np
import pytest
import torch

from layerwise.choosing import distances
from layerwise.choosing.distances import Estimate
from layerwise.errors import DataError


def gaussians(seed, n=200, d=6, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mixing * scale + shift


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def test_frechet_equals_torchmetrics_fid():
    # torchmetrics' own formula (eigenvalues of the product) gives the same figure on real covariances
    from torchmetrics.image.fid import _compute_fid

    a, b = moments(gaussians(0)), moments(gaussians(1, shift=0.7, scale=1.6))
    reference = _compute_fid(*(torch.from_numpy(m) for m in (*a, *b)))
    assert distances.frechet(*a, *b) == pytest.approx(reference.item(), rel=1e-9)
    assert reference.item() > 1


def test_frechet_equals_scipy_square_root():
    # the matrix square root taken by scipy gives the same figure
    linalg = pytest.importorskip("scipy.linalg")
    (ma, a), (mb, b) = moments(gaussians(2)), moments(gaussians(3, scale=0.5))
    reference = ((ma - mb) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert distances.frechet(ma, a, mb, b) == pytest.approx(reference, rel=1e-8)


def test_diagonal_frechet_equals_the_full_one():
    # variances alone are the diagonal matrix, in every mixture of the two forms
    mean, var = np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 0.0])
    other, spread = np.array([0.0, 2.5, 3.0]), np.array([9.0, 1.0, 2.0])
    full = distances.frechet(mean, np.diag(var), other, np.diag(spread))
    assert distances.frechet(mean, var, other, spread) == pytest.approx(full)
    assert distances.frechet(mean, var, other, np.diag(spread)) == pytest.approx(full)
    assert full == pytest.approx(1 + 0.25 + (1 - 3) ** 2 + (2 - 1) ** 2 + 2)


def test_frechet_refuses_shapes_that_do_not_belong_together():
    # a covariance of another size is an error that names both shapes
    with pytest.raises(DataError, match=r"\(3, 3\)"):
        distances.frechet(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))


def test_kl_equals_torch_distributions():
    # torch's closed form for normal distributions is the reference
    from torch.distributions import Normal, kl_divergence

    rng = np.random.default_rng(0)
    m, r, t, s = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.1, 3, 5), rng.uniform(0.1, 3, 5)
    m_, r_, t_, s_ = map(torch.from_numpy, (m, r, t, s))
    reference = kl_divergence(Normal(m_, t_.sqrt()), Normal(r_, s_.sqrt()))
    np.testing.assert_allclose(distances.kl_per_channel(m, t, r, s, eps=0), reference.numpy(), rtol=1e-12)


def test_mmd_equals_the_sum_over_scikit_learn_kernels():
    # Lemma 6 of Gretton et al. written out over sklearn's kernel matrices
    from sklearn.metrics.pairwise import rbf_kernel

    x, y = gaussians(0, n=40), gaussians(1, n=30, shift=0.5)
    xx, yy, xy = rbf_kernel(x, gamma=0.1), rbf_kernel(y, gamma=0.1), rbf_kernel(x, y, gamma=0.1)
    pairs = [
        sum(k[i, j] for i in range(len(k)) for j in range(len(k)) if i != j) / (len(k) * (len(k) - 1))
        for k in (xx, yy)
    ]
    assert distances.mmd(x, y, gamma=0.1) == pytest.approx(sum(pairs) - 2 * xy.mean(), rel=1e-10)


def test_mmd_approaches_the_closed_form_of_gaussians():
    # for N(0,1) and N(m,1) with k = exp(-g|a-b|^2): 2 (1+4g)^(-1/2) (1 - exp(-g m^2 / (1+4g)))
    rng = np.random.default_rng(0)
    g, m = 0.25, 1.5
    exact = 2 * (1 + 4 * g) ** -0.5 * (1 - np.exp(-g * m**2 / (1 + 4 * g)))
    values = [
        distances.mmd(rng.normal(size=(200, 1)), rng.normal(m, 1, size=(200, 1)), gamma=g) for _ in range(40)
    ]
    assert np.mean(values) == pytest.approx(exact, abs=3 * np.std(values) / np.sqrt(40))
    assert exact > 0.3


def test_mmd_is_unbiased():
    # over many draws from one distribution the mean is 0 within its standard error, values on both sides
    values = [distances.mmd(gaussians(s, n=20), gaussians(s + 1000, n=25), gamma=0.1) for s in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_median_gamma_is_the_reciprocal_of_the_median():
    # distances 1, 4 and 9 between three points on a line
    assert distances.median_gamma([[0.0], [1.0]], [[3.0]]) == pytest.approx(1 / 4)
    assert distances.median_gamma([[2.0]], [[2.0]]) == 1.0


def test_proxy_a_distance_equals_a_hand_written_cross_validation():
    # the same folds and classifier written out with scikit-learn give the same balanced error
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    x, y = gaussians(0, n=60), gaussians(1, n=90, shift=0.8)
    features, side = np.concatenate([x, y]), np.array([0] * 60 + [1] * 90)
    wrong = np.zeros(150)
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(features, side):
        scaler = StandardScaler().fit(features[train])
        model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
        model.fit(scaler.transform(features[train]), side[train])
        wrong[test] = model.predict(scaler.transform(features[test])) != side[test]
    error = (wrong[:60].mean() + wrong[60:].mean()) / 2
    assert distances.proxy_a_distance(x, y).value == pytest.approx(2 * (1 - 2 * error))
    assert error < 0.45


def test_proxy_a_distance_at_its_two_ends():
    # for one distribution a 90 % interval nearly always contains 0; disjoint ones are at 2
    same = [distances.proxy_a_distance(gaussians(2 * s, n=60), gaussians(2 * s + 1, n=60)) for s in range(10)]
    apart = distances.proxy_a_distance(gaussians(0), gaussians(1, shift=50))
    assert sum(estimate.nothing for estimate in same) >= 7
    assert np.mean([estimate.value for estimate in same]) < 0.3
    assert apart.value == pytest.approx(2)
    assert not apart.nothing


def test_linear_cka_equals_hsic_of_gram_matrices():
    # Kornblith's definition by centred Gram matrices, for both code paths (tall and wide)
    rng = np.random.default_rng(0)
    for rows, d, e in [(50, 4, 7), (8, 30, 20)]:
        x = rng.normal(size=(rows, d))
        y = x[:, :1] @ rng.normal(size=(1, e)) + rng.normal(size=(rows, e))
        centre = np.eye(rows) - 1 / rows
        k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        reference = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
        assert distances.linear_cka(x, y) == pytest.approx(reference, rel=1e-10)
        assert reference < 0.99


def test_linear_cka_ignores_rotation_scale_and_offset():
    # 1 under an orthogonal map, below 1 under another linear map, 0 for a constant
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)) * [1, 2, 3, 4, 5]
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert distances.linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert distances.linear_cka(x, x @ np.diag([100, 1, 1, 1, 1])) < 0.9
    assert distances.linear_cka(x, np.ones((40, 2))) == 0


def test_linear_cka_refuses_unpaired_rows():
    # different numbers of rows are not a pairing
    with pytest.raises(DataError, match="40 and 41"):
        distances.linear_cka(np.ones((40, 2)), np.ones((41, 2)))


def gaussian_frechet(x, y):
    return distances.frechet(*moments(x), *moments(y))


def test_bootstrap_interval_covers_the_true_distance():
    # a 90 % interval of the Fréchet distance holds the true one in 75-100 % of repetitions
    mixing = np.random.default_rng(99).normal(size=(6, 6))
    for shift in (0.0, 1.0):
        hits, raw_misses = 0, 0
        for seed in range(40):
            x, y = gaussians(seed, n=100), gaussians(seed + 500, n=100, shift=shift)
            estimate = distances.bootstrap(gaussian_frechet, x, y, draws=100, seed=seed)
            hits += estimate.low <= 6 * shift**2 <= estimate.high
            raw_misses += gaussian_frechet(x, y) > 6 * shift**2
        assert hits >= 30
        assert raw_misses >= 25  # without the correction the figure is nearly always too large
    assert np.linalg.matrix_rank(mixing) == 6


def test_mmd_estimate_on_equal_and_on_different_data():
    # zero stays in the interval for one distribution and for one array twice, and leaves it under a shift
    x = gaussians(0)
    assert distances.mmd_estimate(x, gaussians(1)).nothing
    assert distances.mmd_estimate(x, x).nothing
    moved = distances.mmd_estimate(x, gaussians(1, shift=2.0))
    assert not moved.nothing
    assert moved.value == pytest.approx(distances.mmd(x, gaussians(1, shift=2.0)))


def test_bootstrap_of_identical_arrays_contains_zero():
    # one array twice: the estimate is clamped at 0, never negative
    x = gaussians(0)
    estimate = distances.bootstrap(gaussian_frechet, x, x)
    assert estimate.nothing
    assert estimate.value == 0


def test_bootstrap_is_a_function_of_its_seed():
    # equal seeds agree, other seeds differ, and numpy's global state is not touched
    x, y = gaussians(0), gaussians(1, shift=1.0)
    before = np.random.get_state()[1].copy()
    one, same, other = (distances.bootstrap(gaussian_frechet, x, y, seed=s) for s in (1, 1, 2))
    assert one == same != other
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_interval_takes_the_excess_off_once_and_twice():
    # value 3 whose draws are centred at 5: excess 2, so the estimate is 1 and its interval is around 1
    estimate = distances.interval(3.0, [4.0, 5.0, 6.0], level=0.999)
    assert estimate == Estimate(1.0, pytest.approx(0, abs=1e-2), pytest.approx(2, abs=1e-2))


def test_interval_stays_within_what_the_figure_can_be():
    # re-centred draws leave the range of a figure that is near its end; the interval does not
    draws = [1.0, 2.0, 2.0, 2.0, 2.0]
    assert distances.interval(1.9, draws, unbiased=True).high > 2
    assert distances.interval(1.9, draws, unbiased=True, ceiling=2.0).high == 2
    near = distances.proxy_a_distance(gaussians(0, n=60), gaussians(1, n=60, shift=1.5), draws=20)
    assert 1.5 < near.value < near.high <= 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((0, 3)), r"shape \(0, 3\)"),
        (np.array([[1.0, np.nan], [1.0, 2.0]]), "1 of 2 samples"),
    ],
)
def test_bad_features_are_named(bad, message):
    # one-dimensional, empty and NaN features are errors with the shape or the count
    with pytest.raises(DataError, match=message):
        distances.mmd(bad, np.ones((4, 3)))


def test_different_dimensions_are_refused():
    # features of two different groups cannot be compared
    with pytest.raises(DataError, match="3 and 4 dimensions"):
        distances.mmd(np.ones((5, 3)), np.ones((5, 4)))


def test_too_few_samples_are_refused():
    # one sample has no pair, three cannot fill five folds
    with pytest.raises(DataError, match="two samples"):
        distances.mmd(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(DataError, match="5 samples on each side"):
        distances.proxy_a_distance(np.ones((3, 3)), np.ones((50, 3)))
