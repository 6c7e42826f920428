"""LayerwiseLR with a plain optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwise.errors import PlanError
from layerwise.plans.schedules import factor
from layerwise.plans.settings import Schedule
from layerwise.tuning.lr_scheduler import LayerwiseLR


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates(of: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in of.param_groups]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "slanted_triangular", "one_cycle"])
def test_every_step_has_the_schedules_factor(shape: str) -> None:
    """Each group's rate is its own times the factor at that step; the object is a torch scheduler."""
    sgd = optimizer(1.0, 0.1)
    schedule = Schedule(shape=shape, warmup_steps=2)  # type: ignore[arg-type]
    scheduler = LayerwiseLR(sgd, schedule, total_steps=10)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    for step in range(10):
        value = factor(schedule, step, 10)
        assert rates(sgd) == pytest.approx([value, 0.1 * value])
        assert scheduler.get_last_lr() == pytest.approx(rates(sgd))
        sgd.step()
        scheduler.step()


def test_a_group_added_later_keeps_the_ratio_from_its_first_step() -> None:
    """The joiner's own rate is its peak: scaled before it is ever used, and in step with the others after."""
    sgd = optimizer(1.0)
    scheduler = LayerwiseLR(sgd, "cosine", total_steps=8)
    used = []
    sgd.register_step_post_hook(lambda opt, *_: used.append(rates(opt)))
    for step in range(8):
        if step == 3:
            sgd.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.25})
        sgd.step()
        scheduler.step()
    assert all(late == pytest.approx(0.25 * first) for first, late in used[3:])
    assert used[3][0] == pytest.approx(factor(Schedule(shape="cosine"), 3, 8))


def test_a_joiner_may_warm_up() -> None:
    """With join_steps only the added group rises first."""
    sgd = optimizer(1.0)
    scheduler = LayerwiseLR(sgd, "constant", total_steps=8, join_steps=1)
    sgd.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    used = []
    for _ in range(3):
        sgd.step()
        used.append(rates(sgd))
        scheduler.step()
    assert used == [[1.0, 0.25], [1.0, 0.5], [1.0, 0.5]]


def test_a_second_schedule_on_an_optimiser_knows_nothing_of_the_first() -> None:
    """A group that joined under the first is now one of the first groups; a new joiner is scaled once."""
    sgd = optimizer(0.8)
    for joiner in (0.4, 0.2):
        scheduler = LayerwiseLR(sgd, "linear", total_steps=8, join_steps=2)
        for step in range(8):
            if step == 4:
                sgd.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": joiner})
            sgd.step()
            used = rates(sgd)
            scheduler.step()
            value = 1 - step / 8
            expected = [0.8 * value] if joiner == 0.4 else [0.8 * value, 0.4 * value]
            if step >= 4:
                expected.append(joiner * value * min(1, (step - 3) / 3))
            assert used == pytest.approx(expected)


def test_plateau_waits_for_the_metric() -> None:
    """The factor falls once validation has stalled for longer than the patience."""
    sgd = optimizer(1.0)
    scheduler = LayerwiseLR(sgd, Schedule(shape="plateau", patience_epochs=1, factor=0.5), total_steps=99)
    seen = []
    for metric in (0.5, 0.4, 0.3, 0.6, 0.5):
        sgd.step()
        scheduler.step()
        scheduler.end_epoch(metric)
        seen.append(rates(sgd)[0])
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5]


def test_state_goes_on_where_it_stood() -> None:
    """Saved in mid-run, with a late group, and loaded into a new pair, the rates go on equally."""
    sgd = optimizer(1.0)
    scheduler = LayerwiseLR(sgd, "linear", total_steps=6, join_steps=4)
    for step in range(3):
        if step == 1:
            sgd.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
        sgd.step()
        scheduler.step()
    again = optimizer(1.0, 0.5)
    resumed = LayerwiseLR(again, "linear", total_steps=6, join_steps=4)
    again.load_state_dict(sgd.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        assert rates(again) == rates(sgd)
        for one, other in ((sgd, scheduler), (again, resumed)):
            one.step()
            other.step()


def test_a_length_of_nothing_is_refused() -> None:
    """total_steps has to be a whole number above 0."""
    with pytest.raises(PlanError, match="total_steps is 0"):
        LayerwiseLR(optimizer(1.0), total_steps=0)


@pytest.mark.parametrize("join_steps", [-1, 2.5])
def test_a_warm_up_of_less_than_nothing_is_refused(join_steps: object) -> None:
    """join_steps has to be a whole number, or late groups would join without the warm-up."""
    with pytest.raises(PlanError, match=rf"join_steps is {join_steps}; expected a whole number"):
        LayerwiseLR(optimizer(1.0), total_steps=3, join_steps=join_steps)


@pytest.mark.parametrize("schedule", [None, {"shape": "linear"}])
def test_a_schedule_is_a_schedule_or_the_name_of_a_shape(schedule: object) -> None:
    """Anything else would fail at the first step."""
    with pytest.raises(PlanError, match=r"expected a layerwise\.Schedule or the name of a shape"):
        LayerwiseLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), schedule, total_steps=3)  # type: ignore[arg-type]


def test_shapes_other_than_plateau_pass_a_metric_over() -> None:
    """A loop may report validation whatever the schedule is."""
    sgd = optimizer(1.0)
    scheduler = LayerwiseLR(sgd, "cosine", total_steps=4)
    for _ in range(50):
        scheduler.end_epoch(0.5)
    assert rates(sgd) == [1.0]
    assert scheduler.state_dict()["stalls"] == 0
