"""A batch is recognised when it reaches the model as it did the first time, and only then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.cache.replay.ghost import Ghost, ghost
from layerwise.cache.replay.handed import handed
from layerwise.cache.replay.kernels import backend_state
from layerwise.cache.replay.layout import memory_order
from layerwise.cache.replay.link import Link, find_link, known_arguments, versions_of


def images() -> torch.Tensor:
    return torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)


def link_of(*arguments: torch.Tensor, leaves: list[torch.Tensor]) -> Link:
    link = find_link(leaves, arguments, {})
    assert link is not None
    return link


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x[:, 2].zero_()])
def test_a_real_leaf_that_was_written_to(write: Callable[[torch.Tensor], Any]) -> None:
    x = images()
    link, versions = link_of(x, leaves=[x]), versions_of([x])
    assert link.recognises((x,), {}, [x], None, versions)
    assert link.recognises((x.clone(),), {}, [x], None, versions)
    write(x)
    assert not link.recognises((x,), {}, [x], None, versions)
    assert not link.recognises((x.clone(),), {}, [x], None, versions)


def test_inference_tensors_have_no_version() -> None:
    with torch.inference_mode():
        x = images()
    assert versions_of([x, images()]) == [0, 0]
    assert link_of(x, leaves=[x]).recognises((x,), {}, [x], None, [0])


def test_a_ghost_that_was_written_to() -> None:
    x = images()
    link, leaf = link_of(x, leaves=[x]), handed(tuple(x.shape), x.dtype, tag=("batch", 0), load=lambda: x)
    assert link.recognises((leaf,), {}, [leaf], "batch", [0])
    assert not link.recognises((leaf,), {}, [leaf], "another batch", [0])
    assert leaf[0].mean() == x[0].mean()  # read only
    assert link.recognises((leaf,), {}, [leaf], "batch", [0])
    assert link.recognises((x.clone(),), {}, [leaf], "batch", [0])  # the loop has put it together again
    leaf[0].numpy().fill(1)
    assert not link.recognises((leaf,), {}, [leaf], "batch", [0])
    assert not link.recognises((leaf + 0,), {}, [leaf], "batch", [0])


@pytest.mark.parametrize("first", [channels_last, lambda x: x])
def test_the_order_in_memory_is_part_of_the_call(first: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = images()
    link = link_of(first(x), leaves=[x])
    leaf = handed(tuple(x.shape), x.dtype, tag=("batch", 0), load=lambda: x)
    for own in (leaf, x):
        for call in (channels_last, lambda x: x):
            recognised = link.recognises((call(own),), {}, [own], "batch", versions_of([own]))
            assert recognised == (memory_order(call(x)) == memory_order(first(x)))
    (built,), _ = link.build([x[:1]])
    assert built.stride() == first(x)[:1].stride()
    assert torch.equal(built, x[:1])


def test_dimensions_of_size_one_have_no_place() -> None:
    # batches of one sample, images of one channel
    x = images()[:, :1].contiguous()
    link = link_of(channels_last(x), leaves=[x])
    for batch in (x, x[:1], torch.empty_like(x, memory_format=torch.channels_last).copy_(x)):
        assert link.recognises((batch,), {}, [batch], None, versions_of([batch]))


def test_a_cast_is_part_of_the_call() -> None:
    x = images()
    link = link_of(x.half(), leaves=[x])
    assert link.recognises((x.half(),), {}, [x], None, [0])
    assert not link.recognises((x,), {}, [x], None, [0])


def test_a_transposed_image_is_another_input() -> None:
    # it has the address and the shape of the batch's tensor
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert find_link([x], (x.transpose(2, 3),), {}) is None
    assert find_link([x], (x.view(2, 3, 4, 4),), {}) is not None


@pytest.mark.parametrize(
    "other",
    [lambda x: x.to_sparse(), lambda x: x[0], lambda x: x.flatten(1), lambda x: x + 0.0 * x.sum() + 1],
)
def test_an_argument_of_another_form(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = images()
    assert not link_of(x, leaves=[x]).recognises((other(x),), {}, [x], None, [0])


def test_an_argument_whose_gradient_is_wanted() -> None:
    x = images()
    link = link_of(x, leaves=[x])
    leaf = handed(tuple(x.shape), x.dtype, tag=("batch", 0), load=lambda: x)
    for given in (x.clone(), leaf):
        assert link.recognises((given,), {}, [leaf], "batch", [0]) == isinstance(given, Ghost)
        assert not link.recognises((given.requires_grad_(),), {}, [leaf], "batch", [0])


def test_another_caches_ghost_is_the_loops_own() -> None:
    # it is not looked at
    x = images()
    other = handed((2, 3), torch.float32, load=lambda: pytest.fail("it was loaded"))
    assert link_of(x, other, torch.ones(2), leaves=[x]).form.changing == {1, 2}


def test_a_ghost_of_a_replay_is_no_batch() -> None:
    # a model kept it, and the loop passes it on
    x = images()
    assert not link_of(x, leaves=[x]).recognises((ghost(tuple(x.shape), x.dtype),), {}, [x], None, [0])


def test_an_argument_of_the_loops_own_in_another_form() -> None:
    # a model may look at any of these
    x, own = images(), torch.ones(3)
    link = link_of(x, own, leaves=[x])
    assert link.recognises((x, own + 1), {}, [x], None, [0])
    for other in (own.double(), own.clone().requires_grad_(), handed((3,), torch.float32), own[:2]):
        assert not link.recognises((x, other), {}, [x], None, [0])


def test_an_argument_of_the_loops_own_may_have_a_batchs_form() -> None:
    # noise like the images; a weight for each sample, where the batch also holds a number for each
    x = images()
    leaves = [x, torch.rand(2), torch.rand(2, 5)]
    assert link_of(x, torch.rand_like(x), torch.rand(2), leaves=leaves).leaves == (0, None, None)
    assert find_link(leaves, (x, torch.rand(2, 5)), {}) is None  # other samples


def test_arguments_are_known_by_what_they_hold() -> None:
    x, y = images(), torch.arange(2)
    assert known_arguments([x, y], (x.double(), y.clone()), {"other": torch.ones(2)}) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_an_argument_without_memory_of_its_own() -> None:
    x = images()
    masked = torch.masked.masked_tensor(torch.ones(2, 3), torch.ones(2, 3) > 0)
    assert link_of(x, masked, leaves=[x]).form.changing == {1}


def test_functions_and_classes_are_told_by_who_they_are() -> None:
    x = images()
    link = find_link([x], (x, torch.relu, nn.ReLU), {})
    assert link is not None
    assert link.same_constants((x, torch.relu, nn.ReLU), {})
    assert not link.same_constants((x, torch.tanh, nn.ReLU), {})
    assert not link.same_constants((x, torch.relu, nn.GELU), {})


def test_arguments_with_other_constants() -> None:
    x = images()
    link = find_link([x], (x,), {"scale": 2})
    assert link is not None
    assert link.build([x])[1] == {"scale": 2}
    assert link.build([x], ((x,), {"scale": 3}))[1] == {"scale": 3}
    assert link.same_constants((x,), {"scale": 2})
    for other in ({"scale": 3}, {"size": 2}, {}):
        assert not link.same_constants((x,), other)


def test_the_fast_path_of_attention_chooses_kernels() -> None:
    before = backend_state(torch.device("cpu"))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert backend_state(torch.device("cpu")) != before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert backend_state(torch.device("cpu")) == before


def test_tensors_that_are_equal_in_the_first_batch_are_told_apart() -> None:
    # masks of a batch without padding, or token numbers and labels: the loop moves or casts them
    leaves = [torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3)]
    found = find_link(leaves, (leaves[1].double(), leaves[2].double(), leaves[0]), {})
    assert found is not None
    assert found.leaves == (1, 2, 0)  # in their order, but for one that is known by who it is
    assert link_of(leaves[1], leaves=leaves).leaves == (1,)
    found = find_link(leaves[:1], (leaves[0].double(), leaves[0].double()), {})
    assert found is not None
    assert found.leaves == (0, 0)
