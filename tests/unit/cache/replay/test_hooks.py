"""What is due at the end of a model's call is done then, however it ends, and nothing stays in the model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.cache.replay.hooks import RAISED, RootHook, hook_count


class Net(nn.Module):
    """Calls itself, as often as it is told to; is interrupted where it is told so."""

    def forward(self, x: Tensor, again: int = 0, interrupted: bool = False) -> Tensor:
        if interrupted:
            raise KeyboardInterrupt
        return self(x, again - 1) + 1 if again else x * 2


@pytest.fixture
def seen() -> list[Any]:
    return []


@pytest.fixture
def net(seen: list[Any]) -> Iterator[nn.Module]:
    hook = RootHook(model := Net())

    def before(args: Any, kwargs: Any) -> None:
        seen.append(args[0].item())
        hook.at_end(lambda output: seen.append(output if output is RAISED else output.item()))

    with hook.attached(before):
        yield model
    assert not vars(model).get("_call_impl")
    assert not model._forward_pre_hooks
    assert hook_count(model) == 0


def test_arguments_and_output_are_those_after_all_hooks(net: nn.Module, seen: list[Any]) -> None:
    # also of hooks that came later; what a backward hook hangs on is there as well
    net.register_forward_hook(lambda module, args, output: output + 10)
    net.register_full_backward_hook(lambda *gradients: None)
    assert net(torch.ones(1, requires_grad=True)).item() == 12
    assert seen == [1, 12]


def test_a_call_inside_another_has_an_end_of_its_own(net: nn.Module, seen: list[Any]) -> None:
    net(torch.tensor(3.0), 2)
    assert seen == [3, 3, 3, 6, 7, 8]


def test_an_interrupted_call_has_an_end_too(net: nn.Module, seen: list[Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        net(torch.ones(1), interrupted=True)
    net(torch.ones(1))
    assert seen == [1, RAISED, 1, 2]


def test_all_is_done_though_the_first_thing_raises(net: nn.Module, seen: list[Any]) -> None:
    # two caches on one model: what the one finds wrong reaches the caller, and the other ends its replay
    other = RootHook(net)

    def wrong(output: Tensor) -> None:
        raise ValueError(output.item())

    def before(args: Any, kwargs: Any) -> None:
        for due in (wrong, seen.append):
            other.at_end(due)

    with other.attached(before):
        assert hook_count(net) == 2
        with pytest.raises(ValueError, match=r"2\.0"):
            net(torch.ones(1))
    assert seen == [1, 2, torch.tensor([2.0])]
    assert net(torch.ones(1)).item() == 2


def test_of_several_blocks_the_first_counts(seen: list[Any]) -> None:
    # in whatever order they end; the model is as it was after the last
    hook = RootHook(model := Net())
    blocks = [hook.attached(lambda args, kwargs, number=number: seen.append(number)) for number in range(2)]
    for block in blocks:
        block.__enter__()
    model(torch.ones(1))
    for block in blocks:
        block.__exit__(None, None, None)
        model(torch.ones(1))
    assert seen == [0, 0]
    assert not model._forward_pre_hooks


def test_a_copy_takes_nothing_along_and_has_hooks_of_its_own(net: nn.Module, seen: list[Any]) -> None:
    hook, its = RootHook(twin := copy.deepcopy(net)), []
    twin(torch.ones(1))
    assert hook_count(twin) == 0
    with hook.attached(lambda args, kwargs: its.append(args[0].item())):
        assert (hook_count(net), hook_count(twin)) == (1, 1)
        twin(torch.ones(1))
    assert "_call_impl" not in vars(twin)
    assert its == [1]
    assert not seen
    net(torch.ones(1))
    assert seen == [1, 2]


def test_a_copy_that_is_called_in_another_thread(net: nn.Module, seen: list[Any]) -> None:
    # an average of the weights that is validated meanwhile: the model's call ends while the copy's goes on
    inside, may_end = threading.Event(), threading.Event()
    twin = copy.deepcopy(net)
    thread = threading.Thread(target=twin, args=(torch.ones(1),))

    def stays(*call: Any) -> None:
        inside.set()
        may_end.wait(10)

    def meanwhile(*call: Any) -> None:
        thread.start()
        inside.wait(10)

    twin.register_forward_pre_hook(stays)
    with net.register_forward_pre_hook(meanwhile):
        net(torch.ones(1))
    may_end.set()
    thread.join()
    assert seen == [1, 2]


class Scaled(nn.Module):
    scale = 2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("copied", [copy.copy, nn.Module._replicate_for_data_parallel])
def test_a_shallow_copy_is_called_by_itself(copied: Any, seen: list[Any]) -> None:
    # though it has all that is in the model's __dict__; and also when the epoch is over
    hook = RootHook(model := Scaled())
    with hook.attached(lambda args, kwargs: hook.at_end(seen.append)):
        twin = copied(model)
        twin.scale = 3
        assert twin(torch.ones(1)).item() == 3
        assert not seen
        assert model(torch.ones(1)).item() == 2
        assert seen == [2]
    assert twin(torch.ones(1)).item() == 3


def test_it_comes_last_also_of_hooks_that_came_later(net: nn.Module) -> None:
    hook, order = RootHook(net), []
    with hook.attached(lambda args, kwargs: order.append("ours")):
        net.register_forward_pre_hook(lambda module, args: order.append("theirs"))
        net(torch.ones(1))
        hook.come_last()
        net(torch.ones(1))
    assert order == ["ours", "theirs", "theirs", "ours"]
    net._forward_pre_hooks.popitem()  # the user's; the fixture's is left
