"""A loop does with a batch's ghost what it does with a plain tensor, and what it has not touched is known."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.cache.replay.ghost import ghost
from layerwise.cache.replay.handed import Handed, OnlyShapes, handed, real
from layerwise.errors import CacheError


def test_the_tag_marks_copies_and_nothing_else() -> None:
    # a moved or cast input is still the input; anything computed from it is not
    phantom = handed((2, 3), torch.float32, tag="x")
    assert phantom.to(torch.float64).tag == "x"
    assert phantom.detach().tag == "x"
    assert phantom.clone().tag == "x"
    assert not isinstance(phantom * 2, Handed)
    assert not isinstance(phantom.flip(0), Handed)


def test_bits_that_a_cast_takes_away_are_not_taken_back() -> None:
    # a cast to a narrower type is the input, moved or copied after it as well; the way back is another
    narrow = handed((2, 3), torch.float32, tag="x").half()
    for same in (narrow, narrow.clone(), narrow.detach(), narrow.view(2, 3)):
        assert same.tag == "x"
        assert same.float().tag is None


def pair() -> tuple[Handed, torch.Tensor]:
    """Return a ghost that can be loaded, and the tensor that a plain loop has in its place."""
    given = torch.arange(12.0).view(4, 3)
    return handed((4, 3), torch.float32, tag="x", load=lambda: given), given.clone()


READS: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: x.numpy(),
    "moved, numpy": lambda x: x.detach().cpu().numpy(),
    "asarray": np.asarray,
    "array of a view": lambda x: np.asarray(x[0].flip(0)),
    "tolist": lambda x: x.tolist(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": lambda x: torch.save(x, io.BytesIO()),
    "storage": lambda x: x.untyped_storage()[4],
    "dlpack": torch.from_dlpack,
    "share memory": lambda x: x.share_memory_(),
    "rows": lambda x: [row.sum() for row in x],
    "in": lambda x: 3.0 in x,
    "format": lambda x: f"{x.mean():.3f}",
    "bool": lambda x: bool(x[0, 0]),
    "two results": lambda x: torch.nn.functional.rrelu(x, 0.25, 0.25, training=True),
    "address": lambda x: x.data_ptr() == x.view(-1).data_ptr() != 0,
    "gradient": lambda x: torch.func.grad(lambda t: (t**2).sum())(x),
}

WRITES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x.mul_(2),
    "detach": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "new data": lambda x: setattr(x, "data", x * 2),
    "new shape": lambda x: setattr(x, "data", x[:2]),
    "row": lambda x: x[0].mul_(2),
    "view": lambda x: x.view(-1).zero_(),
    "same view": lambda x: x.view(4, 3).zero_(),
    "transposed": lambda x: x.T.mul_(2),
    "part": lambda x: x.split(2)[1].add_(1),
    "rows": lambda x: [row.mul_(2) for row in x],
    "numpy": lambda x: x.numpy().fill(1),
    "numpy of a row": lambda x: x[0].numpy().fill(1),
    "dlpack": lambda x: torch.from_dlpack(x).mul_(2),
    "shallow copy": lambda x: copy.copy(x).mul_(2),
    "item": lambda x: x.__setitem__((slice(None), 0), 5.0),
    "out": lambda x: torch.add(x, 1, out=x),
    "list": lambda x: torch._foreach_add_([x], 1.0),
    "apply": lambda x: x.apply_(lambda number: number + 1).t_(),
    "unsqueeze": lambda x: x.unsqueeze_(1),
    "transpose in place": lambda x: x.t_(),
    "resize": lambda x: x.resize_(2, 3),
    "set": lambda x: x.set_(torch.ones(2, 2)),
}


def as_bits(thing: Any) -> Any:
    return thing.tolist() if isinstance(thing, torch.Tensor | np.ndarray) else thing


@pytest.mark.parametrize("name", READS)
def test_a_loop_reads_what_it_reads_of_a_plain_tensor(name: str) -> None:
    # and the batch is still what was handed out
    phantom, plain = pair()
    assert as_bits(READS[name](phantom)) == as_bits(READS[name](plain))
    assert phantom.tag == "x"


@pytest.mark.parametrize("name", WRITES)
def test_what_shares_memory_writes_to_the_ghost(name: str) -> None:
    # it then stands for what was written, and is no more what was handed out
    phantom, plain = pair()
    before = phantom.clone()
    WRITES[name](phantom)
    WRITES[name](plain)
    assert (phantom.shape, phantom.stride()) == (plain.shape, plain.stride())
    assert torch.equal(real(phantom), plain)
    assert torch.equal(real(phantom.to(torch.float64)), plain.double())
    assert phantom.tag is None
    assert before.tag == "x"
    assert torch.equal(real(before), torch.arange(12.0).view(4, 3))


def test_the_loop_sees_what_the_model_writes_to_its_input() -> None:
    # and a copy made before does not
    phantom, plain = pair()
    before = phantom.clone()
    real(phantom).mul_(2)
    assert phantom[1, 0].item() == 6
    assert torch.equal(real(before), plain)


def test_a_copy_may_be_its_data() -> None:
    # a loop that moves or casts a batch in place
    phantom, plain = pair()
    phantom.data = phantom.data.double()
    assert phantom.dtype == real(phantom).dtype == torch.float64
    assert phantom.tag == "x"
    assert torch.equal(real(phantom), plain.double())


def test_another_ghost_may_be_its_data() -> None:
    phantom, plain = pair()
    phantom.data = handed((4, 3), torch.float32, tag="y", load=lambda: plain * 2)
    assert phantom.tag == "y"
    assert torch.equal(real(phantom), plain * 2)


def test_what_is_written_into_a_tensor_of_the_loop() -> None:
    # a buffer that a loop fills batch by batch
    phantom, plain = pair()
    held, made = torch.zeros(4, 3), torch.zeros(4, 6)
    assert held.copy_(phantom) is held
    assert torch.cat([phantom, phantom], 1, out=made) is made
    assert torch.equal(held, plain)
    assert torch.equal(made, torch.cat([plain, plain], 1))
    held[:2] = phantom[2:]
    assert torch.equal(held[:2], plain[2:])
    assert phantom.tag == "x"


def test_aliases_keep_the_tag() -> None:
    # the same elements of the same memory are the same input; others are not
    phantom, _ = pair()
    for alias in (phantom.view(4, 3), phantom.reshape(4, -1), phantom.contiguous(), phantom[:], phantom[:4]):
        assert alias.tag == "x"
    for other in (phantom.view(3, 4), phantom[1:], phantom.T, phantom.expand(2, 4, 3)):
        assert getattr(other, "tag", None) is None


def test_aliases_keep_their_shape() -> None:
    # where another one changes its own in place
    shapes = []
    for x in pair():
        aliases = x.detach(), x.view(4, 3)
        x.t_()
        shapes.append([x.shape, *(real(alias).shape for alias in aliases)])
    assert shapes[0] == shapes[1]


def test_what_asks_for_the_shape_alone_loads_nothing() -> None:
    phantom, _ = pair()
    assert torch.equal(torch.zeros_like(phantom), torch.zeros(4, 3))
    assert phantom.loaded is None


def test_what_is_made_of_it_and_of_a_ghost_is_a_ghost() -> None:
    # a model kept what a replay did not compute, and the loop adds it to the input
    phantom, _ = pair()
    for made in (phantom + ghost((4, 3), torch.float32), ghost((4, 3), torch.float32) + phantom):
        with pytest.raises(CacheError, match="needs the value"):
            made.sum().item()
    assert phantom.loaded is None


def test_a_compiled_function_reads_it() -> None:
    # what loads the samples is not traced
    phantom, plain = pair()
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    assert torch.equal(compiled(phantom), plain * 2)
    through_numpy = torch.compile(lambda x: x.numpy().sum() + x.sum(), backend="eager")
    assert through_numpy(phantom) == plain.sum() * 2


def test_gradients_of_a_ghost() -> None:
    # adversarial training: the input's gradient, and a step on the input
    phantom, plain = pair()
    for x in (phantom, plain):
        x.requires_grad_()
        (x**2).sum().backward()
        torch.optim.SGD([x], lr=0.1).step()
    assert torch.equal(phantom.grad, plain.grad)
    assert torch.equal(real(phantom), plain)
    with pytest.raises(RuntimeError, match="requires grad"):
        phantom.numpy()


def test_a_gradient_flows_back_from_where_samples_take_its_place() -> None:
    phantom, plain = (x.requires_grad_() for x in pair())
    for x in (phantom, plain):
        (real(x) ** 2).sum().backward()
    assert torch.equal(phantom.grad, plain.grad)


@pytest.mark.parametrize(
    "made",
    [
        lambda: handed((2, 3), torch.float32, tag="x"),
        lambda: handed((2, 3), torch.float32, tag="x").double(),
        lambda: without(pair()[0]),
    ],
)
def test_what_cannot_be_loaded_has_no_real_tensor(made: Callable[[], Handed]) -> None:
    # another draw of the same sample is another one; and of a ghost in its place nobody knows the numbers
    with pytest.raises(CacheError, match="needs the value"):
        real(made())


def without(phantom: Handed) -> Handed:
    """Put a tensor that no one computed into the place of what was loaded."""
    phantom.data = ghost((4, 3), torch.float32)
    return phantom


def test_nothing_is_read_during_a_replay() -> None:
    # what the loop has read before does not count
    phantom, _ = pair()
    assert phantom[0].sum() == 3
    with OnlyShapes():
        for read in (
            phantom.numpy,
            phantom.tolist,
            lambda: phantom.sum().item(),
            lambda: float(phantom[0, 0]),
        ):
            with pytest.raises(CacheError, match="needs the value"):
                read()


@pytest.mark.parametrize("was_read", [False, True])
@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[0].add_(1), lambda x: x.detach().add_(1)])
def test_what_a_replay_wrote_is_not_read_afterwards(write: Callable[[Any], Any], was_read: bool) -> None:
    # nobody knows what it would be, also where the loop had read it; a copy made before is what it was
    phantom, plain = pair()
    before = phantom.clone()
    if was_read:
        phantom.numpy()
    with OnlyShapes():
        write(phantom)
        after = phantom.clone()
    assert phantom.tag is after.tag is None
    with pytest.raises(CacheError, match="needs the value"):
        phantom.sum().item()
    with pytest.raises(CacheError, match="needs the value"):
        after.sum().item()
    assert torch.equal(real(before), plain)


def test_what_a_replay_wrote_to_something_made_of_it() -> None:
    phantom, plain = pair()
    with OnlyShapes():
        (phantom * 2).add_(1)
    assert phantom.tag == "x"
    assert torch.equal(real(phantom), plain)
