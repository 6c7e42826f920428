"""With several draws of each sample stored, all that is handed out of a sample is of one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, WeightedRandomSampler

import layerwise
from cache_loops import Counted
from layerwise.errors import CacheError


class Drawn(Counted):
    """Each sample is an image of one number, drawn anew each time, and that number."""

    def __init__(self, size: int = 8) -> None:
        super().__init__(torch.ones(22, 3, size, size), torch.zeros(22))

    def __getitem__(self, index: int) -> Any:
        number = torch.rand(())
        return self.inputs[index] * number, number


class Named(Drawn):
    def __getitem__(self, index: int) -> Any:
        return *super().__getitem__(index), f"image {index}"


class Twice(nn.Module):
    """Returns the number that its input is made of, by two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
        self.head = nn.Linear(3, 1, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[:, :, None, None])
            self.tail.weight.copy_(torch.eye(3)[:, :, None, None])
            self.head.weight.fill_(1 / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return torch.cat([self.head(self.tail(x).mean((2, 3))), x.mean((1, 2, 3))[:, None]], 1)


def train(
    data: Drawn,
    *,
    epochs: int,
    learns: Callable[[int], bool] = lambda epoch: False,
    mode: Callable[[int, int], bool] = lambda epoch, step: True,
    **options: Any,
) -> str:
    """Check every batch; return what the cache says of itself.

    Args:
        learns: whether the tail does, in an epoch.
        mode: in which the model is called, in a step of an epoch.
    """
    torch.manual_seed(0)
    model = Twice()
    model.body.requires_grad_(False)
    loader = DataLoader(data, 4, **({"shuffle": True} | options.pop("loader_options", {})))
    cache = layerwise.PrefixCache(model, loader, storage="memory", views=2, **options)
    for epoch in range(epochs):
        model.tail.requires_grad_(learns(epoch))
        for step, (x, number, *_) in enumerate(cache.batches()):
            output = model.train(mode(epoch, step))(x)
            output.sum().backward()  # as the loop would; nothing is learned
            assert torch.allclose(output, number[:, None].expand_as(output), atol=1e-6)
    return cache.describe()


def test_values_and_labels_are_of_one_draw() -> None:
    assert "cut at" in train(Drawn(), epochs=5)


def test_a_phase_that_needs_a_value_more_does_not_add_it_from_another_draw() -> None:
    text = train(Drawn(), epochs=9, learns=lambda epoch: 3 <= epoch < 6)
    assert text.count("cut at") == 2


def test_inputs_that_are_kept_are_of_the_draw_that_was_computed() -> None:
    # however large they are: a draw cannot be loaded again
    assert "cut at" in train(Drawn(150), epochs=4, keep_inputs=True)


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_what_cannot_be_stored_is_refused() -> None:
    # the name is loaded again, and with it a label of another draw
    assert "off: " in train(Named(), epochs=4)


def test_a_sample_that_stands_in_a_batch_twice() -> None:
    sampler = WeightedRandomSampler(torch.tensor([9.0] + [0.1] * 21), 22)
    assert "cut at" in train(Drawn(), epochs=9, loader_options={"shuffle": False, "sampler": sampler})


@pytest.mark.parametrize("keep_inputs", [True, False])
def test_a_mode_that_changes_before_the_call(keep_inputs: bool) -> None:
    # where the batch was made for another mode, it is not replayed with a label of another draw
    def mode(epoch: int, step: int) -> bool:
        return step % 3 != 1

    if keep_inputs:
        assert "cut at" in train(Drawn(), epochs=6, mode=mode, keep_inputs=True)
    else:
        with pytest.raises(CacheError, match="cannot be loaded again: another loading is another draw"):
            train(Drawn(), epochs=6, mode=mode)


def test_a_mode_that_changes_where_labels_are_of_no_draw() -> None:
    class Labelled(Drawn):
        def __getitem__(self, index: int) -> Any:
            return self.inputs[index] * (1 + torch.rand(()) * 1e-8), torch.ones(())

    assert "cut at" in train(Labelled(), epochs=6, mode=lambda epoch, step: step % 3 != 1)


@pytest.mark.parametrize("filled", [False, True])
def test_workers_draw_anew_for_each_view(filled) -> None:
    torch.manual_seed(0)
    model = Twice()
    model.body.requires_grad_(False)
    loader = DataLoader(Drawn(), 4, num_workers=1)
    cache = layerwise.PrefixCache(model, loader, storage="memory", views=3)
    epochs = []
    for _ in range(7):
        epochs.append(torch.cat([model(x).detach()[:, 1] for x, *_ in cache.batches()]))
        if filled and len(epochs) == 1:
            cache.fill()
    first, second, third = (set(epoch.tolist()) for epoch in epochs[:3])
    assert len(first | second | third) == 3 * 22
    assert [set(epoch.tolist()) for epoch in epochs[3:]] == [first, second, third, first]
