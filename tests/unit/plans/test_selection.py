"""Groups by names and ranges, parameters by patterns."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import named_map, resnet_map
from layerwise.errors import PlanError
from layerwise.plans.selection import match_names, select_groups

NAMES = [
    "conv1.weight",
    "layer1.0.bn1.weight",
    "layer1.0.bn1.bias",
    "layer1.0.subnet.weight",
    "layer1.0.bn.weight",
    "encoder.layer.1.fc.bias",
    "encoder.layer.11.fc.bias",
    "fc.weight",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("bn", ["layer1.0.bn.weight"]),
        ("bn*", ["layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.bn.weight"]),
        ("bn?.bias", ["layer1.0.bn1.bias"]),
        ("*.bias", ["layer1.0.bn1.bias", "encoder.layer.1.fc.bias", "encoder.layer.11.fc.bias"]),
        ("layer.1", ["encoder.layer.1.fc.bias"]),
        ("fc", ["encoder.layer.1.fc.bias", "encoder.layer.11.fc.bias", "fc.weight"]),
        ("*.fc.*", ["encoder.layer.1.fc.bias", "encoder.layer.11.fc.bias"]),
        ("fc*", ["encoder.layer.1.fc.bias", "encoder.layer.11.fc.bias", "fc.weight"]),
        ("fc.weight", ["fc.weight"]),
        ("1.fc", ["encoder.layer.1.fc.bias"]),
        ("conv1.weight", ["conv1.weight"]),
        ("re:^fc", ["fc.weight"]),
        ("re:bn[0-9]", ["layer1.0.bn1.weight", "layer1.0.bn1.bias"]),
        (
            "layer[12]",
            ["layer1.0.bn1.weight", "layer1.0.bn1.bias", "layer1.0.subnet.weight", "layer1.0.bn.weight"],
        ),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    """Words match whole components, full names themselves, globs components or whole names, re: anywhere."""
    assert match_names([pattern], NAMES) == expected


def test_patterns_that_match_nothing_are_told_together_with_close_names() -> None:
    """Each unmatched pattern and each broken expression is named, with what it may have meant."""
    with pytest.raises(PlanError) as caught:
        match_names(["bm1", "fc", "re:(", "qqqq"], NAMES)
    message = str(caught.value)
    assert "'bm1' matches no parameter. Did you mean 'bn1'" in message
    assert "'re:(' is not a regular expression: missing ), unterminated subpattern at position 0." in message
    assert (
        "'qqqq' matches no parameter. There are, for example: conv1.weight, layer1.0.bn1.weight, " in message
    )
    assert "'fc' matches" not in message


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("layer2", ["layer2"]),
        ("head", ["fc"]),
        ("stem", ["stem"]),
        ("layer3:", ["layer3", "layer4", "fc"]),
        (":layer1", ["stem", "layer1"]),
        ("layer1:layer3", ["layer1", "layer2", "layer3"]),
        (":", ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]),
        (2, ["stem", "layer1"]),
        (-2, ["layer4", "fc"]),
        (["fc", "layer1", "fc"], ["layer1", "fc"]),
        (["layer4:", 1], ["stem", "layer4", "fc"]),
    ],
)
def test_groups(selection: Any, expected: list[str]) -> None:
    """Names, aliases, ranges with both ends, counts from either end; in order, each once."""
    assert select_groups(resnet_map(), selection) == expected


def test_a_module_path_selects_all_groups_inside_it() -> None:
    """At a finer granularity a stage's name means its blocks, at the ends of a range too."""
    layers = named_map("stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc", granularity="blocks")
    assert select_groups(layers, "layer1") == ["layer1.0", "layer1.1"]
    assert select_groups(layers, "layer1:layer2") == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert select_groups(layers, ":layer1") == ["stem", "layer1.0", "layer1.1"]


@pytest.mark.parametrize(
    ("selection", "told"),
    [
        ("layer9", "'layer9' is not in this layer map .* Did you mean"),
        ("layer9:", "'layer9' is not in this layer map"),
        ("layer3:layer1", "runs from output to input .* write it as 'layer1:layer3'"),
        (0, "0 groups are asked for; this layer map has 6"),
        (-9, "-9 groups are asked for"),
        ([], "no group is selected"),
    ],
)
def test_wrong_selections_are_told(selection: Any, told: str) -> None:
    """Unknown names, backward ranges and impossible counts are errors with the way out."""
    with pytest.raises(PlanError, match=told):
        select_groups(resnet_map(), selection)
