"""What may differ in the next epoch is dirty, and so is what Python may have decided by it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from layerwise.cache.cutting.dirty import find_dirty
from layerwise.layers.randomness import drawn_outside_torch
from layerwise.layers.recording import record


class Deciding(nn.Module):
    """Asks for a number of `ask`'s choice between two layers."""

    def __init__(self, ask) -> None:
        super().__init__()
        self.ask = ask
        self.embed, self.first, self.second = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(ids))
        return self.second(x) if self.ask(self, ids, x) else self.second(x.relu())


def dirty_calls(ask, *learning: str) -> list[str]:
    model = Deciding(ask)
    recording = record(model, (torch.ones(4, 5, dtype=torch.long),))
    flags = find_dirty(recording, frozenset(learning)).flags
    return [call.path for call in recording.calls[1:] if any(flags[call.start : call.end])]


def test_a_branch_by_computed_values_makes_all_after_it_dirty() -> None:
    assert dirty_calls(lambda model, ids, x: bool(x.mean() > 0)) == ["second"]


@pytest.mark.parametrize("read", [lambda weight: weight.sum(), lambda weight: weight[0, 0]])
def test_a_branch_by_a_weight_that_learns_makes_all_after_it_dirty(read) -> None:
    # of a number in a weight too: a view is no operation, so nothing dirty feeds what hands it to Python
    ask = lambda model, ids, x: read(model.other.weight).item() > 0  # noqa: E731
    assert dirty_calls(ask, "other.weight") == ["second"]
    assert dirty_calls(ask) == []


def test_a_branch_by_integer_inputs_is_trusted() -> None:
    # "is there any padding?", which most language models ask
    assert dirty_calls(lambda model, ids, x: bool((ids == 0).any())) == []


@pytest.mark.parametrize("ask", [lambda table, x: (x > 0).any(), lambda table, x: table[x.long()].any()])
@pytest.mark.parametrize("dtype", [torch.float, torch.long])
def test_a_branch_by_numbers_of_the_input_makes_all_after_it_dirty(ask, dtype) -> None:
    # no weight is needed for it; integers are trusted, and what a table of numbers gives for them is not
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(9))
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.first(x.float())
            return self.second(y) if ask(self.table, x) else y

    recording = record(Asking(), (torch.ones(4, 6, dtype=dtype),))
    flags = find_dirty(recording, frozenset()).flags
    second = next(call for call in recording.calls if call.path == "second")
    trusted = dtype == torch.long and not any(op.buffers for op in recording.ops)
    assert any(flags[second.start : second.end]) != trusted


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize("start", [0, 35, 36])
def test_what_overlaps_a_weight_that_learns_in_memory_is_dirty(kind, start) -> None:
    # what lies right beside it is another
    flat = torch.randn(72)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6)).eval()
    model[2].weight = nn.Parameter(flat[:36].view(6, 6))
    if kind == "parameter":
        model[0].weight = nn.Parameter(flat[start : start + 36].view(6, 6))
    else:
        model[1].running_mean = flat[start : start + 6]
    recording = record(model, (torch.ones(4, 6),))
    flags = find_dirty(recording, frozenset({"2.weight"})).flags
    call = recording.calls[1 if kind == "parameter" else 2]
    assert any(flags[call.start : call.end]) == (start < 36)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_what_runs_after_a_draw_outside_of_torch_is_dirty(draw) -> None:
    # Python may decide by it what runs, and numpy's arrays come back as constants
    before = drawn_outside_torch()
    assert dirty_calls(lambda model, ids, x: draw() < 2) == ["second"]
    assert drawn_outside_torch() == before


def test_the_first_reason_is_told() -> None:
    recording = record(Deciding(lambda model, ids, x: True), (torch.ones(4, 5, dtype=torch.long),))
    assert find_dirty(recording, frozenset()).first == "nothing learns"
    dirt = find_dirty(recording, frozenset({"second.weight"}))
    assert dirt.first == "the operation 'addmm' in second reads 'second.weight', which learns"


class Wrapping(torch.Tensor):
    """Holds its numbers in another tensor, as quantised and distributed weights do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, refuses: bool) -> Wrapping:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        if refuses:
            torch._C._set_storage_data_ptr_access_error_msg(made.untyped_storage()._cdata, "no address")
        return made

    def __init__(self, inner: torch.Tensor, refuses: bool) -> None:
        self.inner, self.refuses = inner, refuses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        whose = args[0]
        args, kwargs = tree_map_only(Wrapping, lambda one: one.inner, (args, kwargs or {}))
        output = func(*args, **kwargs)
        return Wrapping(output, whose.refuses) if func is torch.ops.aten.detach.default else output


@pytest.mark.parametrize("refuses", [False, True])
def test_weights_without_memory_of_their_own_share_none(refuses) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(Wrapping(layer.weight.detach(), refuses), requires_grad=False)
    dirt = find_dirty(record(model, (torch.ones(4, 6),)), frozenset({"2.weight"}))
    assert dirt.first == "the operation 'addmm' in 2 reads '2.weight', which learns"


def test_weights_without_numbers_or_strides_share_no_memory() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model.register_parameter("nothing", nn.Parameter(torch.empty(0)))
    model.register_buffer("table", torch.eye(4).to_sparse())
    dirt = find_dirty(record(model, (torch.ones(4, 6),)), frozenset({"nothing", "1.weight"}))
    assert dirt.first == "the operation 'addmm' in 1 reads '1.weight', which learns"
