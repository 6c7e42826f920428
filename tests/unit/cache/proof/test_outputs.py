"""A replay whose output, or whose backward pass, is another than the plain model's is not used."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_loops import both, images
from layerwise.cache.proof.outputs import Flow, difference


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([torch.ones(2), torch.ones(3)], ""),
        ([torch.ones(2)], "2 tensors in its output, and 1 in the plain one"),
        ([torch.ones(2), torch.ones(4)], r"output 1 is \(3,\) torch.float32, not \(4,\) torch.float32"),
        ([torch.ones(2).double(), torch.ones(3)], "output 0 is .* not .* torch.float64"),
        ([torch.ones(2), torch.ones(3) * 1.5], "output 1 differs by up to 0.5"),
    ],
)
def test_what_differs_is_told(found, says) -> None:
    expected = [torch.ones(2), torch.ones(3)]
    assert re.fullmatch(says, difference(expected, {"maps": found}))


def test_gradients_that_reach_other_parameters() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = torch.ones(1, 2)
    flow = Flow.of(other(one(x)))
    assert flow.difference(other(one(x))) == ""
    assert flow.difference(other(x)) == "gradients reach 4 parameters, and 2 in the plain one"


class Checkpointed(nn.Module):
    """A frozen body, a frozen branch, a neck and a head that learn; what is run again differs."""

    def __init__(self, run: Callable[[Checkpointed, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.branch = nn.Linear(192, 8), nn.Linear(192, 8)
        self.neck, self.head, self.run = nn.Linear(8, 8), nn.Linear(8, 4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x.flatten(1))


def apart(model: Checkpointed, x: Tensor, reentrant: bool) -> Tensor:
    features = checkpoint(model.body, x, use_reentrant=reentrant)
    return checkpoint(model.head, model.neck(features), use_reentrant=reentrant)


def together(model: Checkpointed, x: Tensor) -> Tensor:
    return checkpoint(lambda x: model.head(model.neck(model.body(x))), x, use_reentrant=False)


def with_one_that_learns(model: Checkpointed, x: Tensor) -> Tensor:
    return model.head(checkpoint(lambda x: model.neck(model.body(x)), x, use_reentrant=False))


def with_a_branch(model: Checkpointed, x: Tensor) -> Tensor:
    mixed = checkpoint(lambda h, x: h * model.branch(x), model.neck(model.body(x)), x, use_reentrant=True)
    return model.head(mixed)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_of_their_own(reentrant) -> None:
    text = both(lambda: Checkpointed(lambda m, x: apart(m, x, reentrant)), images, "neck", "head").text
    assert "memory, cut at body" in text


@pytest.mark.parametrize("run", [together, with_one_that_learns, with_a_branch])
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_frozen_and_learning_layers_in_one_checkpoint(run) -> None:
    # they run again in the backward pass, when nothing is skipped
    text = both(lambda: Checkpointed(run), images, "neck", "head").text
    assert "off: gradient checkpointing runs frozen and learning layers together" in text
