"""``layerwise inspect`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from forked import Forked, layerwise
from layerwise.layers.layermap import LayerMap
from tiny_text import save_tiny

OWN_MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""


GREY_MODEL = """
from torch import nn

def known():
    return build(), dict(crop=(28, 28), resize=28, mean=(0.5,), std=(0.5,))

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 24, 3))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return Forked(layerwise, *arguments).finish()


def test_table_of_a_timm_model() -> None:
    # every group in one row, input first
    result = run("inspect", "timm:tf_efficientnet_lite0", "--granularity", "stages")
    assert result.returncode == 0, result.stderr
    first = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    names = ["conv_stem", *(f"blocks.{number}" for number in range(7)), "conv_head", "classifier"]
    assert [word for word in first if word in names] == names
    assert "note: example input: 1x3x224x224" in result.stdout  # what its costs are the costs of


def test_json_of_an_own_model(tmp_path: Path) -> None:
    # the document is the map: groups with depth, parameters and costs
    file = tmp_path / "own.py"
    file.write_text(OWN_MODEL)
    result = run("inspect", f"{file}:build", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert [(group["name"], group["depth"]) for group in data["groups"]] == [("0", 1), ("2", 0)]
    assert data["groups"][1]["trainable"] == data["groups"][1]["numel"] == 18
    assert data["outputs"] == ["2"]
    assert LayerMap.from_dict(data).names == ("0", "2")  # and can be read as one


def test_an_own_model_of_small_grey_images(tmp_path: Path) -> None:
    # the preprocessing that the function returns says the size, and so does an option; the error says how
    file = tmp_path / "mein netz ü.py"
    file.write_text(GREY_MODEL)
    for arguments in (["known"], ["known", "--input-size", "28"], ["build", "--input-size", "28"]):
        result = run("inspect", f"{file}:{arguments[0]}", *arguments[1:])
        assert result.returncode == 0, result.stderr
        assert "note: example input: 1x1x28x28" in result.stdout
    result = run("inspect", f"{file}:build")
    assert result.returncode == 1
    assert "return a pair of the model and its Preprocessing" in result.stderr


def test_plan_maps_an_own_model_as_inspect_does(tmp_path: Path) -> None:
    # a network that takes no images has a plan too
    file = tmp_path / "own.py"
    file.write_text(OWN_MODEL)
    result = run("plan", f"{file}:build", "--strategy", "linear_probe", "--json")
    assert result.returncode == 0, result.stderr
    assert '"2"' in result.stdout


def test_a_size_for_a_model_of_texts_is_told_to_be_in_vain(tmp_path: Path) -> None:
    # fit says the same; the map is printed all the same
    result = run("inspect", f"hf:{save_tiny(tmp_path)}", "--input-size", "64")
    assert result.returncode == 0, result.stderr
    assert f"--input-size is for images; hf:{tmp_path} reads texts, so it is not used" in result.stderr


def test_unknown_model() -> None:
    # one message with the closest name, no traceback
    result = run("inspect", "timm:resnet5o")
    assert result.returncode == 1
    assert "resnet50" in result.stderr
    assert "Traceback" not in result.stderr
