"""What all tasks share: how a batch and an output are read, and which way a monitor is better."""

import pytest
import torch
from torch import nn

from layerwise.errors import DataError
from layerwise.training.classification import Classification
from layerwise.training.known_tasks import task_from_dict
from layerwise.training.tasks import run_model, split_batch
from layerwise.training.text_tasks import MultiLabel, Regression
from layerwise.training.token_tasks import LanguageModelling, TokenClassification

CLASSES = ("ant", "bee", "cat")


def test_the_loss_is_better_when_it_is_lower() -> None:
    # A monitor that can only be meant one way brings its mode along, in every task and from JSON.
    for task in (Classification(CLASSES, monitor="loss"), MultiLabel(CLASSES, monitor="loss")):
        assert task.mode == task_from_dict(task.to_dict()).mode == "min"
    assert Regression(monitor="r2").mode == "max"
    assert LanguageModelling(monitor="token_accuracy").mode == "max"
    assert Classification(CLASSES, monitor="accuracy").mode == "max"


def test_batches_and_outputs_of_many_kinds_are_understood() -> None:
    # Positional and keyword inputs; tensors, mappings and objects with logits; the rest is an error.
    assert split_batch({"x": 1, "labels": 2}) == ((), {"x": 1}, 2)
    with pytest.raises(DataError, match="has no 'labels'"):
        split_batch({"x": 1})
    with pytest.raises(DataError, match="tuple of 3"):
        split_batch((1, 2, 3))

    class Returns(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(x)

    x = torch.ones(2, 3)
    for wrap in (lambda t: t, lambda t: {"logits": t}, lambda t: (t, None)):
        assert torch.equal(run_model(Returns(wrap), (x, None)), x)
    with pytest.raises(DataError, match="returned a str"):
        run_model(Returns(lambda t: "no"), (x, None))
    with pytest.raises(DataError, match=r"returned one number.*one row a sample"):
        run_model(Returns(lambda t: t.sum()), (x, None))  # its loss, mostly


@pytest.mark.parametrize("kind", [Classification, MultiLabel, TokenClassification, Regression])
def test_two_outputs_of_one_name_are_refused(kind) -> None:
    # By name a prediction has room for one of them: the other's probability was lost.
    with pytest.raises(DataError, match="'bee' names outputs 0 and 2; expected a name of its own for each"):
        kind(("bee", "ant", "bee")).check(torch.zeros(2, 3), {"labels": torch.zeros(2, 3).long()})


def test_keys_that_the_model_does_not_take_are_told_with_those_that_it_takes() -> None:
    # A data set of somebody's own has paths and ids in its samples; a bare TypeError named one of them.
    class Takes(nn.Module):
        def forward(self, pixels: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return pixels * torch.as_tensor(scale + None if scale == 2.0 else scale)

    batch = {"image": torch.zeros(2, 3), "path": ["a", "b"], "labels": torch.zeros(2)}
    with pytest.raises(DataError, match=r"'image', 'path', which Takes.forward .*takes pixels, scale.*task"):
        run_model(Takes(), batch)
    with pytest.raises(TypeError, match="unsupported operand"):  # an error of the model's own is its own
        run_model(Takes(), {"pixels": torch.zeros(2, 3), "scale": 2.0, "labels": None})
