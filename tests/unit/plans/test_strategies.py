"""Strategies: the matrix each one writes, and what each refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from helpers import named_map, resnet_map
from layerwise.errors import PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans import recipes, strategies, unfreezing
from layerwise.plans.parsing import STRATEGIES, parse_strategy
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Norms, Schedule

NAMES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")


def matrix(plan: Plan) -> list[list[float]]:
    """Return the multipliers: one row a phase, one column a group."""
    return [[phase.rate(name) for name in plan.groups] for phase in plan.phases]


def bert() -> LayerMap:
    return named_map("embeddings", *(f"layer.{i}" for i in range(4)), "classifier", granularity="blocks")


@pytest.mark.parametrize(
    "told",
    [
        "gradual_unfreezing(decay=0.5, epochs_per_group=2, last_epochs=4, patience_epochs=1)",
        "gradual_unfreezing(decay=0.5, steps_per_group=2, last_steps=4)",
        "ulmfit(epochs_per_group=2, last_epochs=4)",
        "lp_ft(probe_epochs=1, tune_rate=0.1, decay=0.5)",
        "lp_ft(probe_steps=1, steps=9)",
        "fine_tune(freeze_epochs=2, lr_mult=10)",
        "surgical(which='last', head='freeze')",
        "lisa(groups=2, every_steps=5)",
    ],
)
def test_a_plan_says_by_which_options_it_was_made(told: str) -> None:
    """Two plans that differ by an option of the strategy are not called the same; lengths are left out."""
    assert parse_strategy(told, resnet_map()).strategy == told.replace(", steps=9", "")


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (strategies.linear_probe, [[0, 0, 0, 0, 0, 1]]),
        (lambda m: strategies.top_k(m, k=2), [[0, 0, 0, 0, 1, 1]]),
        (lambda m: strategies.blocks(m, ["layer1", "layer3:"]), [[0, 1, 0, 1, 1, 1]]),
        (lambda m: strategies.blocks(m, "layer2"), [[0, 0, 1, 0, 0, 0]]),
        (strategies.full, [[1, 1, 1, 1, 1, 1]]),
        (lambda m: strategies.discriminative(m, decay=0.5), [[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]]),
        (lambda m: strategies.discriminative(m, decay=0.5, frozen=1), [[0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]]),
        (
            lambda m: strategies.discriminative(m, rates={"head": 1, "layer3:layer4": 0.1}, frozen=":layer2"),
            [[0, 0, 0, 0.1, 0.1, 1]],
        ),
        (
            lambda m: strategies.discriminative(m, decay=0.5, rates={"fc": 3}),
            [[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3]],
        ),
        (lambda m: strategies.surgical(m, which="first"), [[1, 1, 0, 0, 0, 1]]),
        (lambda m: strategies.surgical(m, which="middle"), [[0, 0, 1, 1, 0, 1]]),
        (lambda m: strategies.surgical(m, which="last"), [[0, 0, 0, 0, 1, 1]]),
        (lambda m: strategies.surgical(m, which="layer1", head="freeze"), [[0, 1, 0, 0, 0, 0]]),
        (strategies.freeze_embeddings, [[0, 1, 1, 1, 1, 1]]),
        (lambda m: strategies.freeze_embeddings(m, decay=0.5), [[0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]]),
        (
            lambda m: unfreezing.gradual_unfreezing(m, decay=0.5),
            [
                [0, 0, 0, 0, 0, 1],
                [0, 0, 0, 0, 1 / 2, 1],
                [0, 0, 0, 1 / 4, 1 / 2, 1],
                [0, 0, 1 / 8, 1 / 4, 1 / 2, 1],
                [0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
                [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
            ],
        ),
        (lambda m: unfreezing.lp_ft(m, tune_rate=0.1), [[0, 0, 0, 0, 0, 1], [0.1] * 6]),
        (
            lambda m: unfreezing.fine_tune(m, lr_mult=32),
            [[0, 0, 0, 0, 0, 1], [1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]],
        ),
        (recipes.auto_rgn, [[1] * 6]),
        (lambda m: recipes.lisa(m, groups=2), [[1] * 6]),
        (lambda m: recipes.reinit_last(m, k=2), [[1] * 6]),
    ],
)
def test_each_strategy_writes_its_matrix(
    plan: Callable[[LayerMap], Plan], expected: list[list[float]]
) -> None:
    """The multipliers are exactly those of the method's table."""
    made = plan(resnet_map())
    assert made.groups == NAMES
    assert matrix(made) == [pytest.approx(row) for row in expected]
    made.check(resnet_map())


def test_the_combined_preset_is_one_short_expression() -> None:
    """Freeze the first stage, decayed rates from the second on, full rate for the head."""
    plan = strategies.discriminative(resnet_map(), decay=0.8, frozen=1)
    assert matrix(plan)[0] == pytest.approx([0, 0.8**4, 0.8**3, 0.8**2, 0.8, 1])


def test_ulmfit_is_the_whole_recipe() -> None:
    """One epoch a group from the output, division by 2.6, slanted triangles, several last epochs."""
    plan = unfreezing.ulmfit(bert())
    assert [phase.epochs for phase in plan.phases] == [1, 1, 1, 1, 1, 3]
    assert plan.phases[-1].rate("layer.3") == pytest.approx(1 / 2.6)
    assert plan.phases[-1].rate("embeddings") == pytest.approx(2.6**-5)
    for phase in plan.phases:
        assert phase.schedule == Schedule(shape="slanted_triangular", cut_frac=0.1, ratio=32)


def test_fine_tune_has_fastais_figures() -> None:
    """A frozen epoch with pct_start .99 from 1/25; pct_start .3 from 1/5 at half the rate, spread by 100."""
    frozen, tuned = unfreezing.fine_tune(resnet_map(), epochs=4).phases
    assert (frozen.epochs, frozen.schedule.cut_frac, frozen.schedule.ratio) == (1, 0.99, 25)
    assert (tuned.epochs, tuned.schedule.cut_frac, tuned.schedule.ratio) == (3, 0.3, 5)
    assert tuned.rate("fc") == 0.5
    assert tuned.rate("stem") == pytest.approx(0.005)


def test_lisa_and_auto_rgn_and_reinit_set_what_the_tuner_reads() -> None:
    """Sampling, adaptive rates and groups to start anew stand in the phase."""
    lisa = recipes.lisa(bert(), groups=2, every_steps=7).phases[0]
    assert (lisa.sample_groups, lisa.sample_every_steps) == (2, 7)
    assert recipes.auto_rgn(bert()).phases[0].adapt_rates == "auto_rgn"
    assert recipes.reinit_last(bert(), k=2).phases[0].reinit == ("layer.2", "layer.3", "classifier")


def test_patterns_become_rates_and_overrides() -> None:
    """Groups that learn wholly have a rate, partly learning ones have overrides."""
    plan = strategies.pattern(resnet_map(), train=["layer4", "fc.weight"], freeze="layer4.bias")
    (phase,) = plan.phases
    assert phase.rates == {}
    assert phase.overrides == {"layer4.weight": 1.0, "fc.weight": 1.0}
    plan = strategies.pattern(resnet_map(), freeze=["stem"])
    assert plan.phases[0].rates == dict.fromkeys(NAMES[1:], 1.0)
    assert plan.phases[0].overrides == {}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_takes_the_common_options(name: str) -> None:
    """Norms, L2-SP, dropout and length reach every phase of every strategy."""
    own: dict[str, Any] = {
        "top_k": {"k": 1},
        "blocks": {"groups": "fc"},
        "pattern": {"freeze": "stem"},
        "reinit_last": {"k": 1},
    }.get(name, {})
    plan = STRATEGIES[name](resnet_map(), norms="freeze", l2_sp=0.5, frozen_dropout=True, epochs=12, **own)
    assert plan.total_steps(10) == 120
    for phase in plan.phases:
        assert phase.norms == Norms(policy="freeze")
        assert phase.l2_sp == 0.5
        assert phase.frozen_dropout
    assert plan.strategy.startswith(name)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({}, [1, 1, 1, 1, 1, 3]),
        ({"epochs_per_group": 2, "last_epochs": 5}, [2, 2, 2, 2, 2, 5]),
        ({"epochs_per_group": 2, "epochs": 14}, [2, 2, 2, 2, 2, 4]),
        ({"epochs": 20}, [2, 2, 2, 2, 2, 10]),
        ({"epochs": 4}, [1, 1, 2]),
        ({"epochs": 2}, [1, 1]),
        ({"epochs": 9, "last_epochs": 4}, [1, 1, 1, 1, 1, 4]),
        ({"patience_epochs": 2}, [10, 10, 10, 10, 10, 3]),
    ],
)
def test_lengths_of_gradual_unfreezing(options: dict[str, int], epochs: list[int]) -> None:
    """Phases last as asked; a total alone is halved between unfreezing and the last phase."""
    plan = unfreezing.gradual_unfreezing(resnet_map(), **options)  # type: ignore[arg-type]
    assert [phase.epochs for phase in plan.phases] == epochs
    assert matrix(plan)[0] == [0, 0, 0, 0, 0, 1]
    assert all(rate > 0 for rate in matrix(plan)[-1])
    waits = [phase.patience_epochs is not None for phase in plan.phases]
    assert waits == ["patience_epochs" in options] * (len(epochs) - 1) + [False]


def test_few_epochs_unfreeze_several_groups_at_once() -> None:
    """With fewer epochs than groups the joins are spread evenly, and everything still joins."""
    assert [len(phase.rates) for phase in unfreezing.gradual_unfreezing(resnet_map(), epochs=6).phases] == [
        1,
        3,
        4,
        6,
    ]


REFUSED: dict[str, tuple[Callable[[LayerMap], Plan], str]] = {
    "k too large": (lambda m: strategies.top_k(m, k=7), r"k is a whole number from 1 to 5; .* 6 groups"),
    "k is all": (lambda m: strategies.top_k(m, k=6), "freezes nothing"),
    "k zero": (lambda m: strategies.top_k(m, k=0), "k=0"),
    "all blocks": (lambda m: strategies.blocks(m, ":"), "freezes nothing"),
    "unknown block": (lambda m: strategies.blocks(m, ["layer9"]), "'layer9' is not in this layer map"),
    "no pattern": (strategies.pattern, "neither is given"),
    "pattern of all": (lambda m: strategies.pattern(m, train="*"), "freezes nothing"),
    "pattern of none": (lambda m: strategies.pattern(m, train="fc", freeze="fc"), "trains nothing"),
    "pattern unmatched": (lambda m: strategies.pattern(m, freeze="bn"), "'bn' matches no parameter"),
    "equal rates": (lambda m: strategies.discriminative(m, decay=1), "rates of all 6 learning groups equal"),
    "frozen all": (lambda m: strategies.discriminative(m, frozen=6), "trains nothing"),
    "rates missing": (
        lambda m: strategies.discriminative(m, rates={"fc": 1, "stem": 0.1}),
        "no rate to layer1, layer2",
    ),
    "negative rate": (lambda m: strategies.discriminative(m, decay=0.9, rates={"fc": -1}), "rates.fc is -1"),
    "decay zero": (lambda m: strategies.discriminative(m, decay=0), "decay is 0"),
    "both units": (
        lambda m: unfreezing.gradual_unfreezing(m, epochs_per_group=1, last_steps=3),
        "in epochs or in steps, not both",
    ),
    "one epoch": (lambda m: unfreezing.gradual_unfreezing(m, epochs=1), "leave no room"),
    "no last phase": (
        lambda m: unfreezing.gradual_unfreezing(m, epochs_per_group=2, epochs=10),
        "leave 0 of 10",
    ),
    "shorter than asked": (
        lambda m: unfreezing.gradual_unfreezing(m, epochs=10, last_epochs=2),
        "5 phases of 1 and a last one of 2 make 7 epochs, not 10.*last_epochs=5.*epochs=7",
    ),
    "shorter than asked, in steps": (
        lambda m: unfreezing.gradual_unfreezing(m, steps=100, steps_per_group=10, last_steps=20),
        "make 70 steps, not 100.*last_steps=50.*steps=70",
    ),
    "probe takes all": (
        lambda m: unfreezing.lp_ft(m, probe_epochs=3, epochs=3),
        "leaves 0 for the second phase",
    ),
    "probe in steps": (lambda m: unfreezing.lp_ft(m, probe_steps=3, epochs=3), "give probe_epochs"),
    "schedule given": (lambda m: unfreezing.fine_tune(m, schedule="cosine"), "brings its own schedule"),
    "no spread": (lambda m: unfreezing.fine_tune(m, lr_mult=1), "all rates are equal"),
    "lisa of all": (lambda m: recipes.lisa(m, groups=4), "draws from the 4 groups"),
    "reinit too many": (lambda m: recipes.reinit_last(m, k=5), "from 1 to 4"),
    "unknown option": (lambda m: strategies.full(m, epoch=3), "no option 'epoch' .* Did you mean 'epochs'"),  # type: ignore[call-arg]
    "unknown option of its own": (
        lambda m: unfreezing.gradual_unfreezing(m, epoch_per_group=2),  # type: ignore[call-arg]
        r"gradual_unfreezing has no option 'epoch_per_group' \(known: .* Did you mean 'epochs_per_group'",
    ),
    "unknown schedule": (
        lambda m: strategies.full(m, schedule="cos"),
        "schedule 'cos' is not known .* 'cosine'",
    ),  # type: ignore[arg-type]
    "a part that is neither a third nor a group": (
        lambda m: strategies.surgical(m, which="frist"),
        r"surgical\(which='frist'\): expected 'first', 'middle' or 'last', or groups; group 'frist' is not",
    ),
    "a head neither trained nor frozen": (
        lambda m: strategies.surgical(m, head="frozen"),  # type: ignore[arg-type]
        r"surgical\(head='frozen'\): expected 'train' or 'freeze'",
    ),
    "two lengths": (lambda m: strategies.full(m, epochs=1, steps=1), "exactly one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    """A strategy that freezes nothing, trains nothing, or leaves rates equal is an error with the way out."""
    strategy, told = REFUSED[name]
    with pytest.raises(PlanError, match=told):
        strategy(resnet_map())


def test_models_without_the_needed_parts_are_refused() -> None:
    """No head for a probe, no stem for frozen embeddings, too few groups to divide."""
    layers = named_map("a", "b", "c")
    headless = dataclasses.replace(
        layers, groups=tuple(dataclasses.replace(group, role="trunk") for group in layers)
    )
    with pytest.raises(PlanError, match="this layer map has none"):
        strategies.linear_probe(headless)
    with pytest.raises(PlanError, match="ulmfit trains the head"):
        unfreezing.ulmfit(headless)
    with pytest.raises(PlanError, match="nothing before its first block"):
        strategies.freeze_embeddings(headless)
    with pytest.raises(PlanError, match="finer granularity"):
        strategies.surgical(layers)


def test_gradual_unfreezing_without_a_head_begins_with_the_last_group() -> None:
    """A detector has several output layers, a language model may have none of its own: both can unfreeze."""
    layers = named_map("a", "b", "c")
    headless = dataclasses.replace(
        layers, groups=tuple(dataclasses.replace(group, role="trunk") for group in layers)
    )
    plan = unfreezing.gradual_unfreezing(headless, decay=0.5)
    assert plan.phases == unfreezing.gradual_unfreezing(layers, decay=0.5).phases
    assert plan.phases[0].rates == {"c": 1.0}


@pytest.mark.parametrize(
    "text",
    ["discriminative:decay=0.5", "gradual_unfreezing", "ulmfit", "lp_ft", "fine_tune", "auto_rgn", "lisa"],
)
def test_one_group_alone_is_refused(text: str) -> None:
    """Nothing could be told apart, so the plan would be full() under another name; a finer map is the way."""
    with pytest.raises(PlanError, match=r"\bclassifier\)\. Map the model with a finer granularity, or ask"):
        parse_strategy(text, named_map("classifier"))


def test_recipes_for_the_middle_of_a_model_are_refused_without_one() -> None:
    """No range such as "1 to 0" is told: there are no groups between stem and head."""
    layers = named_map("embeddings", "classifier")
    with pytest.raises(PlanError, match=r"has none \(embeddings, classifier\). Map the model with a finer"):
        recipes.reinit_last(layers, k=1)
    with pytest.raises(PlanError, match=r"lisa .*has 0 of them \(of embeddings, classifier\). Map the model"):
        recipes.lisa(layers)


def test_what_the_options_of_a_strategy_leave_open_is_told() -> None:
    """Steps for the last phase say nothing of the others; a factor of 1 makes all rates equal."""
    with pytest.raises(PlanError, match="needs steps_per_group, or steps for the whole plan"):
        unfreezing.gradual_unfreezing(resnet_map(), last_steps=100)
    with pytest.raises(PlanError, match=r"fine_tune\(lr_mult=1\): expected a number above 1"):
        unfreezing.fine_tune(resnet_map(), lr_mult=1)
    with pytest.raises(PlanError, match=r"fine_tune\(lr_mult='2'\): expected a number above 1"):
        unfreezing.fine_tune(resnet_map(), lr_mult="2")  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ["2", 0, -1, True, 1.5])
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (unfreezing.gradual_unfreezing, "epochs"),
        (unfreezing.gradual_unfreezing, "last_steps"),
        (unfreezing.gradual_unfreezing, "patience_epochs"),
        (unfreezing.ulmfit, "epochs_per_group"),
        (unfreezing.lp_ft, "probe_epochs"),
        (unfreezing.lp_ft, "probe_steps"),
        (unfreezing.fine_tune, "freeze_epochs"),
    ],
)
def test_a_length_that_is_no_whole_number_is_told_by_its_name(
    strategy: Callable[..., Plan], name: str, odd: Any
) -> None:
    """Of the option that was given, and not of a phase that would come of it."""
    with pytest.raises(PlanError, match=rf"{name} is {odd!r}; expected a whole number of at least 1"):
        strategy(resnet_map(), **{name: odd})


@pytest.mark.parametrize("strategy", [unfreezing.lp_ft, unfreezing.fine_tune])
@pytest.mark.parametrize("lengths", [{"epochs": 0}, {"epochs": "4"}, {"epochs": 5, "steps": 100}])
def test_lengths_are_not_dropped(strategy: Callable[..., Plan], lengths: dict[str, Any]) -> None:
    """0 epochs are not the default number of epochs, and of two lengths neither wins."""
    with pytest.raises(PlanError, match=r"epochs|steps"):
        strategy(resnet_map(), **lengths)


@pytest.mark.parametrize("odd", [1.5, True, [None]])
def test_what_names_no_group_is_refused(odd: Any) -> None:
    """Numbers are whole, and no one means True."""
    with pytest.raises(PlanError, match="names no group"):
        strategies.blocks(resnet_map(), odd)


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_no_layer_map_is_told_how_to_become_one(name: str) -> None:
    with pytest.raises(
        PlanError, match=rf"{name} got a Linear; expected .*{name}\(layerwise.layer_map\(model\)"
    ):
        STRATEGIES[name](nn.Linear(2, 2))
