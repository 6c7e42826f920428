"""Plans in general: YAML there and back, and ratios that hold at every step."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import map_by_children, tiny_mlp
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.schedules import factor, join_factor
from layerwise.plans.settings import Norms, Schedule
from layerwise.plans.storage import parse, to_yaml
from layerwise.tuning.tuner import Tuner

GROUPS = ("b0", "b1", "b2", "head")

multipliers = st.floats(1e-6, 10, allow_nan=False)


@st.composite
def schedules(draw: st.DrawFn, shapes: Any = None) -> Schedule:
    warmup: dict[str, Any] = draw(
        st.one_of(
            st.just({}),
            st.builds(lambda frac: {"warmup_frac": frac}, st.floats(0, 1)),
            st.builds(lambda steps: {"warmup_steps": steps}, st.integers(0, 30)),
        )
    )
    shape = draw(
        st.sampled_from(
            shapes or ["constant", "linear", "cosine", "slanted_triangular", "one_cycle", "plateau"]
        )
    )
    settings: dict[str, Any] = {}
    if shape != "constant":
        settings["floor"] = draw(st.floats(0, 1))
    if shape in ("slanted_triangular", "one_cycle"):
        settings |= {"cut_frac": draw(st.floats(0, 1)), "ratio": draw(st.floats(1, 100))}
    return Schedule(shape=shape, span=draw(st.sampled_from(["phase", "run"])), **settings, **warmup)


@st.composite
def phases(draw: st.DrawFn, number: int) -> Phase:
    learning = draw(st.sets(st.sampled_from(GROUPS), min_size=1))
    length: dict[str, Any] = draw(
        st.one_of(
            st.builds(lambda n: {"epochs": n}, st.integers(1, 3)),
            st.builds(lambda n: {"steps": n}, st.integers(1, 9)),
        )
    )
    return Phase(
        name=f"{number} {draw(st.text(max_size=5))}",
        rates={name: draw(multipliers) for name in sorted(learning)},
        schedule=draw(schedules()),
        join_steps=draw(st.integers(0, 7)),
        norms=draw(
            st.one_of(
                st.builds(Norms, policy=st.sampled_from(["follow", "freeze"])),
                st.builds(Norms, policy=st.just("adapt"), rate=multipliers),
                st.builds(Norms, policy=st.just("freeze"), tune=st.just(True), rate=multipliers),
            )
        ),
        frozen_dropout=draw(st.booleans()),
        l2_sp=draw(st.floats(0, 10)),
        reinit=tuple(draw(st.lists(st.sampled_from(GROUPS), unique=True, max_size=2))),
        **length,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = [draw(phases(number)) for number in range(draw(st.integers(1, 4)))]
    return Plan(strategy=draw(st.text(max_size=20)), granularity="stages", groups=GROUPS, phases=tuple(rows))


@settings(deadline=None, max_examples=30)
@given(plans())
def test_yaml_there_and_back_is_the_identity(plan: Plan) -> None:
    """Any plan, written and read, is the same plan; so is its dict."""
    assert parse(to_yaml(plan), "here") == plan
    assert Plan(**plan.to_dict()) == plan


@settings(deadline=None)
@given(schedules(), st.integers(1, 60), st.integers(0, 80))
def test_factors_stay_in_range(schedule: Schedule, total: int, step: int) -> None:
    """A factor is in [0, 1] at every step of every schedule, beyond its end too."""
    assert 0 <= factor(schedule, step, total) <= 1 + 1e-9


@settings(deadline=None, max_examples=12)
@given(plans())
def test_ratios_hold_at_every_step(plan: Plan) -> None:
    """The ratio of any two groups is that of their multipliers, except while one warms up after joining."""
    model = tiny_mlp()
    plan = plan.with_changes(
        phases=tuple(phase.with_changes(reinit=(), norms=Norms(), l2_sp=0.0) for phase in plan.phases)
    )
    tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=4, layers=map_by_children(model))
    joined: dict[str, tuple[int, int]] = {}
    learning: set[str] = set(plan.phases[0].rates)
    phase = 0
    steps = 0
    for _ in tuner.epochs():
        for _ in range(4):
            if tuner.phase_index != phase:
                phase = tuner.phase_index
                row = plan.phases[phase]
                joined = {name: join for name, join in joined.items() if row.trains(name)}
                joined |= dict.fromkeys(set(row.rates) - learning, (steps, row.join_steps))
                learning = set(row.rates)
            row = plan.phases[phase]
            base: dict[str, float] = {}
            for name, rate in tuner.rates().items():
                assert (rate > 0) == (name in learning) or factor_is_zero(plan, rate)
                start, length = joined.get(name, (0, 0))
                if name in learning:
                    base[name] = rate / row.rates[name] / join_factor(steps - start, length)
            values = list(base.values())
            assert all(abs(value - values[0]) <= 1e-9 * max(values) for value in values)
            model(torch.ones(1, 6)).sum().backward()
            tuner.step()
            steps += 1
            if tuner.done:
                break
        tuner.end_epoch(0.5)
    assert tuner.step_count == steps == plan.total_steps(4)


def factor_is_zero(plan: Plan, rate: float) -> bool:
    """Return whether a rate of 0 is the schedule's own (a run-wide schedule can be past its end)."""
    return rate == 0 and any(phase.schedule.span == "run" for phase in plan.phases)
