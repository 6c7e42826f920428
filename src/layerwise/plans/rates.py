"""The one rate formula: group l of L learns at ``eta * alpha ** (L - l)``.

The head is group L, so its exponent is 0 and it learns at η; the exponent of any other group is the number
of groups between it and the head, which is `LayerMap.depth_of`. ULMFiT's division by 2.6 is
``alpha = 1 / 2.6``. Published tables that do not count the head as a group differ by one step: print the
rates (`Plan.explain`) before comparing.

Source: Howard and Ruder 2018 (ULMFiT), section 3.2; Clark et al. 2020 (ELECTRA), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerwise.errors import PlanError


def rate(eta: float, alpha: float, depth: int) -> float:
    """Return ``eta * alpha ** depth``, the learning rate of a group `depth` groups before the output end.

    Args:
        eta: the base rate η, that of the head; at least 0.
        alpha: the decay α from one group to the one before it; above 0.
        depth: ``L - l``; 0 is the head.

    >>> f"{rate(3e-5, 0.9, 3):.3g}"
    '2.19e-05'
    """
    return float(eta * alpha**depth)


def decayed(names: Sequence[str], alpha: float) -> dict[str, float]:
    """Return the multiplier ``alpha ** (L - l)`` of each of the groups `names`, given input -> output.

    Raises:
        PlanError: `alpha` is not a number above 0.

    >>> decayed(["stem", "block", "head"], 0.5)
    {'stem': 0.25, 'block': 0.5, 'head': 1.0}
    """
    check_decay(alpha)
    return {name: rate(1.0, alpha, len(names) - 1 - index) for index, name in enumerate(names)}


def rate_table(layers: int, eta: float, alphas: Sequence[float]) -> dict[float, dict[int, float]]:
    """Return for each α the rate of each layer l = L .. 1 of a network of `layers` layers.

    >>> [f"{rate:.2e}" for rate in rate_table(3, 3e-5, [0.9])[0.9].values()]
    ['3.00e-05', '2.70e-05', '2.43e-05']
    """
    return {
        alpha: {layer: rate(eta, alpha, layers - layer) for layer in range(layers, 0, -1)} for alpha in alphas
    }


def check_decay(alpha: float) -> None:
    """Raise `PlanError` unless `alpha` is a number above 0."""
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise PlanError(
            f"decay is {alpha!r}; expected a number above 0, usually between 0.7 (aggressive) and 0.99 "
            "(gentle). To freeze groups, use `frozen=` or a strategy that freezes"
        )
