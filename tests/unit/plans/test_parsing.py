"""Strategies from text, as the command line gives them."""

from __future__ import annotations

import pytest

from helpers import named_map, resnet_map
from layerwise.errors import PlanError
from layerwise.plans import recipes, strategies, unfreezing
from layerwise.plans.parsing import STRATEGIES, check_strategy, parse_strategy
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Norms, Schedule

LAYERS = resnet_map()


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("linear_probe", strategies.linear_probe(LAYERS)),
        ("linear-probe()", strategies.linear_probe(LAYERS)),
        ("top_k:k=2", strategies.top_k(LAYERS, k=2)),
        ("top_k(k=2)", strategies.top_k(LAYERS, k=2)),
        (" top_k : 2 ", strategies.top_k(LAYERS, k=2)),
        ("blocks:layer3:", strategies.blocks(LAYERS, "layer3:")),
        ("blocks(layer3, fc)", strategies.blocks(LAYERS, ["layer3", "fc"])),
        ("blocks:[layer1:layer2, fc]", strategies.blocks(LAYERS, ["layer1:layer2", "fc"])),
        ("blocks(-2)", strategies.blocks(LAYERS, -2)),
        ("discriminative:decay=1/2.6,frozen=1", strategies.discriminative(LAYERS, decay=1 / 2.6, frozen=1)),
        (
            "discriminative(rates={layer4: 0.5, fc: 1}, frozen=:layer3)",
            strategies.discriminative(LAYERS, rates={"layer4": 0.5, "fc": 1.0}, frozen=":layer3"),
        ),
        ("pattern(freeze=[stem, '*.bias'])", strategies.pattern(LAYERS, freeze=["stem", "*.bias"])),
        ("pattern:train=re:^fc", strategies.pattern(LAYERS, train="re:^fc")),
        (
            "full(schedule=cosine, norms=freeze, epochs=3)",
            strategies.full(LAYERS, schedule="cosine", norms="freeze", epochs=3),
        ),
        (
            "full(norms={policy: freeze, groups: {layer3: adapt, fc: {policy: adapt, rate: 1/2}}})",
            strategies.full(
                LAYERS,
                norms=Norms(
                    policy="freeze",
                    groups={"layer3": "adapt", "fc": Norms(policy="adapt", rate=0.5)},
                ),
            ),
        ),
        ("full(frozen_dropout=true)", strategies.full(LAYERS, frozen_dropout=True)),
        ("gradual_unfreezing:patience_epochs=2", unfreezing.gradual_unfreezing(LAYERS, patience_epochs=2)),
        ("surgical:middle", strategies.surgical(LAYERS, which="middle")),
        ("lisa:groups=1,every_steps=5", recipes.lisa(LAYERS, groups=1, every_steps=5)),
    ],
)
def test_text_becomes_the_same_plan_as_the_call(text: str, plan: Plan) -> None:
    """Colon and parentheses, names or order, lists, mappings and fractions mean what the call means."""
    assert parse_strategy(text, LAYERS) == plan


def test_common_options_in_braces_are_settings() -> None:
    """So --norms takes what its own errors advise, and tells what is wrong with it."""
    given = {"norms": "{policy: freeze_until, until: layer3}", "schedule": "{shape: cosine, warmup_steps: 3}"}
    check_strategy("full", **given)
    assert parse_strategy("full", LAYERS, **given) == strategies.full(
        LAYERS,
        norms=Norms(policy="freeze_until", until="layer3"),
        schedule=Schedule(shape="cosine", warmup_steps=3),
    )
    with pytest.raises(PlanError, match=r"no setting 'momentun'.*Did you mean 'momentum'"):
        check_strategy("full", norms="{policy: adapt, momentun: 0.1}")
    for unclosed in ("{policy: adapt", "{policy: adapt}}", "{"):
        with pytest.raises(PlanError):
            check_strategy("full", norms=unclosed)


def test_common_options_are_passed_on_and_the_text_wins() -> None:
    """None is left out; what the text gives goes before what the command line gives."""
    plan = parse_strategy("full:epochs=3", LAYERS, epochs=7, schedule="linear", norms=None)
    assert plan == strategies.full(LAYERS, epochs=3, schedule="linear")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("topk:2", r"strategy 'topk' is not known .* Did you mean 'top_k'"),
        ("top_k", "k is missing: top_k:k=..."),
        ("top_k:k=two,q=1", r"k = 'two' is not a whole number; no option 'q' \(known: k, epochs"),
        ("top_k:k=1.5", "k = '1.5' is not a whole number"),
        ("top_k:k=1,k=2", "k is given twice"),
        ("top_k(k=2", "the parenthesis is not closed"),
        ("blocks([a)", "its brackets do not match"),
        ("linear_probe:3", "'3' has no name"),
        ("pattern:train=bn,fc", "'fc' has no name; write option=value, and a list in brackets: train="),
        ("full:schedule=cos", "schedule = 'cos' is not .*one of constant, linear, cosine"),
        ("full:epochs=-1", "epochs is -1"),
        ("top_k:k=9", "k is a whole number from 1 to 5"),
        ("discriminative:decay=1/0", "decay = '1/0' is not a number"),
    ],
)
def test_mistakes_are_told(text: str, told: str) -> None:
    """The text, the wrong part, and what was expected stand in one PlanError."""
    with pytest.raises(PlanError, match=told):
        parse_strategy(text, LAYERS)


def test_every_strategy_can_be_named() -> None:
    """The names in plain sight are the functions' own, and each is exported from the package."""
    import layerwise

    for name, function in STRATEGIES.items():
        assert function.__name__ == name
        assert getattr(layerwise, name) is function


def test_a_group_with_a_number_for_a_name_is_named_in_quotes() -> None:
    """In an nn.Sequential a number could be a count or a name; the wrong groups would train."""
    layers = named_map("0", "2", "4")
    assert parse_strategy("blocks:'2'", layers).phases[0].rates == {"2": 1.0}
    assert parse_strategy("blocks:['2', '4']", layers).phases[0].rates == {"2": 1.0, "4": 1.0}
    with pytest.raises(PlanError, match="2 is a number of groups and the name of one"):
        parse_strategy("blocks:2", layers)
    assert parse_strategy("blocks:1", layers).phases[0].rates == {"0": 1.0}


@pytest.mark.parametrize("option", ["discriminative:frozen", "surgical:which"])
def test_a_count_or_a_name_is_asked_for_wherever_groups_are_meant(option: str) -> None:
    # As for blocks: frozen=2 froze the first two groups of a map with a group called 2.
    layers = named_map("0", "2", "4", "6", "head")
    for value in ("2", "[0:0, 2]"):
        with pytest.raises(
            PlanError, match=f"{option.partition(':')[2]}: 2 is a number of groups and the name of one"
        ):
            parse_strategy(f"{option}={value}", layers)
    inverse = option.endswith("frozen")
    for value, meant in {"'2'": "2", "3": "024", ":2": "02"}.items():
        phase = parse_strategy(f"{option}={value}", layers).phases[0]
        assert [name for name in "0246" if phase.trains(name) != inverse] == list(meant)


def test_a_path_of_numbers_is_a_name() -> None:
    # A stage of an nn.Sequential in another: it was the count that a float of that value is.
    layers = named_map("0.0", "1.0", "2.0", "3")
    assert parse_strategy("blocks:1.0", layers).phases[0].rates == {"1.0": 1.0}
    assert parse_strategy("blocks:[1.0, 1]", layers).phases[0].rates == {"0.0": 1.0, "1.0": 1.0}
    assert list(parse_strategy("surgical:which=2.0", layers).phases[0].rates) == ["2.0", "3"]
    assert list(parse_strategy("discriminative:frozen=2.0", layers).phases[0].rates) == ["0.0", "1.0", "3"]


def test_the_arguments_the_other_way_round_are_told() -> None:
    # The strategies themselves take the layer map first.
    with pytest.raises(PlanError, match=r"a strategy is a text .*'top_k:k=2'.*; received a LayerMap"):
        parse_strategy(LAYERS, "full")  # type: ignore[arg-type]


def test_auto_is_told_to_be_of_fit() -> None:
    """The strategy that only `layerwise fit` has is not called a misspelt one."""
    with pytest.raises(PlanError, match="layerwise fit --strategy auto") as error:
        parse_strategy("auto", resnet_map())
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("text", ["blocks:[a", "blocks:a]", "blocks:groups=[a,b]]", "blocks:]a["])
def test_brackets_that_do_not_match_are_told(text: str) -> None:
    # Whichever is missing.
    with pytest.raises(PlanError, match="its brackets do not match"):
        parse_strategy(text, named_map("a", "b", "c"))


def test_a_value_of_another_kind_is_told_with_the_one_that_is_expected() -> None:
    # In words and with an example, not as a Python type.
    layers = named_map("a", "b", "c")
    with pytest.raises(PlanError, match=r"rates = '3' is not a mapping \{a: 1, b: 2\}"):
        parse_strategy("discriminative:rates=3", layers)
    with pytest.raises(PlanError, match=r"train = .* is not a name or a list \[a, b\]"):
        parse_strategy("pattern:train={a: 1}", layers)
