"""The figures of one layer group's shift, with bootstrap draws: against running statistics, or a source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerwise.choosing import distances
from layerwise.choosing.distances import Array, Estimate, interval
from layerwise.choosing.signature import FLOOR, GroupSketch, project, spread
from layerwise.choosing.taps import Floats, NormInputs
from layerwise.errors import DataError

Drawn = tuple[float, Array]
"""A figure and its bootstrap draws."""


def shift_of_norms(
    norms: Sequence[NormInputs], *, draws: int, level: float, seed: int
) -> tuple[Drawn, dict[str, Estimate]]:
    """Return the main figure of a group and all figures by name, averaged over its norm layers.

    Args:
        norms: what the norm layers of the group received, at least one.
        draws: bootstrap draws.
        level: of the intervals.
        seed: of the draws; the same for every group, so that their draws belong together.

    Raises:
        DataError: what a norm layer received, or its running statistics, are not finite.
    """
    for entry in norms:
        _check_finite(entry)
    gaps: list[Array] = []
    divergences: list[Array] = []
    for entry in norms:
        parts = len(entry.sizes)
        drawn: Array = np.vstack([np.ones((1, parts)), _weights(parts, draws, seed)]) * entry.sizes
        weights = drawn / drawn.sum(1, keepdims=True)  # a chunk counts by its samples
        mean = weights @ entry.mean
        square = weights @ entry.square
        var = square if entry.instance else np.maximum(square - mean**2, 0)
        ref_mean, ref_var = entry.running_mean.astype(np.float64), entry.running_var.astype(np.float64)
        gaps.append(_gap(mean, var, ref_mean, ref_var, spread(ref_var)))
        divergences.append(_kl(mean, var, ref_mean, ref_var))
    gap, kl = np.mean(gaps, axis=0), np.mean(divergences, axis=0)
    main = float(gap[0]), gap[1:]
    return main, {
        "norms": interval(*main, level=level),
        "kl": interval(float(kl[0]), kl[1:], level=level),
    }


def shift_from_source(
    features: Floats,
    source: GroupSketch,
    source_samples: int,
    *,
    draws: int,
    level: float,
    seed: int,
    rng: np.random.Generator,
) -> tuple[Drawn, dict[str, Estimate | None]]:
    """Return the main figure of a group and all figures by name; None for those that want more samples.

    Args:
        features: of the target, float32[n, d].
        source: what is kept of the source.
        source_samples: number of samples it was taken over.
        draws: bootstrap draws.
        level: of the intervals.
        seed: of the draws of the target's samples.
        rng: of the draws of the source's moments where the target tells nothing of them.
    """
    values, n, m = features.astype(np.float64), len(features), source_samples
    ref_mean, ref_var = source.mean.astype(np.float64), source.var.astype(np.float64)
    weights = _weights(n, draws, seed)
    mean = np.vstack([values.mean(0), weights @ values])
    centre = mean[0]
    square = np.vstack([((values - centre) ** 2).mean(0), weights @ (values - centre) ** 2])
    var = np.maximum(square - (mean - centre) ** 2, 0) * n / max(n - 1, 1)
    steps, ratios = _source_noise(values - centre, var[0], m, draws, seed=seed + 2, rng=rng)
    ref_means = np.vstack([ref_mean, ref_mean + steps * np.sqrt(ref_var)])  # row 0 is the estimate
    ref_vars = np.vstack([ref_var, ref_var * ratios])
    gap = _gap(mean, var, ref_means, ref_vars, np.apply_along_axis(spread, 1, ref_vars))
    kl = _kl(mean, var, ref_means, ref_vars)
    drawn = np.sort(np.random.default_rng(seed + 1).permutation(n)[: max(len(source.sketch), 2)])
    ours, theirs = project(values[drawn], ref_mean, ref_var), source.sketch.astype(np.float64)
    enough = min(len(ours), len(theirs)) >= 10
    main = (float(gap[0]), gap[1:])
    return main, {
        "frechet": interval(*main, level=level),
        "kl": interval(float(kl[0]), kl[1:], level=level),
        "mmd": distances.mmd_estimate(theirs, ours, draws=draws, level=level, seed=seed),
        "proxy_a": distances.proxy_a_distance(theirs, ours, draws=draws, level=level, seed=seed)
        if enough
        else None,
        "cka": _cka(theirs, ours, draws, level, seed) if enough and ours.shape[1] > 2 else None,
    }


def _source_noise(
    centred: Array, var: Array, samples: int, draws: int, *, seed: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Return how moments of so many samples of the source fluctuate, its own samples being gone.

    The target's samples are drawn in their place, in units of their variance, so that features move together
    and rare values stay rare. A feature that is constant in the target is drawn as a Gaussian's would be.

    Returns:
        Steps of the mean in standard deviations, and ratios of variances; float64[draws, d] each.
    """
    weights = _weights(len(centred), draws, seed, drawn=samples)
    mean = weights @ centred
    found = np.maximum(weights @ centred**2 - mean**2, 0) * samples / max(samples - 1, 1)
    noise = rng.standard_normal((2, draws, len(var)))
    varies = var > 0
    unit = np.where(varies, var, 1.0)
    steps = np.where(varies, mean / np.sqrt(unit), noise[0] / np.sqrt(samples))
    ratios = np.where(varies, found / unit, np.maximum(1 + noise[1] / np.sqrt(2 * samples), 0) ** 2)
    return steps, ratios


def mean_figure(figures: Sequence[Drawn], *, level: float) -> Estimate:
    """Return the mean of several groups' figures; their draws belong together, row by row."""
    value = float(np.mean([value for value, _ in figures]))
    return interval(value, np.mean([drawn for _, drawn in figures], axis=0), level=level)


def _check_finite(entry: NormInputs) -> None:
    parts = (entry.mean, entry.square, entry.running_mean, entry.running_var)
    received, kept = (all(np.isfinite(part).all() for part in pair) for pair in (parts[:2], parts[2:]))
    if not kept:
        raise DataError(
            f"the running statistics of a norm in group {entry.group!r} hold NaN or infinite values, so they "
            "describe no source. Look at the checkpoint."
        )
    if not received:
        raise DataError(
            f"what a norm in group {entry.group!r} receives holds NaN or infinite values. Look at those "
            "inputs, or run the model in float32."
        )


def _weights(samples: int, draws: int, seed: int, *, drawn: int | None = None) -> Array:
    """Return bootstrap weights, float64[draws, samples], rows summing to 1; the same for every group.

    Each row draws as many samples as there are, or `drawn`.
    """
    count = drawn or samples
    picked = np.random.default_rng(seed).multinomial(count, np.full(samples, 1 / samples), size=draws)
    return picked / count


def _gap(mean: Array, var: Array, ref_mean: Array, ref_var: Array, unit: Array) -> Array:
    """Return the Fréchet distance of diagonal Gaussians per channel in units of `unit`, averaged."""
    spread_gap = (np.sqrt(np.maximum(var, 0)) - np.sqrt(np.maximum(ref_var, 0))) ** 2
    result: Array = (((mean - ref_mean) ** 2 + spread_gap) / unit).mean(-1)
    return result


def _kl(mean: Array, var: Array, ref_mean: Array, ref_var: Array) -> Array:
    # as for the Fréchet figure: dead channels count little
    floor = max(FLOOR * float(np.mean(ref_var)), 1e-12)
    result: Array = distances.kl_per_channel(mean, var, ref_mean, ref_var, eps=floor).mean(-1)
    return result


def _cka(theirs: Array, ours: Array, draws: int, level: float, seed: int) -> Estimate:
    """Return linear CKA of the two arrangements of features: rows are the features, columns the samples."""
    return distances.bootstrap(
        lambda a, b: distances.linear_cka(a.T, b.T),
        theirs,
        ours,
        draws=min(draws, 100),
        level=level,
        seed=seed,
        ceiling=1.0,
    )
