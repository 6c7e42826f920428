"""Schedules: exact values at their boundaries."""

from __future__ import annotations

import math
from typing import Any

import pytest

from layerwise.errors import PlanError
from layerwise.plans.schedules import factor, join_factor
from layerwise.plans.settings import Schedule

T = 100


def at(step: int, **settings: Any) -> float:
    return factor(Schedule(**settings), step, T)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({}, {0: 1, 99: 1, 100: 1}),
        ({"shape": "linear"}, {0: 1, 50: 0.5, 99: 0.01, 100: 0}),
        ({"shape": "linear", "floor": 0.2}, {0: 1, 50: 0.6, 100: 0.2}),
        ({"shape": "cosine"}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0}),
        ({"shape": "cosine", "floor": 0.1}, {0: 1, 50: 0.55, 100: 0.1}),
        (
            {"shape": "slanted_triangular"},
            {0: 1 / 32, 5: (1 + 15.5) / 32, 10: 1, 55: (1 + 15.5) / 32, 100: 1 / 32},
        ),
        ({"shape": "slanted_triangular", "floor": 0.2}, {0: 0.2, 10: 1, 100: 0.2}),
        (
            {"shape": "one_cycle", "cut_frac": 0.3, "ratio": 25},
            {0: 1 / 25, 15: (1 + 1 / 25) / 2, 30: 1, 65: 0.5, 100: 0},
        ),
        ({"shape": "linear", "warmup_steps": 20}, {0: 1 / 21, 19: 20 / 21, 20: 1, 60: 0.5, 100: 0}),
        ({"shape": "cosine", "warmup_frac": 0.2}, {0: 1 / 21, 20: 1, 60: 0.5, 100: 0}),
        ({"warmup_steps": 1000}, {0: 1 / 101, 99: 100 / 101, 100: 1}),
    ],
)
def test_boundary_values(settings: dict[str, Any], values: dict[int, float]) -> None:
    """Each shape has the value its formula gives at the start, the peak, half-way and the end."""
    assert {step: at(step, **settings) for step in values} == pytest.approx(values)


def test_slanted_triangle_is_the_papers_formula() -> None:
    """Equation 3 of ULMFiT, written out, at every step where T * cut_frac is whole."""
    cut_frac, ratio = 0.1, 32
    cut = math.floor(T * cut_frac)
    for t in range(T):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        assert at(t, shape="slanted_triangular") == pytest.approx((1 + p * (ratio - 1)) / ratio)


def test_plateau_falls_with_each_stall_down_to_its_floor() -> None:
    """factor ** stalls, held at the floor."""
    schedule = Schedule(shape="plateau", factor=0.5, floor=0.2)
    assert [factor(schedule, 3, T, stalls=n) for n in range(4)] == [1.0, 0.5, 0.25, 0.2]


def test_every_factor_is_in_range_and_no_step_is_wasted() -> None:
    """0 < f <= 1 at every step of every shape, in spans of any length, one step included."""
    for shape in ("constant", "linear", "cosine", "slanted_triangular", "one_cycle", "plateau"):
        for total in (1, 2, 3, 7, 50):
            for warmup in (0, 1, 5):
                for cut in (0.0, 0.1, 1.0) if shape in ("slanted_triangular", "one_cycle") else (0.1,):
                    schedule = Schedule(shape=shape, warmup_steps=warmup, cut_frac=cut)  # type: ignore[arg-type]
                    values = [factor(schedule, step, total) for step in range(total)]
                    assert all(0 < value <= 1 + 1e-12 for value in values), (schedule, total, values)


def test_the_end_value_holds_for_ever() -> None:
    """Steps after the span keep its last value."""
    assert at(100, shape="linear", floor=0.3) == at(10_000, shape="linear", floor=0.3) == pytest.approx(0.3)


def test_impossible_steps_are_refused() -> None:
    """A negative step and an empty span are errors."""
    with pytest.raises(PlanError, match="step -1 of 5"):
        factor(Schedule(), -1, 5)
    with pytest.raises(PlanError, match="step 0 of 0"):
        factor(Schedule(), 0, 0)


def test_joining_warm_up_has_no_zero_and_ends() -> None:
    """A warm-up of no steps is none; one of n reaches 1 after n steps."""
    assert join_factor(0, 0) == 1.0
    assert [join_factor(step, 2) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
