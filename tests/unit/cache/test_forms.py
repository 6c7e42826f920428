"""Frozen values in forms that are not stored (sparse, quantised), or in an unusual place in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cache_loops import both, images

Function = Callable[[Tensor], Tensor]


class Low(nn.Module):
    """A layer, and a form in which it gives its output."""

    def __init__(self, form: Function) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(192, 8), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.linear(x.flatten(1)))


class Net(nn.Module):
    """What learns is made of plain tensors."""

    def __init__(self, form: Function, plain: Function) -> None:
        super().__init__()
        self.low, self.plain, self.head = Low(form), plain, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.low(x)))


def rotated(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(-1, 4, 2)).conj()


FORMS: dict[str, tuple[Function, Function, str]] = {
    "sparse": (lambda x: x.relu().to_sparse(), Tensor.to_dense, "low.linear"),
    "sparse rows": (lambda x: x.relu().to_sparse_csr(), Tensor.to_dense, "low.linear"),
    "mkldnn": (Tensor.to_mkldnn, Tensor.to_dense, "low.linear"),
    "complex": (rotated, lambda x: torch.view_as_real(x.resolve_conj()).flatten(1), "low"),
    "negative": (lambda x: rotated(x).imag.repeat(1, 2), lambda x: x + 0, "low"),
    "other bits": (lambda x: x.view(torch.int32), lambda x: x.view(torch.float32), "low"),
    "unsigned": (lambda x: x.view(torch.uint32), lambda x: x.view(torch.float32), "low"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), Tensor.float, "low"),
    "powers of two": (lambda x: x.to(torch.float8_e8m0fnu), Tensor.float, "low"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        Tensor.dequantize,
        "low.linear",
    ),
    "repeated": (lambda x: x[:, None].expand(-1, 3, -1), lambda x: x.sum(1), "input of head"),
    "part of a larger one": (lambda x: torch.stack([x, x], 2)[:, :, 0], lambda x: x, "low"),
    "turned": (Tensor.t, Tensor.t, "low"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz")
def test_exact_in_whatever_form_a_frozen_module_gives_values(name) -> None:
    # what cannot be stored is made anew of what can
    form, plain, site = FORMS[name]
    if name in ("unsigned", "float8", "powers of two"):
        try:
            form(torch.ones(2, 8))[[0]]
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this torch cannot pick samples of them: {error}")
    cached = both(lambda: Net(form, plain), images, "head")
    assert f"memory, cut at {site} " in cached.text
    assert cached.loads[1:] == [0, 0]


class Written(nn.Module):
    """Writes what learns into what a frozen layer gives."""

    def __init__(self, form: Function) -> None:
        super().__init__()
        self.low, self.place, self.head = Low(form), nn.ParameterList([torch.randn(8)]), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x)
        x += self.place[0]
        return self.head(x)


@pytest.mark.parametrize("form", [lambda x: x.view(-1, 8), lambda x: x.t().contiguous().t(), Tensor.relu])
def test_what_learns_is_written_into_a_view_or_into_a_tensor_of_its_own(form) -> None:
    # gradients take another way through a view, in a phase that has its values from another one as well
    cached = both(
        lambda: Written(form),
        images,
        "place",
        "head",
        before_epoch=lambda model, epoch: model.head.bias.requires_grad_(epoch == 0),
    )
    assert "memory, cut at low " in cached.text
    assert cached.loads[1:] == [4, 0]  # the first batch of the second state is looked at
