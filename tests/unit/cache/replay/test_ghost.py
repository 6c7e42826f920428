"""A ghost answers questions about its shape, and raises when its value is asked for."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.cache.replay.capturing import Skeleton
from layerwise.cache.replay.ghost import Ghost, ghost
from layerwise.cache.replay.handed import real
from layerwise.errors import CacheError


@pytest.fixture
def phantom() -> Ghost:
    return ghost((2, 3), torch.float32)


def test_shape_work_needs_no_value(phantom: Ghost) -> None:
    # reshapes, reductions and adds of frozen tensors run on a ghost and give ghosts of the right shape
    for made, shape in [
        (phantom.transpose(0, 1), (3, 2)),
        (phantom.flatten(), (6,)),
        (phantom + torch.ones(3), (2, 3)),
        (torch.cat([phantom, torch.zeros(1, 3)]), (3, 3)),
        (phantom.mean(1), (2,)),
        (phantom[:, 0], (2,)),
        (phantom.split(2, dim=1)[1], (2, 1)),
        (phantom.unbind()[1], (3,)),
        (nn.functional.relu(phantom, inplace=True), (2, 3)),
    ]:
        assert isinstance(made, Ghost)
        assert tuple(made.shape) == shape


def test_type_and_layout_survive() -> None:
    # dtype conversions and channels_last are kept, as kernels are chosen by them
    phantom = ghost((2, 3, 4, 5), torch.float32, order=(0, 2, 3, 1))
    assert phantom.is_contiguous(memory_format=torch.channels_last)
    assert phantom.relu().stride() == phantom.stride()
    assert phantom.to(torch.bfloat16).dtype == torch.bfloat16
    assert phantom.to("meta").device.type == "meta"


def test_gradients_may_be_asked_for(phantom: Ghost) -> None:
    # as checkpointing asks for those of a frozen embedding's output
    assert (phantom.requires_grad_() * 2).shape == (2, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda g: g.sum().item(),
        lambda g: bool((g > 0).any()),
        lambda g: g[g > 0],
        lambda g: torch.nonzero(g),
        lambda g: torch.equal(g, g),
        lambda g: float(g.mean()),
        lambda g: torch.ones(2, 3).add_(g),
        lambda g: torch.ones(2, 3).copy_(g),
        lambda g: torch.max(g, 1, out=(ghost((2,), g.dtype), torch.zeros(2, dtype=torch.int64))),
        lambda g: g + torch.ones(3, requires_grad=True),
        lambda g: nn.functional.linear(g, torch.ones(4, 3, requires_grad=True)),
        lambda g: nn.functional.mse_loss(torch.ones(2, 3, requires_grad=True), g),
        lambda g: pickle.dumps(g),
        lambda g: torch._assert_async((g > 0).all()),
        real,
        lambda g: real(g.requires_grad_()),
    ],
)
def test_a_value_that_is_needed_raises(phantom: Ghost, use) -> None:
    with pytest.raises(CacheError, match="needs the value"):
        use(phantom)


def test_python_cannot_read_it(phantom: Ghost) -> None:
    # numpy and tolist go past the dispatcher; they must not give zeros
    for read in (phantom.numpy, phantom.tolist, phantom.untyped_storage, lambda: np.asarray(phantom)):
        with pytest.raises(CacheError, match="needs the value"):
            read()


def test_code_that_takes_the_address_does_not_crash(phantom: Ghost) -> None:
    # functions of C that no method of the class stands before
    for read in (torch._C._to_dlpack, torch.Tensor.data_ptr, lambda g: torch.Tensor.apply_(g, float)):
        with pytest.raises(RuntimeError, match="has no address"):
            read(phantom)


def test_shape_only_factories_give_data(phantom: Ghost) -> None:
    # zeros_like and kin read the shape alone, so the model gets real tensors
    assert torch.equal(torch.zeros_like(phantom), torch.zeros(2, 3))
    assert torch.equal(torch.ones_like(phantom, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(torch.full_like(phantom, 2.5), torch.full((2, 3), 2.5))
    assert torch.empty_like(phantom, dtype=torch.int64).sum().dtype == torch.int64
    assert torch.equal(phantom.new_zeros(4), torch.zeros(4))
    assert torch.equal(phantom.new_full((2,), 3.0), torch.full((2,), 3.0))
    channels_last = ghost((2, 3, 4, 5), torch.float32, order=(0, 2, 3, 1))
    assert torch.zeros_like(channels_last).is_contiguous(memory_format=torch.channels_last)


def test_deepcopy(phantom: Ghost) -> None:
    assert tuple(copy.deepcopy(phantom).shape) == (2, 3)


def test_one_ghost_serves_all_steps_until_it_is_written_to() -> None:
    skeleton = Skeleton(torch.empty(4, 3, device="meta"), 4, [None])
    first = skeleton.ghost(0, 4, torch.device("cpu"))
    assert skeleton.ghost(0, 4, torch.device("cpu")) is first
    first.add_(1)
    again = skeleton.ghost(0, 4, torch.device("cpu"))
    assert again is not first
    assert again.shape == (4, 3)


def test_whose_data_are_replaced(phantom: Ghost) -> None:
    # it looks like what it was given, and nobody knows what it stands for
    phantom.data = torch.zeros(4, 5, dtype=torch.float64)
    assert phantom.shape == (4, 5)
    assert phantom.dtype == torch.float64
    assert phantom.stands_for.was_written


def test_a_shape_that_a_replay_changes_in_place() -> None:
    phantom = ghost((2, 3), torch.float32)
    phantom.unsqueeze_(1)
    assert phantom.shape == (2, 1, 3)
    assert (phantom + 1).shape == (2, 1, 3)
