"""What shows at the first batch of a phase, and what is done where a cut does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, TensorDataset

from cache_loops import both, images, off, unfreeze_gradually


class Pooling(nn.Module):
    """A frozen body, a head, and whatever `pool` does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)))


def test_code_between_modules_that_raises_an_error_of_its_own_is_told() -> None:
    # it reads memory that a tensor without data does not have
    class ByStorage(Pooling):
        def pool(self, x):
            try:
                storage = x.detach().untyped_storage()
            except Exception as error:
                raise ValueError("there is no memory to pool") from error
            return super().pool(torch.empty(0).set_(storage, 0, x.shape, x.stride()))

    text = off(ByStorage, images, "head")
    assert "off: a replay raised ValueError: there is no memory to pool" in text


def test_a_module_that_is_called_in_the_recording_only_is_not_cut_at() -> None:
    # the first pass of all goes another way, which gives the same numbers: no value of that call comes later
    class Preparing(Pooling):
        def forward(self, x):
            x = self.pool(self.body(x))
            passes.append(1)
            return self.head(x) if len(passes) == 1 else nn.functional.linear(x, *self.head.parameters())

    def make() -> nn.Module:
        passes.clear()
        return Preparing()

    passes: list[int] = []
    assert "cut at body (" in both(make, images, "head").text


class Begun(Sampler[list[int]]):
    """One batch in the first of three epochs, all in the others."""

    def __init__(self) -> None:
        self.epochs = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epochs += 1
        batches = [list(range(start, start + 4)) for start in range(0, 20, 4)]
        return iter(batches[:1] if self.epochs % 3 == 1 else batches)

    def __len__(self) -> int:
        return 5


class Recurrent(nn.Module):
    """Its kernel rounds otherwise where no gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


def looked_at_in_eval_mode(model: nn.Module, batch: Any) -> Tensor:
    if model.training:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return loss + 0 * model.head.bias.sum()


def test_values_of_another_kernel_are_not_kept_where_they_cannot_be_compared() -> None:
    # no sample of the batch that is looked at without gradients has a value: nothing shows that bits differ
    inputs = torch.randn(20, 12, 64, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, torch.arange(20) % 4)
    cached = both(
        Recurrent, lambda: data, "head", step=looked_at_in_eval_mode,
        before_epoch=lambda model, epoch: model.train(epoch != 1),
        loader_options={"batch_size": 1, "shuffle": False, "batch_sampler": Begun()},
    )  # fmt: skip
    assert "cut at" in cached.text


class Counting(nn.Sequential):
    """Says how many samples it got, which a stored output could not."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(x), len(x)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = Counting(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, count = self.low(x)
        return self.high(x) * count / len(x)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def unfrozen_by_and_by(cached: bool) -> tuple[dict[str, Tensor], str]:
    torch.manual_seed(0)
    return unfreeze_gradually(Deep(), images(16), cached=cached, shuffle=False)


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_value_that_only_a_later_phase_needs_and_that_cannot_be_stored() -> None:
    # the present phase is cached all the same
    (plain, _), (cached, text) = unfrozen_by_and_by(False), unfrozen_by_and_by(True)
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    first, second, _ = text.splitlines()
    assert "cut at input of head" in first
    assert "off: the output of body.low holds a number that depends on the batch size" in second


class ByDLPack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(192, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.body(torch.from_dlpack(x.flatten(1)) + 1))


@pytest.mark.filterwarnings("ignore")  # torch's, as an error, would end the recording before
def test_memory_that_a_recording_does_not_have() -> None:
    # an operation on what DLPack hands on would read address 0, and end the process
    assert "hands Python a value of the batch" in off(ByDLPack, images, "fc", warns=False)
