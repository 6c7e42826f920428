"""The one rate formula: group l of L learns at ``eta * alpha ** (L - l)``.

The head is group L, so its exponent is 0 and it learns at η; the exponent of any other group is the number
of groups between it and the head, which is `LayerMap.depth_of`. ULMFiT's division by 2.6 is
``alpha = 1 / 2.6``. Published tables that do not count the head as a group differ by one step: print the
rates (`Plan.explain`) before comparing.

Source: Howard and Ruder 2018 (ULMFiT), section 3.2; Clark et al. 2020 (ELECTRA), appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from layerwise.errors import PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase
from layerwise.plans.settings import Norms, affine_learns


def rate(eta: float, alpha: float, depth: int) -> float:
    """Return ``eta * alpha ** depth``, the learning rate of a group `depth` groups before the output end.

    Args:
        eta: the base rate η, that of the head; at least 0.
        alpha: the decay α from one group to the one before it; above 0, at most 1.
        depth: ``L - l``; 0 is the head.

    >>> f"{rate(3e-5, 0.9, 3):.3g}"
    '2.19e-05'
    """
    return float(eta * alpha**depth)


def decayed(names: Sequence[str], alpha: float | None) -> dict[str, float]:
    """Return the multiplier ``alpha ** (L - l)`` of each of the groups `names`, given input -> output.

    Without a decay (None) it is 1 for all.

    Raises:
        PlanError: `alpha` is not a number above 0 and at most 1.

    >>> decayed(["stem", "block", "head"], 0.5)
    {'stem': 0.25, 'block': 0.5, 'head': 1.0}
    """
    if alpha is None:
        return dict.fromkeys(names, 1.0)
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
    """Raise `PlanError` unless `alpha` is a number above 0 and at most 1."""
    if isinstance(alpha, int | float) and 0 < alpha <= 1:
        return
    told = (
        f"decay is {alpha!r}; expected a number above 0 and at most 1, usually between 0.7 (aggressive) and "
        "0.99 (gentle). To freeze groups, use `frozen=` or a strategy that freezes"
    )
    if isinstance(alpha, int | float) and 1 < alpha < math.inf:
        told += (
            f". To divide the rate by {alpha!r} from group to group, the decay is 1 / {alpha!r}; rates that "
            "rise towards the input are given by name (`rates` of discriminative)"
        )
    raise PlanError(told)


def multipliers(
    phase: Phase, layers: LayerMap, resting: Collection[str] = (), held: Collection[str] = ()
) -> dict[str, float]:
    """Return each parameter's multiplier in a phase: its override (by any of its names), or its group's.

    0 in `resting` groups, which are not drawn (LISA), and where no plan trains the parameter: see `trained`.
    """
    own = {layers.aliases.get(name, name): value for name, value in phase.overrides.items()}
    return {
        name: 0.0 if group.name in resting or name in held else own.get(name, phase.rate(group.name))
        for group in layers
        for name in group.parameters
    }


def frozen_groups(values: Mapping[str, float], layers: LayerMap) -> frozenset[str]:
    """Return the groups of which nothing learns, by the `multipliers` of their parameters."""
    return frozenset(group.name for group in layers if not any(values[name] for name in group.parameters))


def affine_rates(
    norms: Norms, layers: LayerMap, kinds: Mapping[str, str], frozen: Collection[str]
) -> Iterator[tuple[str, bool, bool, float | None]]:
    """Yield each affine parameter of a norm: its name, whether its group is frozen, and what it does.

    Args:
        norms: the policy of a phase.
        layers: the layer map.
        kinds: affine parameter -> kind of its norm.
        frozen: names of the groups that do not learn.

    Yields:
        (name, whether its group is frozen, whether it learns, its multiplier): see `affine_learns`.
    """
    first = first_late(norms, layers)
    for number, group in enumerate(layers):
        is_frozen, own = group.name in frozen, norms.of(group.name)
        for name in filter(kinds.__contains__, group.parameters):
            yield name, is_frozen, *affine_learns(own, kinds[name], is_frozen, number >= first)


def first_late(norms: Norms, layers: LayerMap) -> int:
    """Return the number of the group `Norms.until`, from which on norms adapt; 0 without one."""
    return 0 if norms.until is None else layers.names.index(layers[norms.until].name)


def trained(
    phase: Phase,
    layers: LayerMap,
    resting: Collection[str] = (),
    held: Collection[str] = (),
    *,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Return each parameter's multiplier in a phase, the norm policy carried out; 0 does not learn.

    Args:
        phase: of a plan that fits `layers`.
        layers: the layer map.
        resting: groups that are not drawn (LISA).
        held: parameters that no plan trains (`layerwise.tuning.matching.never_trained`).
        kinds: affine parameter of a norm -> kind of the norm; None takes those that the map knows. Others
            are left to their groups.
    """
    values = multipliers(phase, layers, resting, held)
    kinds = (layers.norms or {}) if kinds is None else kinds
    singled_out = {layers.aliases.get(name, name) for name in phase.overrides}
    frozen = frozen_groups(values, layers)
    for name, is_frozen, learns, own_rate in affine_rates(phase.norms, layers, kinds, frozen):
        if not learns or name in held:
            values[name] = 0.0
        elif own_rate is not None and (is_frozen or name not in singled_out):
            values[name] = own_rate
    return values


def run_problems(**numbers: Any) -> list[str]:
    """Return what is wrong with numbers of a run, by name; those that are None are left out.

    >>> run_problems(lr=-1.0, steps_per_epoch=10)
    ['lr is -1.0; expected a number above 0']
    """
    return [
        f"{name} is {value!r}; expected {_EXPECTED[name]}"
        for name, value in numbers.items()
        if value is not None and not _is_in_range(name, value)
    ]


def _is_in_range(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if name == "steps_per_epoch":
        return isinstance(value, int) and value >= 1
    return value >= 0 if name == "weight_decay" else value > 0


_EXPECTED = {
    "lr": "a number above 0",
    "weight_decay": "a number of at least 0, or None",
    "steps_per_epoch": "a whole number of at least 1, such as len(loader)",
}
