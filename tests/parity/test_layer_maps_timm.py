"""Layer maps against timm's own groups, classifiers and first convolutions."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

from benchmarks import oracles

SAMPLE = [
    "convnext_atto",
    "cs3darknet_s",  # stages that are no chains, opened into their blocks
    "densenet121",
    "dla46_c",  # trees inside trees
    "gcvit_xxtiny",  # a side branch in each stage
    "ghostnet_050",
    "mobilenetv3_small_050",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
]

# Parameters that timm's own groups place by where they are registered, not by where they are needed; see
# docs/guide/layer-maps.md.
KNOWN_ORDER = {
    "cait": "the class token enters after the last of the image's blocks",
    "convit": "the class token enters before the last blocks",
    "efficientvim": "norms of each stage's head are needed at that stage",
    "vit_srelpos": "the shared table is needed first inside the first block",
    "volo": "class token and positions enter at the second stage",
    "xcit": "the class token enters after the last of the image's blocks",
}


def _check(name: str) -> None:
    verdict = oracles.judge_timm(name)
    assert not verdict.error
    assert verdict.complete
    assert verdict.head is not False
    assert verdict.first is not False
    if not name.startswith(tuple(KNOWN_ORDER)):
        assert verdict.discordant == 0, verdict.worst


@pytest.mark.parametrize("name", SAMPLE)
def test_map_agrees_with_timm(name: str) -> None:
    # complete, no pair of parameters the other way round, timm's classifier, first convolution first
    _check(name)


def test_the_comparison_can_fail() -> None:
    # an order turned round is discordant in every pair; the same group is not
    assert oracles.disorder({"a": 0, "b": 1, "c": 2}, {"a": 2, "b": 1, "c": 0}) == (3, 3)
    assert oracles.disorder({"a": 0, "b": 0, "c": 2}, {"a": 1, "b": 0, "c": 2}) == (0, 3)
    assert set(oracles.culprits({"a": 1, "b": 0}, {"a": 0, "b": 1})) == {"a", "b"}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("densenet121", 58), ("cspdarknet53", 23), ("dla34", 12)],
)
def test_networks_that_are_no_chains_are_not_too_coarse(name: str, blocks: int) -> None:
    # dense layers, blocks of cross-stage-partial stages and of aggregation trees are groups of their own
    verdict = oracles.judge_timm(name)
    assert verdict.layers is not None
    assert sum(group.role == "trunk" for group in verdict.layers) == blocks


@pytest.mark.slow
def test_all_families() -> None:
    # the whole sweep: what issue 3 asks for
    names = oracles.timm_names()
    verdicts = [oracles.judge_timm(name) for name in names]
    assert len(names) >= 330
    unexplained = [v.name for v in verdicts if v.discordant and not v.name.startswith(tuple(KNOWN_ORDER))]
    assert unexplained == []
    assert [v.name for v in verdicts if v.error or not v.complete] == []
    families = {oracles.timm_family(v.name) for v in verdicts if v.pairs}
    disordered = {oracles.timm_family(v.name) for v in verdicts if v.discordant}
    assert len(disordered) <= 0.04 * len(families)
    heads = [v.head for v in verdicts if v.head is not None]
    assert sum(heads) >= 0.99 * len(heads)
    firsts = [v.first for v in verdicts if v.first is not None]
    assert sum(firsts) >= 0.99 * len(firsts)
