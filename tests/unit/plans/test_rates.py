"""The rate formula and its published table."""

from __future__ import annotations

import pytest

from helpers import named_map
from layerwise.errors import PlanError
from layerwise.plans.rates import decayed, rate, rate_table

TABLE = {  # decay -> rates of layers 12, 9, 6, 3, 1 for L = 12 and eta = 3e-5, times 1e-5
    0.95: (3.00, 2.57, 2.21, 1.89, 1.71),
    0.9: (3.00, 2.19, 1.59, 1.16, 0.94),
    0.8: (3.00, 1.54, 0.79, 0.40, 0.26),
    0.7: (3.00, 1.03, 0.35, 0.12, 0.06),
}


def test_the_table_for_twelve_layers() -> None:
    """eta * alpha ** (L - l) to two digits, as it is published."""
    found = rate_table(12, 3e-5, list(TABLE))
    for alpha, expected in TABLE.items():
        assert tuple(round(found[alpha][layer] * 1e5, 2) for layer in (12, 9, 6, 3, 1)) == expected


def test_the_head_is_group_l() -> None:
    """On a classifier with embeddings, 12 layers and a head the last layer stands one step below the head."""
    layers = named_map("embeddings", *(f"layer.{i}" for i in range(12)), "classifier")
    rates = decayed(layers.names, 0.9)
    assert rates["classifier"] == 1.0
    assert rates["layer.11"] == 0.9
    assert rates["embeddings"] == pytest.approx(rates["layer.0"] * 0.9)
    for name in layers.names:
        assert rates[name] == rate(1.0, 0.9, layers.depth_of(name))


@pytest.mark.parametrize("alpha", [0, -0.5, float("nan"), float("inf"), "0.9"])
def test_a_decay_out_of_range_is_refused(alpha: float) -> None:
    """The received value and the usual range stand in the message."""
    with pytest.raises(PlanError, match=r"usually between 0\.7"):
        decayed(["a", "b"], alpha)


def test_a_divisor_in_place_of_a_decay_is_told() -> None:
    """ULMFiT's 2.6 would train the input 2.6 times faster a group; rising rates are given by name."""
    with pytest.raises(PlanError, match=r"decay is 2\.6.*at most 1.*1 / 2\.6.*`rates`"):
        decayed(["a", "b"], 2.6)
    assert decayed(["a", "b"], 1) == {"a": 1, "b": 1}
