"""The decision matrix and what overrules it, on evidence made by hand."""

import dataclasses
import itertools

import pytest

from layerwise.choosing.advice import advice_from
from layerwise.choosing.choice import BODY_RATE, HEAD_RATE, Choice
from layerwise.choosing.decide import PLAIN_RATE, decide
from layerwise.choosing.depths import DepthScores, Transferability
from layerwise.choosing.distances import Estimate
from layerwise.choosing.evidence import Evidence, Weighting, chance_of, similarity, thresholds
from layerwise.choosing.matrix import default_epochs, matrix_cell, size_of
from layerwise.choosing.shift_result import GroupShift, InputShift, Shift
from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.plans.settings import Norms

LEVELS = ("similar", "somewhat", "dissimilar", "unknown")
SIZES = (300, 3_000, 30_000, 300_000)


def layers_of(groups=6):
    names = [f"g{i}" for i in range(groups - 1)] + ["fc"]
    return LayerMap(
        tuple(LayerGroup(n, "head" if n == "fc" else "trunk", (n,), (f"{n}.weight",), 10) for n in names),
        "stages",
        outputs=("fc",),
    )


def transfer(*probes):
    depths = tuple(
        DepthScores(f"g{i}" if i < len(probes) - 1 else "fc", len(probes) - 1 - i, 0, 0, 0, p, p)
        for i, p in enumerate(probes)
    )
    return Transferability(depths, 400, 4, 0.25, None)


def shift_of(value, *, where="throughout", share=0.5, width=0.01, inputs=()):
    estimate = Estimate(value, value - width, value + width)
    groups = (GroupShift("g0", 5, norms=estimate), GroupShift("g1", 4, norms=estimate))
    return Shift("norms", groups, estimate, estimate, estimate, where, share, inputs, None, 400, 400, 0.9)


def evidence(**changes):
    given = {
        "samples": 300,
        "classes": 4,
        "imbalance": 1.2,
        "batch_size": 32,
        "pretraining": "supervised",
        "has_batchnorm": True,
        "level": "similar",
        "level_confidence": "high",
        "shift": shift_of(0.01),
        "transfer": transfer(0.5, 0.6, 0.7, 0.75, 0.8, 0.8),
        "measured": 400,
    }
    return Evidence(**{**given, **changes})


def test_sizes_at_their_boundaries():
    # 1,000 is no longer small; 100,000 still belongs to the row before the last
    assert [size_of(n) for n in (1, 999, 1000, 9_999, 10_000, 100_000, 100_001)] == [
        "< 1K", "< 1K", "1K-10K", "1K-10K", "10K-100K", "10K-100K", "> 100K",
    ]  # fmt: skip
    assert [default_epochs(n) for n in SIZES] == [20, 10, 5, 3]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("similar", ["linear_probe", "top_k(k=3)", "top_k(k=3)", "discriminative(decay=0.9)"]),
        (
            "somewhat",
            ["top_k(k=3)", "gradual_unfreezing(decay=0.9)", "top_k(k=4)", "discriminative(decay=0.9)"],
        ),
        ("dissimilar", ["linear_probe", "gradual_unfreezing(decay=0.9)", "top_k(k=5)", "full"]),
    ],
)
def test_the_matrix(level, expected):
    # the table of the design, row by row, for a model of six groups
    cells = [matrix_cell(evidence(level=level, samples=n), layers_of()) for n in SIZES]
    assert [cell.strategy for cell in cells] == expected
    calibrates = [cell.options.get("norms") is not None for cell in cells]
    assert calibrates == [level == "dissimilar", False, False, False]
    assert (cells[1].options.get("l2_sp", 0) > 0) == (level == "dissimilar")


@pytest.mark.parametrize("groups", [2, 3, 6, 14])
def test_every_cell_and_every_decision_is_a_working_plan(groups):
    # whatever the level, size, pretraining, batch size and depth profile: a plan that fits the map
    layers = layers_of(groups)
    profiles = [transfer(*[0.5] * groups), transfer(*[0.9] * (groups - 1), 0.4), transfer(*[0.99] * groups)]
    for level, n, profile, batch, where, epochs in itertools.product(
        LEVELS, SIZES, profiles, (4, 32), ("early", "late"), (1, 2, 8)
    ):
        found = evidence(
            level=level,
            samples=n,
            transfer=profile,
            batch_size=batch,
            shift=None if level == "unknown" else shift_of(0.3, where=where, share=0.7),
        )
        cell = matrix_cell(found, layers, epochs=epochs).plan(layers, epochs=epochs)
        decision = decide(found, layers, epochs=epochs)
        plans = [cell, *(c.plan(layers, epochs=epochs) for c in (decision.choice, *decision.alternatives))]
        assert all(plan.groups == layers.names for plan in plans)
        assert all(plan.total_epochs(10) == epochs for plan in plans)
        assert decision.choice.strategy not in [a.strategy for a in decision.alternatives]
        assert len(decision.reasons) >= 2


def test_saturated_features_get_a_linear_probe():
    # whatever the matrix says: nothing is left to gain
    decision = decide(evidence(samples=3000, level="somewhat", transfer=transfer(*[0.98] * 6)), layers_of())
    assert decision.choice.strategy == "linear_probe"
    assert decision.choice.lr == HEAD_RATE


def test_dissimilar_with_better_features_in_the_middle_gets_full_fine_tuning():
    # g2 beats the end by far more than three standard errors
    found = evidence(level="dissimilar", transfer=transfer(0.5, 0.7, 0.9, 0.8, 0.7, 0.6))
    decision = decide(found, layers_of())
    assert decision.choice.strategy == "full"
    assert decision.cell == "linear_probe"
    reason = next(r for r in decision.reasons if r.about == "depth")
    assert reason.figure == pytest.approx(0.3)
    assert "g2" in reason.text
    assert reason.confidence == "high"


def test_similar_with_better_features_in_the_middle_trains_the_groups_after_it():
    # the same profile on similar images: only what comes after g2
    found = evidence(level="similar", transfer=transfer(0.5, 0.7, 0.9, 0.8, 0.7, 0.6))
    assert decide(found, layers_of()).choice.strategy == "top_k(k=3)"


def test_a_gap_within_noise_changes_nothing():
    # one percent more in the middle on 400 samples is no evidence
    found = evidence(transfer=transfer(0.5, 0.6, 0.7, 0.81, 0.8, 0.8))
    assert decide(found, layers_of()).choice.strategy == "linear_probe"


def test_shift_in_the_first_groups_tunes_the_first_groups():
    # surgical fine-tuning, and the reason names what moved; similar images are left alone
    moved = (InputShift("contrast", 0.1, 0.5, Estimate(-2.0, -2.2, -1.8)),)
    early = shift_of(0.2, where="early", share=0.8, inputs=moved)
    decision = decide(evidence(level="somewhat", shift=early), layers_of())
    assert decision.choice.strategy == "surgical(which=first)"
    assert any("contrast -2.0 sd" in r.text and "80%" in r.text for r in decision.reasons)
    assert decide(evidence(level="similar", shift=early), layers_of()).choice.strategy == "linear_probe"
    plan = decision.choice.plan(layers_of(), epochs=3)
    assert [name for name, rate in plan.phases[0].rates.items() if rate] == ["g0", "g1", "fc"]


@pytest.mark.parametrize(("after", "policy"), [(0.9, "calibrate"), (0.7, None)])
def test_recalibration_is_used_only_where_it_helps(after, policy):
    # the same cell with the probe gaining ten points and losing ten
    found = evidence(level="dissimilar", recalibrated=transfer(*[after] * 6))
    decision = decide(found, layers_of())
    norms = decision.choice.options.get("norms")
    assert (norms.policy if norms else None) == policy
    assert decision.reasons[1].text.endswith("the matrix says linear_probe with recalibrated batch-norm")
    described = [c.described for c in (decision.choice, *decision.alternatives)]
    assert ("linear_probe with recalibrated batch-norm" in described) == (policy is not None)
    # the adaptation that was tried and lost is nowhere advised
    assert any("adapt the statistics" in c.why for c in (decision.choice, *decision.alternatives)) == (
        policy is not None
    )
    assert any(r.about == "batch-norm" and r.figure == pytest.approx(after - 0.8) for r in decision.reasons)


def test_options_of_a_choice_are_told_in_words():
    # what a strategy's name leaves out: batch-norm and the pull towards the pretrained weights
    options = {"norms": Norms(policy="freeze"), "l2_sp": 0.01}
    assert Choice("full", "", options).described == "full with frozen batch-norm and L2-SP 0.01"
    assert Choice("full", "").described == "full"


def test_small_batches_freeze_the_statistics():
    # below 16 samples a batch, where batch-norm trains at all
    found = evidence(samples=3000, batch_size=8)
    assert decide(found, layers_of()).choice.options["norms"].policy == "freeze"
    assert "norms" not in decide(evidence(samples=3000), layers_of()).choice.options
    assert (
        "norms"
        not in decide(evidence(samples=3000, batch_size=8, has_batchnorm=False), layers_of()).choice.options
    )


def test_pretraining_sets_the_decay():
    # published: more decay after self-supervised pretraining
    found = evidence(samples=200_000, pretraining="self_supervised")
    decision = decide(found, layers_of())
    assert decision.choice.strategy == "discriminative(decay=0.75)"
    assert any(r.about == "pretraining" for r in decision.reasons)


def test_gradual_unfreezing_needs_steps():
    # 1,000 samples for 10 epochs are 320 steps of 32 for six groups: too few; 5,000 samples are enough
    few, enough = (decide(evidence(samples=n, level="somewhat"), layers_of()) for n in (1_000, 5_000))
    assert few.cell == enough.cell == "gradual_unfreezing(decay=0.9)"
    assert few.choice.strategy == "top_k(k=3)"
    assert next(r for r in few.reasons if r.about == "length").figure == 320
    assert enough.choice.strategy == "gradual_unfreezing(decay=0.9)"


def test_imbalance_is_a_reason():
    # five to one: balanced accuracy is to be looked at
    assert any(r.about == "classes" for r in decide(evidence(imbalance=5.0), layers_of()).reasons)
    assert not any(r.about == "classes" for r in decide(evidence(imbalance=1.5), layers_of()).reasons)


@pytest.mark.parametrize(
    ("balanced", "accuracy", "weighted", "says"),
    [
        (0.05, 0.0, True, "weight the classes (class_weights='balanced')"),
        (0.05, -0.04, False, "take class_weights='balanced' if a rare class"),
        (0.02, -0.05, False, "bring nothing clear"),
    ],
)
def test_class_weights_are_advised_where_they_cost_nothing(balanced, accuracy, weighted, says):
    # both figures are told; a trade of accuracy for balanced accuracy is left to the user
    found = evidence(imbalance=5.0, weighting=Weighting(balanced, accuracy, 0.02, 0.02))
    assert found.weighted == weighted
    reason = next(r for r in decide(found, layers_of()).reasons if r.about == "classes")
    assert f"{100 * balanced:+.1f} points of balanced accuracy" in reason.text
    assert f"{100 * accuracy:+.1f} points of accuracy" in reason.text
    assert says in reason.text
    options = advice_from(found, layers_of()).fit_options
    assert options == ({"class_weights": "balanced"} if weighted else {})
    assert not evidence(imbalance=1.5, weighting=Weighting(0.1, 0.0, 0.02, 0.02)).weighted


def test_class_weights_that_could_not_be_tried_are_not_advised():
    found = evidence(imbalance=50.0, weighting=None)
    assert not found.weighted
    assert any("a class of one sample" in r.text for r in decide(found, layers_of()).reasons)


def test_uneven_counts_that_may_be_luck_are_no_reason():
    # 100 samples of ten equally frequent classes easily are 4 of one and 13 of another
    lucky = evidence(imbalance=3.2, imbalance_p=chance_of([4, 13, *[10] * 8, 3]))
    assert not lucky.imbalanced
    assert not any(r.about == "classes" for r in decide(lucky, layers_of()).reasons)
    assert evidence(imbalance=3.2, imbalance_p=chance_of([40, 130])).imbalanced


def test_networks_without_batchnorm_get_a_lower_rate_the_wider_they_are():
    # MiniLM's width is the reference; BERT-base is twice as wide; the head's own rate is not touched
    plain = {"has_batchnorm": False, "level": "unknown", "shift": None}
    assert decide(evidence(**plain, width=384), layers_of()).choice.lr == PLAIN_RATE
    found = decide(evidence(**plain, width=768), layers_of())
    assert found.choice.lr == PLAIN_RATE / 2
    rates = {a.strategy: a.lr for a in found.alternatives}
    assert rates["linear_probe"] == HEAD_RATE
    assert rates["full"] == PLAIN_RATE / 2
    assert decide(evidence(level="somewhat"), layers_of()).choice.lr == BODY_RATE


@pytest.mark.parametrize(
    ("lead", "level", "strategy"),
    [
        (1.0, "dissimilar", "top_k(k=3)"),
        (2.0, "dissimilar", "top_k(k=6)"),
        (2.0, "unknown", "top_k(k=6)"),
        (2.0, "somewhat", "top_k(k=3)"),
        (3.0, "dissimilar", "full"),
    ],
)
def test_a_lead_of_the_middle_widens_the_last_three_groups(lead, level, strategy):
    # ten groups; the best probe stands four before the head
    probes = transfer(0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.65, 0.6, 0.6, 0.6)
    depths = tuple(dataclasses.replace(d, lead=lead if d.depth == 4 else 0.0) for d in probes.depths)
    found = evidence(
        level=level, shift=None if level == "unknown" else shift_of(1.0), recalibrated=transfer(*[0.4] * 10),
        transfer=dataclasses.replace(probes, depths=depths),
    )  # fmt: skip
    assert decide(found, layers_of(10)).choice.strategy == strategy


def test_the_lead_of_a_depth_is_asked_of_the_same_samples():
    # 12 samples apart of 100: 1.5 errors for independent samples, 2.8 where hardly any go the other way
    probes = (0.5, 0.88, 0.86, 0.80)
    apart = transfer(*probes)
    paired = dataclasses.replace(
        apart,
        depths=tuple(dataclasses.replace(d, lead=lead) for d, lead in zip(apart.depths, (-5, 2.8, 2.5, 0))),
    )
    assert evidence(transfer=apart, measured=100).gap_errors < 2
    assert evidence(transfer=paired, measured=100).gap_errors == 2.8


def test_unknown_similarity_lowers_the_confidence():
    # nothing to compare with: the reason carries the note, the confidence is low
    found = evidence(level="unknown", level_confidence="low", shift=None, unknown="no batch-norm")
    decision = decide(found, layers_of())
    assert decision.confidence == "low"
    assert "no batch-norm" in decision.reasons[0].text
    assert decision.choice.why == "few samples, similarity unknown: only the last groups"


def test_similarity_by_the_calibrated_thresholds():
    # below, between and above the two stored thresholds; an interval across one is not sure
    limits = thresholds()["norms"]
    high, low = limits["high"], limits["low"]
    assert 0 < high < low
    assert similarity(shift_of(high / 3, width=0)) == ("similar", "high")
    assert similarity(shift_of((high + low) / 2, width=0))[0] == "somewhat"
    assert similarity(shift_of(3 * low, width=0)) == ("dissimilar", "high")
    assert similarity(shift_of(high * 1.01, width=high * 0.1)) == ("somewhat", "low")
    source = dataclasses.replace(shift_of(1e6, width=0), method="source")
    assert similarity(source)[0] == "dissimilar"
