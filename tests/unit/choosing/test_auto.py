"""Which plan ``--strategy auto`` takes after its search, and how it keeps to its budget."""

import dataclasses
from types import SimpleNamespace

import pytest
from torch.utils.data import TensorDataset

from layerwise.choosing import auto
from layerwise.choosing.auto import choose_plan, expected_s, pick, space_around
from layerwise.choosing.search_result import CurvePoint
from layerwise.errors import DataError
from layerwise.plans.parsing import parse_strategy
from layerwise.plans.settings import Norms

from .small import images, map_of, pretrained


def point(choice, mean):
    return CurvePoint(choice, None, choice, 1e-3, 0.9, mean, 0.0, 1)


def picked(advised, best, *, val_samples, metric="accuracy", mode="max", strategy="full"):
    advice = SimpleNamespace(strategy="full", plan="advised plan", lr=0.001)
    curve = tuple(point(*entry) for entry in (("full", advised), (strategy, best)) if entry[1] is not None)
    found = SimpleNamespace(
        curve=curve, best=point(strategy, best), plan="found plan", lr=0.01, metric=metric, mode=mode
    )
    return pick(advice, found, val_samples=val_samples)[:2]


@pytest.mark.parametrize(("val_samples", "plan"), [(20, "advised plan"), (2000, "found plan")])
def test_a_gain_counts_where_the_validation_data_can_show_it(val_samples, plan):
    # five points more are luck on 20 samples and none on 2,000
    assert picked(0.80, 0.85, val_samples=val_samples, strategy="last 2")[0] == plan


def test_the_best_of_many_trials_needs_two_standard_errors():
    # 20 points on 20 samples are 1.6 standard errors: such a winner lost 6 points of test accuracy
    assert picked(0.7, 0.9, val_samples=20, strategy="last 2")[0] == "advised plan"
    assert picked(0.7, 0.9, val_samples=40, strategy="last 2")[0] == "found plan"


def test_the_best_of_more_choices_has_to_win_by_more():
    # 25 points on 20 samples are 2.2 standard errors: enough for one rival, not for the best of four
    advice = SimpleNamespace(strategy="full", plan="advised plan", lr=0.001)

    def chosen(rivals):
        others = [point(f"last {k}", 0.95 if k == 1 else 0.6) for k in range(1, rivals + 1)]
        found = SimpleNamespace(
            curve=(point("full", 0.7), *others),
            best=others[0],
            plan="found plan",
            lr=0.01,
            metric="accuracy",
            mode="max",
        )
        return pick(advice, found, val_samples=20)

    assert chosen(1)[0] == "found plan"
    assert chosen(4)[0] == "advised plan"
    assert "within 2.5 standard errors" in chosen(4)[2]


def test_agreement_and_a_missing_trial_keep_the_advice():
    # the winner is the advised strategy; the budget ended before the advised plan was tried
    assert picked(0.9, 0.9, val_samples=100) == ("advised plan", 0.001)
    alone = SimpleNamespace(curve=(point("full", 0.9),), best=point("full", 0.9))
    advice = SimpleNamespace(strategy="full", plan="advised plan", lr=0.001)
    assert "no other plan" in pick(advice, alone, val_samples=100)[2]
    assert picked(None, 0.9, val_samples=10_000, strategy="last 2") == ("advised plan", 0.001)


@pytest.mark.parametrize("metric", ["val_loss", "rmse"])
def test_an_error_is_taken_at_its_word(metric):
    # standard errors of accuracies say nothing about a loss, and less of an error is a gain
    found = picked(0.9, 0.3, val_samples=10, metric=metric, mode="min", strategy="last 2")
    assert found == ("found plan", 0.01)


@dataclasses.dataclass(frozen=True)
class Job:
    strategy: str | None = None
    plan: str | None = None
    epochs: int | None = None
    seed: int = 0
    options: dict = dataclasses.field(default_factory=lambda: {"batch_size": 16})


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `choose_plan` needs of a prepared job; an epoch costs what `epoch_s` says."""

    opened: SimpleNamespace
    data: SimpleNamespace
    layers: object
    job: Job
    plan: object = None
    about: dict = dataclasses.field(default_factory=dict)
    epoch_s: float = 0.0

    def dry_run(self):
        costs = [SimpleNamespace(epoch_s=self.epoch_s) for _ in self.plan.phases]
        return SimpleNamespace(costs=costs, steps_per_epoch=6)


@pytest.fixture(scope="module")
def prepared():
    model = pretrained(widths=(4, 4, 6, 6))
    x, y = images(128, seed=5, size=12)
    data = SimpleNamespace(train=TensorDataset(x[:96], y[:96]), val=TensorDataset(x[96:], y[96:]), classes=())
    return Prepared(SimpleNamespace(model=model), data, map_of(model), Job())


def test_the_search_begins_with_the_advised_plan_and_all_is_kept(prepared):
    # first trial: the advised strategy at the advised rate; the run's record tells advice, search and choice
    said = []
    found = choose_plan(
        dataclasses.replace(prepared, job=Job(epochs=1)), trials=2, say=said.append
    )  # fmt: skip
    about = found.about
    first = about["search"]["trials"][0]
    assert (first["choice"], first["lr"]) == (about["advice"]["strategy"], about["advice"]["lr"])
    assert len(about["search"]["trials"]) == 2
    assert about["choice"] in said
    assert said[-1].startswith("chosen: ")
    assert found.job.strategy == "auto"
    assert found.plan.total_epochs(1) == 1


def test_a_budget_shortens_what_would_not_fit(prepared):
    # twenty epochs of a minute do not fit into two and a half: they become fewer, unless the number is given
    said = []
    slow = dataclasses.replace(prepared, epoch_s=60.0)
    found = choose_plan(slow, budget_minutes=2.5, search_share=0.0, say=said.append)
    plan = found.plan
    assert plan.total_epochs(1) < 20
    assert expected_s(dataclasses.replace(slow, plan=plan).dry_run(), plan, slow.layers) <= 150
    assert any("20 epochs would take about" in line for line in said)
    kept = choose_plan(
        dataclasses.replace(slow, job=Job(epochs=4)), budget_minutes=2.5, search_share=0.0, say=said.append
    )
    assert kept.plan.total_epochs(1) == 4
    assert any(line.startswith("warning: 4 epochs") for line in said)


def test_the_search_gets_what_advice_left_of_its_share(prepared, monkeypatch):
    # minutes of the share less those that advice took; without any left there is no search
    given = {}

    def spied(*args, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(auto, "search", spied)
    with pytest.raises(KeyboardInterrupt):
        choose_plan(prepared, budget_minutes=10, search_share=0.3)
    assert 2 < given["minutes"] < 3
    assert given["trials"] is None
    said = []
    choose_plan(prepared, budget_minutes=1e-6, search_share=1.0, say=said.append)
    assert "no search: advice took all the time that was for it" in said


def test_without_validation_data_the_advised_plan_is_taken(prepared):
    # nothing to compare plans on: no search, and the reason is told
    said = []
    data = SimpleNamespace(**{**vars(prepared.data), "val": None})
    found = choose_plan(dataclasses.replace(prepared, data=data, job=Job(epochs=1)), say=said.append)
    assert "no search: there is no validation data" in said
    assert found.about["search"] is None
    assert found.plan.strategy == found.about["advice"]["plan"]["strategy"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "balanced"), ({"class_weights": [1, 2]}, [1, 2]), ({"sampler": "balanced"}, None)],
)
def test_advised_class_weights_give_way_to_the_callers_choice(prepared, monkeypatch, given, expected):
    # weights on top of a balanced sampler would count rare classes twice
    real = auto.advice_from
    monkeypatch.setattr(
        auto,
        "advice_from",
        lambda *args, **more: dataclasses.replace(
            real(*args, **more), fit_options={"class_weights": "balanced"}
        ),
    )
    job = Job(epochs=1, options={"batch_size": 16, **given})
    found = choose_plan(dataclasses.replace(prepared, job=job), search_share=0.0)
    assert found.job.options.get("class_weights") == expected


def test_epochs_after_the_first_cost_what_learns():
    # half of the operations learn: one whole epoch and three halves; without counts of operations, whole ones
    layers = map_of(pretrained(widths=(4, 4, 6, 6)))
    plan = parse_strategy("top_k(k=3)", layers, epochs=4)
    measured = SimpleNamespace(costs=[SimpleNamespace(epoch_s=10.0)], steps_per_epoch=5)
    counted = dataclasses.replace(
        layers, groups=tuple(dataclasses.replace(g, flops=n) for g, n in zip(layers, (3, 1, 2, 1, 1)))
    )
    assert expected_s(measured, plan, counted) == pytest.approx(25)
    assert expected_s(measured, plan, layers) == pytest.approx(40)


def test_what_is_searched_lies_around_the_advice(prepared):
    # the advised plan at its own rate first; rates around the lowest advised one, and as high as the probe's
    plan = parse_strategy("linear_probe", prepared.layers, epochs=7, norms=Norms(policy="freeze"))
    other = SimpleNamespace(lr=1e-3)
    advice = SimpleNamespace(plan=plan, strategy="linear_probe", lr=5e-2, alternatives=[other])
    found = space_around(advice, groups=5)
    assert found["begin_with"] == [("linear_probe", 5e-2)]
    assert found["strategies"] == ["linear_probe"]
    assert found["lr"] == pytest.approx((1e-4, 5e-2))
    assert (found["epochs"], found["norms"]) == (7, "freeze")
    assert max(found["depths"]) <= 5
    follows = SimpleNamespace(**{**vars(advice), "plan": parse_strategy("full", prepared.layers, epochs=1)})
    assert space_around(follows, groups=5)["norms"] is None


def test_a_pull_towards_the_pretrained_weights_is_searched_with(prepared):
    # the matrix's cell for some thousand dissimilar samples has L2-SP beside its strategy
    plan = parse_strategy("full", prepared.layers, epochs=2, l2_sp=0.01)
    for strategy in ("full", "gradual_unfreezing(decay=0.9)"):
        text = auto._searchable(SimpleNamespace(plan=plan, strategy=strategy))
        assert parse_strategy(text, prepared.layers, epochs=6).phases[0].l2_sp == 0.01


@pytest.mark.parametrize("options", [{"budget_minutes": 0}, {"search_share": 1.5}])
def test_budgets_that_cannot_be_are_refused(prepared, options):
    # before anything is measured
    with pytest.raises(DataError, match="expected more than"):
        choose_plan(prepared, **options)
