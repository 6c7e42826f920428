"""Plans as data: all problems told at once, YAML there and back, checks against a layer map."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from helpers import named_map, resnet_map
from layerwise.errors import PlanError
from layerwise.plans.explain import _heat_edges
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.settings import Norms, Schedule
from layerwise.plans.storage import parse, to_yaml
from layerwise.plans.strategies import discriminative, full, linear_probe
from layerwise.plans.unfreezing import lp_ft, ulmfit


def one(**changes: Any) -> dict[str, Any]:
    """Return the data of a small valid plan with `changes` in its only phase."""
    return {"groups": ["stem", "fc"], "phases": [{"name": "a", "rates": {"fc": 1.0}, "epochs": 1, **changes}]}


def test_a_small_plan_is_valid() -> None:
    """The data that the other tests spoil is a plan."""
    plan = Plan(**one())
    assert plan.phases[0] == Phase(name="a", rates={"fc": 1.0}, epochs=1)
    assert (plan.phases[0].rate("stem"), plan.phases[0].trains("fc")) == (0.0, True)


def test_equal_plans_have_one_hash() -> None:
    """Also where their tables were written in another order; norms alone have one too."""
    rates = {"stem": 0.5, "fc": 1.0}
    groups = {"stem": Norms(policy="adapt"), "fc": Norms(policy="freeze")}
    plans = [
        Plan(**one(rates=dict(order(rates.items())), norms=Norms(groups=dict(order(groups.items())))))
        for order in (list, reversed)
    ]
    assert plans[0] == plans[1]
    assert len({*plans}) == 1
    assert len({Norms(groups=groups), Norms(groups=groups), Norms()}) == 2


def test_names_stand_for_a_schedule_and_a_norm_policy() -> None:
    """A phase takes ``norms: freeze`` and ``schedule: cosine``, as strategies do; norms alone may train."""
    phase = Plan(**one(norms="freeze", schedule="cosine")).phases[0]
    assert (phase.norms, phase.schedule) == (Norms(policy="freeze"), Schedule(shape="cosine"))
    assert Plan(**one(norms="adapt", rates={})).phases[0].norms.policy == "adapt"


def test_missing_groups_are_one_problem() -> None:
    """Without `groups` the message says that, and not that every rate names an unknown group."""
    with pytest.raises(PlanError, match=r"this plan is not valid: 'groups' is missing$"):
        Plan(phases=one()["phases"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": None}, "received neither"),
        ({"steps": 5}, "received epochs = 1 and steps = 5"),
        ({"epochs": 0}, "epochs is 0; expected greater than 0"),
        ({"rates": {"fc": -1}}, r"rates\.fc is -1; expected greater than or equal to 0"),
        ({"rates": {"fc": float("nan")}}, r"rates\.fc is nan; expected"),
        ({"rates": {"fc": float("inf")}}, r"rates\.fc is inf; expected a finite number"),
        ({"rates": {"fc": 0}}, "it trains nothing"),
        ({"rates": {}}, "it trains nothing"),
        ({"rates": {"fx": 1}}, r"group 'fx' is not among the groups \(stem, fc\)\. Did you mean 'fc'\?"),
        ({"reinit": ["fx"]}, "reinit: group 'fx' is not among the groups"),
        ({"norms": {"policy": "freeze_until", "until": "fx"}}, "norms.until: group 'fx'"),
        ({"norms": {"policy": "freeze_until"}}, "adapt: {policy: freeze_until, until: GROUP}"),
        ({"norms": {"until": "fc"}}, "only policy 'freeze_until' uses"),
        (
            {"norms": {"policy": "calibrate", "rate": 0.5}},
            "rate is 0.5, which is only for policy 'adapt' or 'freeze_until', or with tune, not 'calibrate'",
        ),
        ({"norms": {"policy": "frezee"}}, "norms: policy is 'frezee'; expected 'follow', 'freeze'"),
        ({"ephocs": 3}, r"there is no setting 'ephocs' .* Did you mean 'epochs'"),
        ({"schedule": {"warmup_frac": 0.1, "warmup_steps": 3}}, "are both given; keep one"),
        ({"schedule": {"warmup_frac": 1.5}}, "warmup_frac is 1.5; expected less than or equal to 1"),
        ({"patience_epochs": 2, "epochs": None, "steps": 9}, "give `epochs` as the limit"),
        (
            {"norms": "frezze"},
            r"norms is 'frezze'; expected one of .*\{policy: freeze\}\. Did you mean 'freeze'",
        ),
        ({"norms": ["freeze"]}, r"norms is \['freeze'\]; expected one of follow"),
        ({"norms": "freeze_until"}, "norms: policy 'freeze_until' needs `until`"),
        ({"norms": "freeze", "rates": {}}, "it trains nothing"),
        ({"norms": {"groups": {"fx": "freeze"}}}, "norms.groups: group 'fx' .*Did you mean 'fc'"),
        ({"norms": Norms(groups={"fx": "freeze"})}, "norms.groups: group 'fx'"),
        (
            {"norms": {"groups": {"fc": {"policy": "freeze_until", "until": "fc"}}}},
            r"norms: groups.fc is \{'policy': 'freeze_until'.*; expected the policy of one group \(follow, "
            r"freeze, calibrate, adapt\) .* move them to the norms of the phase",
        ),
        (
            {"norms": {"groups": {"fc": "freeze_until"}}},
            "groups.fc is 'freeze_until'; expected one of follow",
        ),
        ({"norms": {"groups": {"fc": {"until": "fc"}}}}, "groups.fc is .*`until` and `groups` tell groups"),
        (
            {"norms": {"groups": {"fc": {"groups": {"fc": "adapt"}}}}},
            "groups.fc is .*; expected the policy of",
        ),
        ({"norms": {"groups": {"fc": "frezze"}}}, "groups.fc is 'frezze'; .*Did you mean 'freeze'"),
        (
            {"norms": {"groups": {"fc": {"policy": "frezze"}}}},
            "groups.fc: policy is 'frezze'; expected 'follow'",
        ),
        ({"norms": {"groups": {"fc": {"samples": 5}}}}, "groups.fc: samples is 5, which is only for policy"),
        ({"norms": {"groups": ["fc"]}}, r"norms: groups is \['fc'\]; expected a valid dictionary"),
        (
            {"norms": {"policy": "calibrate", "groups": {"fc": {"policy": "calibrate", "samples": 5}}}},
            "samples is None in the phase, 5 in 'fc'; expected one value",
        ),
        (
            {"norms": {"groups": {"stem": "calibrate", "fc": {"policy": "calibrate", "momentum": 0.5}}}},
            "momentum is None in 'stem', 0.5 in 'fc'; expected one value",
        ),
        ({"norms": {"groups": {"fc": "freeze"}}, "rates": {}}, "it trains nothing"),
        ({"schedule": "cosin"}, r"schedule is 'cosin'; expected one of constant, .* Did you mean 'cosine'"),
        ({"sample_groups": 2}, "go together; only sample_groups is given"),
    ],
)
def test_each_mistake_is_told_with_its_value(changes: dict[str, Any], told: str) -> None:
    """A plan with one mistake raises a PlanError that names the field, the value and what was expected."""
    with pytest.raises(PlanError, match=told):
        Plan(**one(**changes))


def test_all_problems_are_told_at_once_and_pydantic_stays_inside() -> None:
    """Mistakes in several phases and in the whole come in one PlanError, not in pydantic's."""
    data = {
        "groups": ["stem", "stem"],
        "colour": "red",
        "phases": [
            {"name": "a", "rates": {"stem": -1}, "epochs": 1},
            {"name": "a", "rates": {"fc": 1}, "norms": {"policy": "x"}},
        ],
    }
    with pytest.raises(PlanError) as caught:
        Plan(**data)
    assert not isinstance(caught.value, ValidationError)
    assert "8 problems" in str(caught.value)
    for told in (
        "colour",
        "2 times",
        "2 phases are called 'a'",
        "rates.stem is -1",
        "policy is 'x'",
        "neither",
        "'fc'",
    ):
        assert told in str(caught.value), told


def test_parts_raise_a_plan_error_of_their_own() -> None:
    """Schedule, Norms and Phase built alone raise PlanError too, and so does model_validate."""
    for build in (
        lambda: Schedule(floor=2),
        lambda: Norms(rate=-1),
        lambda: Phase(name="a", rates={"x": 1}),
        lambda: Plan.model_validate({"groups": ["a"], "phases": []}),
    ):
        with pytest.raises(PlanError, match="not valid"):
            build()


def test_norms_alone_can_be_what_trains() -> None:
    """A phase with all groups frozen is allowed where its norm layers learn."""
    assert Plan(**one(rates={}, norms={"policy": "adapt"})).phases[0].norms.policy == "adapt"


@pytest.mark.parametrize("own", ["adapt", {"policy": "adapt"}, Norms(policy="adapt"), {"tune": True}])
def test_norms_of_one_group_can_be_what_trains(own: Any) -> None:
    """As those of all groups; the others keep the policy of the phase."""
    norms = Plan(**one(rates={}, norms={"policy": "freeze", "groups": {"stem": own}})).phases[0].norms
    assert (norms.of("stem").policy, norms.of("stem").tune) in [("adapt", False), ("follow", True)]
    assert norms.of("fc") is norms


def test_norms_by_group_make_the_round_trip_and_are_written_to_be_edited(tmp_path: Path) -> None:
    """A group a line, input to output, its policy always said; without groups nothing is written of them."""
    groups = {"fc": "follow", "stem": {"policy": "adapt", "momentum": 0.05, "rate": 0.5}}
    plan = Plan(**one(norms={"policy": "freeze", "groups": groups}))
    plan.save(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    lines = ["policy: freeze", "groups:", "  stem: {policy: adapt, momentum: 0.05, rate: 0.5}"]
    lines += ["  fc: {policy: follow}"]
    assert "  norms:\n" + "".join(f"    {line}\n" for line in lines) in text
    assert Plan.load(tmp_path / "plan.yaml") == plan == Plan(**plan.to_dict())
    for norms in ("freeze", Norms(policy="freeze", groups={})):
        bare = Plan(**one(norms=norms))
        assert bare.to_dict()["phases"][0]["norms"] == {"policy": "freeze"}
        bare.save(tmp_path / "bare.yaml")
        assert "norms: {policy: freeze}\n" in (tmp_path / "bare.yaml").read_text()


def test_a_rate_of_norms_is_taken_where_norms_of_frozen_groups_learn() -> None:
    """`rate` is for what `adapt`, `freeze_until` and `tune` train in frozen groups; 1 is the same as none."""
    assert Norms(policy="adapt", rate=0.5).rate == 0.5
    assert Norms(policy="freeze_until", until="fc", rate=0.5).rate == 0.5
    assert Norms(policy="freeze", tune=True, rate=0.5).rate == 0.5
    assert Norms(policy="freeze", rate=1).rate == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"floor": 0.1}, "floor is 0.1, which is only for shape 'linear' or 'cosine' or"),
        ({"shape": "plateau", "ratio": 25}, "'slanted_triangular' or 'one_cycle', not 'plateau'"),
        ({"shape": "cosine", "cut_frac": 0.3}, "cut_frac is 0.3, which is only for shape"),
        (
            {"shape": "linear", "factor": 0.5},
            "factor is 0.5, which is only for shape 'plateau', not 'linear'",
        ),
        ({"shape": "one_cycle", "patience_epochs": 5}, "patience_epochs is 5, which is"),
    ],
)
def test_a_setting_that_the_shape_does_not_read_is_refused(settings: dict[str, Any], told: str) -> None:
    """A schedule says which of its settings does nothing, and which shapes read it; a default stays taken."""
    for build in (lambda: Schedule(**settings), lambda: Plan(**one(schedule=settings))):
        with pytest.raises(PlanError, match=re.escape(told)):
            build()
    shape = settings.get("shape", "constant")
    assert Schedule(shape=shape, **Schedule().model_dump(exclude={"shape"})).shape == shape


def test_with_changes_checks() -> None:
    """A changed copy is checked like a new one; the original stays."""
    plan = Plan(**one())
    assert plan.with_changes(strategy="mine").strategy == "mine"
    assert plan.strategy == "custom"
    with pytest.raises(PlanError, match="'groups' is empty"):
        plan.with_changes(groups=())


# ------------------------------------------------------------------ YAML


def test_the_file_is_pleasant_to_edit(tmp_path: Path) -> None:
    """Comments on top, rates input to output, one line a setting, defaults and frozen groups left out."""
    phase = Phase(
        name="tune",
        rates={"fc": 1, "layer4": 1e-5},
        epochs=3,
        schedule=Schedule(shape="cosine", warmup_frac=0.1),
        reinit=("fc",),
    )
    plan = Plan(strategy="mine", groups=resnet_map().names, phases=(phase,))
    plan.save(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text()
    comments, body = text.split("version", 1)
    assert all(line.startswith("# ") for line in comments.splitlines())
    assert "version" + body == (
        "version: 1\n"
        "strategy: mine\n"
        "granularity: stages\n"
        "groups: [stem, layer1, layer2, layer3, layer4, fc]\n"
        "phases:\n"
        "- name: tune\n"
        "  rates:\n"
        "    layer4: 1.0e-05\n"
        "    fc: 1.0\n"
        "  epochs: 3\n"
        "  schedule: {shape: cosine, warmup_frac: 0.1}\n"
        "  reinit: [fc]\n"
    )
    assert Plan.load(tmp_path / "plan.yaml") == plan


def test_a_hand_written_rate_without_a_dot_is_a_number() -> None:
    """YAML reads 1e-3 as text; a plan takes it as the number it is meant to be."""
    text = "groups: [a, b]\nphases:\n- {name: x, rates: {b: 1e-3}, epochs: 2}\n"
    assert parse(text, "here").phases[0].rates == {"b": 0.001}


def test_saving_leaves_no_temporary_file_and_keeps_the_old_one_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails half-way leaves the file that was there and nothing else."""
    path = tmp_path / "plan.yaml"
    plan = Plan(**one())
    plan.save(path)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        plan.with_changes(strategy="other").save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]
    assert Plan.load(path) == plan


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("groups: [a\n", "not a YAML file"),
        ("[" * 5000, "not a YAML file"),
        ("a: " + "{b: " * 2000 + "}" * 2000, "not a YAML file"),
        ("just words", "expected a mapping with `groups` and `phases`"),
        ("version: 7\ngroups: [a]\nphases: []\n", "format version 7; this layerwise reads version 1"),
        ("groups: [a]\n", "'phases' is missing"),
        ("groups: [a]\nphases: []\nself: 1\n", "there is no setting 'self'"),
        ("groups: [a]\nphases: [{self: 1}]\n", "there is no setting 'self'"),
        (
            "groups: !!python/object/apply:os.system ['touch /tmp/oops']\n",
            "not a YAML file that can be read safely",
        ),
    ],
)
def test_files_that_are_no_plan_are_refused(text: str, told: str, tmp_path: Path) -> None:
    """Broken YAML, other YAML, another version and code are told apart, with the file's name."""
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=told) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """The path and the next step stand in the message."""
    with pytest.raises(PlanError, match=r"nowhere\.yaml.* does not exist.*layerwise plan MODEL"):
        Plan.load(tmp_path / "nowhere.yaml")


def test_names_in_any_script_survive() -> None:
    """Readable letters stay readable, control characters are escaped; both come back as they were."""
    for name in ("première étape", "次", "a\x85b\n"):
        plan = Plan(**one(name=name))
        assert parse(to_yaml(plan), "here") == plan
        assert (name in to_yaml(plan)) == name.isprintable()


def test_shared_settings_are_written_out() -> None:
    """Two phases with the same schedule object get no YAML anchors."""
    text = to_yaml(ulmfit(resnet_map()))
    assert "&" not in text
    assert "*id" not in text


# ------------------------------------------------------------------ check and explain


def test_check_lists_both_sides() -> None:
    """A plan for another model names what only it has and what only the model has."""
    plan = linear_probe(named_map("stem", "layer4", "fc"))
    with pytest.raises(PlanError) as caught:
        plan.check(named_map("stem", "blocks.0", "head", granularity="blocks"))
    for told in (
        "only the plan has: layer4, fc",
        "only the model has: blocks.0, head",
        "granularity='stages'",
    ):
        assert told in str(caught.value)
    plan.check(named_map("stem", "layer4", "fc"))


def test_check_knows_order_and_parameters() -> None:
    """Same groups in another order, and overrides of unknown parameters, are differences too."""
    layers = named_map("a", "b")
    plan = Plan(
        groups=("b", "a"), phases=(Phase(name="x", rates={"a": 1}, epochs=1, overrides={"a.wieght": 1}),)
    )
    with pytest.raises(PlanError, match=r"(?s)another order.*'a.wieght'.*Did you mean 'a.weight'"):
        plan.check(layers)


def test_explain_tells_the_rates_of_each_phase() -> None:
    """Start, peak and end rates, steps and trainable scalars are those of the formulas."""
    layers = named_map("a", "b", "c", numel=10)
    plan = discriminative(
        layers, decay=0.5, frozen=1, epochs=2, schedule=Schedule(shape="linear", warmup_steps=1)
    )
    told = plan.explain(layers, lr=0.1, steps_per_epoch=4)
    (phase,) = told.phases
    assert (phase.steps, phase.trainable, told.total) == (8, 50, 60)
    rates = {group.name: (group.start, group.peak, group.end) for group in phase.groups}
    assert rates == {
        "b": pytest.approx((0.025, 0.05, 0.05 / 7)),
        "c": pytest.approx((0.05, 0.1, 0.1 / 7)),
    }
    assert told.to_dict()["steps"] == 8
    assert len(told.heat) == 3
    assert set(told.heat[0]) == {0.0}


def test_explain_counts_single_parameters_by_their_size() -> None:
    """Where a pattern trains a part of a group, only its scalars are counted."""
    from layerwise.plans.strategies import pattern

    layers = named_map("a", "b", numel=100)
    groups = tuple(dataclasses.replace(group, sizes=(group.numel - 3, 3)) for group in layers)
    layers = dataclasses.replace(layers, groups=groups)
    assert pattern(layers, train=["bias"]).explain(layers).phases[0].trainable == 6


def test_explain_counts_what_is_drawn_at_a_time() -> None:
    """With LISA the trainable number is that of stem, head and the largest groups that can be drawn."""
    from layerwise.plans.recipes import lisa

    layers = named_map("a", "b", "c", "d", numel=1)  # sizes 1, 2, 3, 4
    assert lisa(layers, groups=1).explain(layers).phases[0].trainable == 1 + 3 + 4


def test_explain_does_not_go_through_every_step() -> None:
    """The peak of one step among 10**17 is found in a moment."""
    layers = named_map("layer", "head")
    schedule = Schedule(shape="one_cycle", cut_frac=0.37)
    told = full(layers, epochs=10**11, schedule=schedule).explain(layers, steps_per_epoch=10**6)
    assert told.phases[0].groups[0].peak == pytest.approx(1.0)


def test_explain_of_a_long_plan_stays_readable() -> None:
    """A row a phase, and the heat map below: lines grow with the groups, not with their square."""
    from layerwise.plans.unfreezing import gradual_unfreezing

    layers = named_map(*(f"layer.{i}" for i in range(40)))
    told = gradual_unfreezing(layers).explain(layers)
    text = str(told)
    assert len(text.splitlines()) < 2 * 40 + 12
    assert re.search(r"2 from layer.38 +.* layer.39 to layer.38 \(2\) +1 +0", text)
    assert re.search(r"40 .* layer.39 to layer.0 \(40\) ", text)
    assert len(told.phases[-1].groups) == 40


def test_explain_of_a_plan_of_many_groups_and_one_phase_shows_their_rates() -> None:
    """A row a group where there is one phase; of very many groups the outermost."""
    from layerwise.plans.strategies import discriminative

    layers = named_map(*(f"layer.{i}" for i in range(50)))
    text = str(discriminative(layers, decay=0.9).explain(layers))
    assert text.count("layer.25 ") == 2  # in the table and in the heat map
    layers = named_map(*(f"layer.{i}" for i in range(100)))
    assert "... 96 between" in str(discriminative(layers, decay=0.9).explain(layers))


def test_explain_names_groups_that_are_not_side_by_side() -> None:
    """Three phases of the first and the last groups: "..." in place of "to"."""
    layers = named_map(*(f"layer.{i}" for i in range(20)))
    rates = {name: 1.0 for i, name in enumerate(layers.names) if i < 8 or i > 11}
    phases = tuple(Phase(name=f"p{i}", rates=rates, epochs=1) for i in range(3))
    plan = Plan(strategy="mine", granularity="stages", groups=layers.names, phases=phases)
    assert "layer.19 ... layer.0 (16)" in str(plan.explain(layers))


def test_explain_prints_a_timeline_and_a_heat_map() -> None:
    """The text names phases, groups and rates, says what was assumed, and shades frozen cells apart."""
    layers = resnet_map()
    text = str(ulmfit(layers).explain(layers))
    lines = text.splitlines()
    assert lines[0] == "ulmfit: 6 phases, 8 epochs, 800 steps"
    assert lines[1] == "  slanted triangular"
    assert re.search(r"1 from fc +1 epoch +60 +28.6% +fc +0.0312 +1 +0.042", text)
    assert "100 steps an epoch (assumed)" in lines[-1]
    assert "; 1 step an epoch; " in str(ulmfit(layers).explain(layers, steps_per_epoch=1))
    stem = next(line for line in lines if re.match(r" +stem +·", line))
    assert set(stem.split()[1]) > {"·", "░"}
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 110


def test_names_of_groups_and_phases_are_no_markup() -> None:
    # Shown letter for letter; a closing tag ended in a traceback.
    layers = named_map("[red]", ":fire:")
    plan = full(layers, epochs=1)
    plan = plan.with_changes(phases=(plan.phases[0].with_changes(name="all [/b]"),))
    told = str(plan.explain(layers))
    assert "all [/b]" in told
    assert told.count("[red]") == told.count(":fire:") == 2  # in the timeline and in the heat map


@pytest.mark.parametrize("count", [8, 40])
def test_explain_is_whole_on_a_narrow_terminal(count: int) -> None:
    """At 80 columns some columns go; no name or figure is cut, and words wrap."""
    import io

    from rich.console import Console

    layers = named_map(*(f"bert.encoder.layer.{i}" for i in range(count)))
    console = Console(file=io.StringIO(), width=80)
    console.print(ulmfit(layers).explain(layers))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "lowest peak" in text if count == 40 else " peak" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [60, 40])
def test_the_heat_map_tells_groups_apart_on_a_narrow_terminal(width: int) -> None:
    """It has fewer columns; of names that are too long the ends stay, which differ."""
    import io

    from rich.console import Console

    layers = named_map(*(f"encoder.layers.encoder_layer_{i}" for i in range(12)))
    console = Console(file=io.StringIO(), width=width)
    console.print(lp_ft(layers).explain(layers))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shown = [line.split()[0] for line in lines if line.endswith("█" * 8)]
    assert [name.rpartition("_")[2] for name in shown] == [str(number) for number in reversed(range(12))]
    assert ["1", "2"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_explain_of_a_long_plan_keeps_the_lengths_of_its_phases_at_80_columns(schedule: Any) -> None:
    """Words wrap before the lengths go, and the way to the rates that have no column is told."""
    import io

    from rich.console import Console

    from layerwise.plans.unfreezing import gradual_unfreezing

    layers = named_map("patch_embed", *(f"blocks.{i}" for i in range(12)), "head")
    plan = gradual_unfreezing(layers, epochs_per_group=7, patience_epochs=2, schedule=schedule)
    console = Console(file=io.StringIO(), width=80)
    console.print(plan.explain(layers))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(re.findall(r"^ \d+ from .* 7 epochs .* head", text, re.MULTILINE)) == 13
    assert max(map(len, text.splitlines())) <= 80
    assert "start and end: --json" in text


@pytest.mark.parametrize("lengths", [[1], [5, 1, 2], [48], [24, 24], [1, 1, 1000], [700, 1, 3], [1] * 60])
def test_columns_of_the_heat_map_begin_at_phases(lengths: list[int]) -> None:
    """At most 48 columns, each of a step at least; every phase begins one, unless there are more phases."""
    edges = _heat_edges(lengths)
    assert edges[0] == 0
    assert edges[-1] == sum(lengths)
    assert all(left < right for left, right in itertools.pairwise(edges))
    assert len(edges) - 1 <= 48
    if len(lengths) <= 48:
        assert set(itertools.accumulate(lengths)) <= set(edges)


def test_numbers_of_phases_do_not_run_together() -> None:
    """Under the heat map each number of a phase has a blank before it."""
    layers = named_map(*(f"layer.{i}" for i in range(18)))
    told = ulmfit(layers).explain(layers)
    numbers = told._axis(told.heat_steps).split()
    assert set(numbers) <= {str(i) for i in range(1, len(told.phases) + 1)}
    assert "10" in numbers


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("schedule: {on: 3}", "the key on at line"),
        ("rates: {8: 1.0}", "put it in quotes: '8'"),
        ("rates: {fc: 1.0, fc: 0.5}", "the key 'fc' stands 2 times"),
        ("rates: {fc: 1.0}\n  rates: {stem: 1.0}", "the key 'rates' stands 2 times"),
        ("rates: {fc: '0'}", "trains nothing"),
    ],
)
def test_keys_that_yaml_reads_otherwise_than_they_look_are_told(text: str, told: str) -> None:
    """YAML takes `on` for true and 8 for a number, and keeps the last of two equal keys."""
    whole = f"groups: [stem, fc]\nphases:\n- name: a\n  epochs: 1\n  {text}\n"
    with pytest.raises(PlanError, match=re.escape(told)):
        parse(whole, "plan.yaml")


@pytest.mark.parametrize(("text", "told"), [("# nothing\n", "it is empty"), ("- a\n", "it holds a list")])
def test_a_file_that_holds_no_mapping_says_what_it_holds(text: str, told: str) -> None:
    """In words, not as a class of Python's."""
    with pytest.raises(PlanError, match=f"is not a plan: {told}; expected a mapping .* Write one"):
        parse(text, "plan.yaml")


@pytest.mark.parametrize("field", [{"samples": 5}, {"momentum": 0.3}])
def test_settings_that_a_norm_policy_does_not_use_are_refused(field: dict[str, Any]) -> None:
    """They would be ignored."""
    with pytest.raises(PlanError, match=f"{next(iter(field))} is .*, which is only for policy 'calibrate'"):
        Norms(policy="freeze", **field)


def test_the_peak_of_a_long_phase_is_told_exactly() -> None:
    """Not the highest of a few hundred steps."""
    plan = Plan(**one(epochs=1, schedule={"shape": "slanted_triangular", "cut_frac": 0.1}))
    told = plan.explain(named_map("stem", "fc"), lr=1.0, steps_per_epoch=1250)
    assert told.phases[0].groups[0].peak == 1.0


@pytest.mark.parametrize("number", [{"lr": -1.0}, {"lr": float("nan")}, {"steps_per_epoch": 0}])
def test_an_explanation_needs_numbers_that_a_run_can_have(number: dict[str, Any]) -> None:
    """Else it would show rates that no run has."""
    with pytest.raises(PlanError, match=f"{next(iter(number))} is"):
        Plan(**one()).explain(named_map("stem", "fc"), **number)


def test_explain_tells_what_is_special_about_each_phase() -> None:
    """A note for each setting that is not the default, in the singular where there is one epoch."""
    from layerwise.plans.explain import explain

    layers = named_map("stem", "body", "head")
    norms = {name: kind for g in layers for name, kind in zip(g.parameters, ("running", "plain"))}
    layers = dataclasses.replace(layers, norms=norms)
    shared = {"epochs": 2, "rates": {"head": 1.0}}
    tuned = "norms of frozen groups learn"
    settings: list[tuple[dict, str | tuple[str, ...]]] = [
        ({"patience_epochs": 1, "epochs": 3}, "ends after 1 epoch without improvement"),
        ({"patience_epochs": 2, "epochs": 4}, "ends after 2 epochs without improvement"),
        ({"patience_epochs": 1}, "too short for a patience of 1 epoch"),
        ({"norms": {"policy": "freeze"}}, "norms: freeze"),
        ({"norms": {"policy": "freeze_until", "until": "head"}}, "norms: freeze_until head"),
        ({"norms": {"policy": "freeze_until", "until": "body"}}, ("norms: freeze_until body", tuned)),
        ({"norms": {"policy": "adapt"}}, ("norms: adapt", tuned)),
        ({"norms": {"policy": "adapt", "rate": 0.1}}, ("norms: adapt, rate 0.1", tuned)),
        ({"norms": {"policy": "adapt", "rate": 0}}, "norms: adapt, rate 0"),
        ({"norms": {"policy": "adapt"}, "rates": dict.fromkeys(layers.names, 1.0)}, "norms: adapt"),
        ({"norms": {"tune": True}}, tuned),
        ({"norms": {"tune": True, "rate": 0.5}}, ("norms: follow, rate 0.5", tuned)),
        (
            {"norms": {"policy": "freeze", "groups": {"body": {"policy": "adapt", "rate": 0.1}}}},
            ("norms: freeze", "norms of body: adapt, rate 0.1", tuned),
        ),
        (
            {"norms": {"groups": {"head": "freeze", "body": {"tune": True}, "stem": "freeze"}}},
            ("norms of stem, head: freeze", "norms of body: follow, tuned", tuned),
        ),
        ({"frozen_dropout": True}, "dropout stays active in frozen groups"),
        ({"l2_sp": 0.25}, "L2-SP 0.25"),
        ({"reinit": ["head"]}, "starts anew: head"),
        ({"adapt_rates": "auto_rgn"}, "rates scaled by relative gradient norm"),
        ({"schedule": {"shape": "cosine", "warmup_frac": 0.1}}, "cosine, warm-up 10%"),
        ({"schedule": {"shape": "cosine", "warmup_frac": 0.004}}, "cosine, warm-up <1%"),
        ({"schedule": {"shape": "one_cycle", "span": "run"}}, "one cycle over the run"),
    ]
    phases = [{"name": f"p{i}", **shared, **changes} for i, (changes, _) in enumerate(settings)]
    plan = Plan(strategy="s", granularity="stages", groups=layers.names, phases=phases)
    told = explain(plan, layers, lr=None, steps_per_epoch=10)
    expected = [notes if isinstance(notes, tuple) else (notes,) for _, notes in settings]
    assert [phase.notes for phase in told.phases] == expected
    text = str(told)
    assert all(note in text for notes in expected for note in notes)


def test_explain_of_a_phase_of_norms_alone_names_no_group() -> None:
    """No group has a rate; the note says that the norms adapt."""
    layers = named_map(*(f"layer.{i}" for i in range(20)))
    all_rates = dict.fromkeys(layers.names, 1.0)
    phases: list[dict] = [{"name": "norms", "rates": {}, "norms": {"policy": "adapt"}, "epochs": 1}]
    phases += [{"name": f"p{i}", "rates": all_rates, "epochs": 1} for i in range(3)]
    plan = Plan(strategy="s", granularity="stages", groups=layers.names, phases=phases)
    text = str(plan.explain(layers))
    assert re.search(r"1 norms +1 epoch +0 +0.0%  none", text)
    assert "norms: adapt" in text


def test_a_share_reads_as_all_only_where_all_learns() -> None:
    """A frozen stem of 1 in 3,003 is seen in the timeline and in the map; the whole reads 100.0%."""
    replace = dataclasses.replace
    layers = named_map("stem", "head")
    sizes = zip(layers.groups, (1, 3002))
    layers = replace(layers, groups=tuple(replace(group, numel=numel) for group, numel in sizes))
    learning: list[dict] = [{"stem": 1.0}, {"head": 1.0}, {"stem": 1.0, "head": 1.0}]
    phases = [{"name": f"p{i}", "rates": rates, "epochs": 1} for i, rates in enumerate(learning)]
    plan = Plan(strategy="s", granularity="stages", groups=layers.names, phases=phases)
    text = str(plan.explain(layers))
    assert re.findall(r"[<>]?\d+\.\d%", text) == ["<0.1%", ">99.9%", "100.0%"]
    assert re.findall(r"[<>]?\d+\.\d%", str(layers)) == ["<0.1%", ">99.9%"]


def test_counts_of_one_are_singular() -> None:
    """One group, one phase, one step: in the title of the map, in the timeline and in the notes."""
    layers = named_map("head")
    assert str(layers).splitlines()[0].endswith(", 1 stage")
    schedule = {"shape": "linear", "warmup_steps": 1}
    phase = {"name": "p", "rates": {"head": 1.0}, "steps": 1, "schedule": schedule}
    text = str(Plan(strategy="s", groups=layers.names, phases=[phase]).explain(layers, steps_per_epoch=1))
    assert text.startswith("s: 1 phase, 1 epoch, 1 step\n")
    assert re.search(r"1 p +1 step ", text)
    assert "warm-up 1 step\n" in text


def test_a_rate_that_is_no_number_is_told_once() -> None:
    """Not also as a phase that trains nothing, which may be untrue."""
    for rates, told in (
        ({"a": "fast"}, "rates.a is 'fast'"),
        (5, "rates is 5"),
        ({"a": 10**400}, "rates.a is"),
    ):
        with pytest.raises(PlanError) as caught:
            Plan(strategy="s", groups=("a",), phases=[{"name": "p", "rates": rates, "epochs": 1}])
        assert told in str(caught.value)
        assert "problems" not in str(caught.value)


def test_a_part_that_two_phases_share_may_be_an_anchor(tmp_path: Path) -> None:
    """YAML's own way of writing a thing once."""
    (tmp_path / "plan.yaml").write_text(
        "groups: [a, b]\nphases:\n"
        "  - {name: one, rates: {b: 1.0}, epochs: 1, schedule: &s {shape: cosine}}\n"
        "  - {name: two, rates: {a: 0.5, b: 1.0}, epochs: 1, schedule: *s}\n"
    )
    assert [phase.schedule.shape for phase in Plan.load(tmp_path / "plan.yaml").phases] == ["cosine"] * 2


def test_aliases_of_aliases_are_told_in_few_words(tmp_path):
    # a file of 600 bytes names a list of 9**9 entries, which no message can hold
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi")]
    (tmp_path / "plan.yaml").write_text("\n".join([*lines, "groups: *i", "phases: *i", ""]))
    with pytest.raises(PlanError, match=r"groups\[0\] is \[\[\[") as caught:
        Plan.load(tmp_path / "plan.yaml")
    assert len(str(caught.value)) < 100_000


def test_a_printed_plan_is_its_file(tmp_path: Path) -> None:
    """Not every default of every phase in one line of a thousand characters."""
    plan = Plan.model_validate(one())
    plan.save(tmp_path / "plan.yaml")
    assert str(plan) == (tmp_path / "plan.yaml").read_text()
