"""A replay whose output, or whose backward pass, is another than the plain model's is not used."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_loops import both, images, off
from layerwise.cache.proof.outputs import Result


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([torch.ones(2), torch.ones(3)], ""),
        ([torch.ones(2)], "2 tensors in its output, and 1 in the plain one"),
        ([torch.ones(2), torch.ones(4)], r"output 1 is \(3,\) torch.float32, not \(4,\) torch.float32"),
        ([torch.ones(2).double(), torch.ones(3)], "output 0 is .* not .* torch.float64"),
        ([torch.ones(2), torch.ones(3) * 1.5], "output 1 differs by up to 0.5"),
        ((torch.ones(2), torch.ones(3)), "its output holds list of 2, and the plain one tuple of 2"),
        ([torch.ones(2), torch.ones(3), 1], "its output holds list of 2, and the plain one list of 3"),
    ],
)
def test_what_differs_is_told(found, says) -> None:
    expected = Result.of({"maps": [torch.ones(2), torch.ones(3)]})
    assert re.fullmatch(says, expected.difference({"maps": found}))


class Held:
    """An object without an equality of its own."""

    def __init__(self, *held: Any) -> None:
        self.held, self.within = held, SimpleNamespace(held=held)


class Kind(Enum):
    ONE, OTHER = 1, 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, True), (0.0, -0.0), ("a", "b"), (None, 0), (torch.float32, torch.float64),
        (Kind.ONE, Kind.OTHER), ({"a": 1}, {"b": 1}), ({"a": 1, "b": 1}, {"b": 1, "a": 1}), ({1, 2}, {1, 3}),
        ([1, [2]], [1, 2]), (np.arange(3), np.arange(3) * 2), (np.arange(3), np.arange(3.0)),
        (Held(1), Held(2)), (Held(np.ones(2)), Held(np.zeros(2))), (range(3), range(4)),
        (functools.partial(print, 1), functools.partial(print, 2)),
    ],
)  # fmt: skip
def test_what_is_no_tensor_counts(one, other) -> None:
    expected = Result.of((torch.ones(2), one))
    assert expected.difference((torch.ones(2), copy.deepcopy(one))) == ""
    assert "and the plain one" in expected.difference((torch.ones(2), other))


def test_what_cannot_be_compared_is_left_out() -> None:
    # functions, and what torch's own state is kept in
    assert Result.of(lambda: 1).difference(lambda: 1) == ""
    assert Result.of(float("nan")).difference(float("nan")) == ""
    assert Result.of([torch.Generator()]).difference([torch.Generator()]) == ""


def test_gradients_that_reach_other_parameters() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    x = one(torch.ones(1, 2))
    expected = Result.of(other(x))
    assert expected.difference(other(x)) == ""
    assert expected.difference(other(x.detach())) == "gradients reach 4 parameters, and 2 in the plain one"


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


class Naming(nn.Module):
    """Returns the class of what it got with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(192, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.head(self.body(x.flatten(1))), type(x).__name__


def by_first(model: nn.Module, batch: Any) -> Tensor:
    logits, name = model(batch[0])
    assert name == "Tensor"
    return nn.functional.cross_entropy(logits, batch[1])


def test_a_text_that_tells_of_the_replay() -> None:
    text = off(Naming, images, "head", step=by_first)
    assert "its output holds 'Ghost', and the plain one 'Tensor'" in text


def test_the_backward_pass_of_a_checkpoint_is_tried_beside_an_output_that_has_none() -> None:
    class Together(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return checkpoint(super().forward, x, use_reentrant=False), torch.zeros(2)

    def step(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0])[0], batch[1])

    text = off(lambda: Together(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4)), images, "2", step=step)
    assert "Checkpoint them apart" in text
