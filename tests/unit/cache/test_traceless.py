"""A pass of the cache's own leaves what tensors hold as it was, whatever their form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.cache.traceless import traceless
from layerwise.layers.forms import dense

Tensor = torch.Tensor


def quantised(value: float) -> Tensor:
    return torch.quantize_per_tensor(torch.full((9,), value), value, 0, torch.qint8)


FORMS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = {
    "plain": (lambda: torch.ones(3), lambda t: t.add_(1)),
    "not a number": (lambda: torch.full((3,), torch.nan), lambda t: t.data.fill_(1)),
    "sparse": (lambda: torch.eye(4).to_sparse(), lambda t: t.mul_(2)),
    "sparse elsewhere": (lambda: torch.eye(4).to_sparse(), lambda t: t.add_(torch.ones(4, 4).to_sparse())),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), lambda t: t.values().mul_(2)),
    "quantised in other steps": (lambda: quantised(1.0), lambda t: t.copy_(quantised(2.0))),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda t: t[1].mul_(2)),
}


@pytest.mark.parametrize("is_buffer", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz", "ignore:The PyTorch API of nested")
def test_what_tensors_hold_is_put_back(form, is_buffer) -> None:
    make, write = FORMS[form]
    held, model = make(), nn.Linear(2, 2)
    if is_buffer:
        model.register_buffer("held", held)
    else:
        model.held = held
    with traceless(model):
        write(model.held)
        assert not all(map(torch.equal, dense(held), dense(make())))
    assert model.held is held
    assert all(map(torch.equal, map(torch.nan_to_num, dense(held)), map(torch.nan_to_num, dense(make()))))
