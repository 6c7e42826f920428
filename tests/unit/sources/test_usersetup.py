"""The parts of a set-up are told apart by what they are."""

import pytest
from torch import nn, optim

from layerwise.errors import ModelError, PlanError
from layerwise.sources.usersetup import call_setup

SCRIPT = """
import torch
from torch import nn

def several():
    model = nn.Linear(2, 2)
    one, two = torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)
    return [[1, 2]], two, torch.optim.lr_scheduler.StepLR(one, 1), model, one

def alone():
    return nn.Linear(2, 2)

def two_models():
    return nn.Linear(2, 2), nn.Linear(2, 2)

def text():
    return nn.Linear(2, 2), "adam"

def nothing():
    return 3

def misnamed():
    return {"model": alone(), "optimiser": None}

def broken():
    raise KeyError("oops")

def leaves():
    raise SystemExit(0)

def named():
    return {"model": alone(), "loader": [[1, 2]]}

def without_model():
    return {"loader": [[1, 2]]}

def ours():
    from layerwise.errors import PlanError
    raise PlanError("no such group")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "user_setup_script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_parts_in_any_order_and_number(script):
    parts = call_setup(f"{script}:several")
    assert isinstance(parts["model"], nn.Linear)
    assert [type(optimizer) for optimizer in parts["optimizer"]] == [optim.SGD, optim.SGD]
    assert len(parts["scheduler"]) == 1
    assert parts["loader"] == [[1, 2]]


def test_a_model_alone_is_enough(script):
    parts = call_setup(f"{script}:alone")
    assert isinstance(parts.pop("model"), nn.Linear)
    assert set(parts.values()) == {None}


def test_a_mapping_names_the_parts(script):
    parts = call_setup(f"{script}:named")
    assert isinstance(parts["model"], nn.Linear)
    assert (parts["loader"], parts["optimizer"]) == ([[1, 2]], None)


def test_layerwises_own_errors_stay_what_they_are(script):
    # they say what to do already
    with pytest.raises(PlanError, match=r"^no such group$"):
        call_setup(f"{script}:ours")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("two_models", "several models"),
        ("text", "a str"),
        ("nothing", "an int"),
        ("misnamed", "Did you mean 'optimizer'"),
        ("broken", "raised KeyError"),
        ("leaves", "raised SystemExit: 0"),
        ("without_model", r"returned no nn\.Module \(it returned a dict\)"),
        ("", "names no function"),
        ("brokn", "Did you mean 'broken'"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(script, function, message):
    with pytest.raises(ModelError, match=message):
        call_setup(f"{script}:{function}" if function else "script.py")
