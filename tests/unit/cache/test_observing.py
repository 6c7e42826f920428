"""What shows at the first batch of a phase, and what is done where a cut does not hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import layerwise
from cache_loops import both, images, off, unfreeze_gradually
from layerwise.cache import observing
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.traceless import traceless


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


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean((2, 3)))


def test_a_later_phase_takes_what_was_stored_of_it_and_is_not_exact() -> None:
    # its first batch, computed anew, is that of the plain loop; what was stored differs by its rounding
    torch.manual_seed(0)
    options = {"exact": False, "dtype": torch.bfloat16}
    _, text = unfreeze_gradually(Stages(), images(16), cached=True, shuffle=False, **options)
    first, second, _ = text.splitlines()
    assert "cut at input of head" in first
    assert "cut at low " in second
    assert "stored in an earlier pass" in second


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


# -- what is the same for all batches, but not in all states of the model ------------------------------


class Scaled(nn.Module):
    """Returns a value of the input, and a weight and a number that depend on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(4)), 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        number = self.scale + self.training
        return self.linear(x), self.table * number, number


class ByConstant(nn.Module):
    """Adds the value of the weight behind what learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Scaled(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        features, table, _ = self.body(x)
        return self.head(features) + table


class ByNumber(ByConstant):
    """Multiplies by the number."""

    def forward(self, x: Tensor) -> Any:
        features, _, number = self.body(x)
        return self.head(features) * number


class Returning(ByConstant):
    """Returns the number with the logits."""

    def forward(self, x: Tensor) -> Any:
        features, _, number = self.body(x)
        return self.head(features), number


def set_scale(model: Any, number: int) -> None:
    model.body.scale = float(number)


def set_mode(model: Any, number: int) -> None:
    model.body.train(number == 2)


def trained_in_turn(
    make: Callable[[], Any],
    change: Callable[[Any, int], None],
    epochs: Sequence[tuple[int, ...]],
    *,
    cached: bool,
    **options: Any,
) -> tuple[list[Tensor], int]:
    """Train while a state changes; return losses and weights, and how often batches were replayed.

    Args:
        epochs: the state at each batch.
        options: of the cache.
    """
    torch.manual_seed(0)
    model, x = make(), torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    model.body.requires_grad_(False)
    loader = DataLoader(TensorDataset(x, torch.arange(12) % 4), batch_size=4)
    cache = layerwise.PrefixCache(model, loader, storage="memory", **options)
    optimizer, found, replays = torch.optim.SGD(model.parameters(), lr=0.1), [], 0
    for states in epochs:
        batches = iter(cache.batches() if cached else loader)
        for state in states:
            change(model, state)
            x, y = next(batches)
            replays += isinstance(x, Ghost)
            output = model(x)
            logits, number = output if isinstance(output, tuple) else (output, 1.0)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(logits, y) * number
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return [*found, *model.parameters()], replays


@pytest.mark.parametrize("change", [set_scale, set_mode])
@pytest.mark.parametrize("make", [ByConstant, ByNumber, Returning])
@pytest.mark.parametrize(
    ("epochs", "least"),
    [
        ([(1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)], 11),
        ([(1, 2, 1), (1, 2, 1), (2, 1, 2)], 5),
    ],
)
def test_what_is_the_same_for_all_batches_is_kept_for_each_state(make, change, epochs, least) -> None:
    plain, _ = trained_in_turn(make, change, epochs, cached=False)
    cached, replays = trained_in_turn(make, change, epochs, cached=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, cached, strict=True))
    assert replays >= least


class Scheduled(Pooling):
    """What learns has a number that follows a schedule."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_a_schedule_of_what_learns_asks_for_no_other_proof() -> None:
    # each epoch is another state, in which the frozen part gives what is known: one batch is loaded, once
    def step_up(model: Any, epoch: int) -> None:
        model.scale = 1.0 + epoch

    assert both(Scheduled, images, "head", epochs=4, before_epoch=step_up).loads[1:] == [4, 4, 4]


class ScaledValue(Scaled):
    """Its value of the input depends on its state, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        value, table, number = super().forward(x)
        return value * number, table, number


class ByValue(ByConstant):
    """Reads that value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ScaledValue()


@pytest.mark.parametrize("change", [set_scale, set_mode])
def test_a_pool_does_not_mix_values_of_two_states(change) -> None:
    # the name of a column does not tell the mode: what has no sample in common cannot be compared
    epochs = [(2, 1, 1), (1, 1, 1), (1, 1, 1)]
    plain, _ = trained_in_turn(ByValue, change, epochs, cached=False)
    cached, replays = trained_in_turn(ByValue, change, epochs, cached=True, pool=layerwise.CachePool())
    assert all(torch.equal(one, other) for one, other in zip(plain, cached, strict=True))
    assert replays >= 4


def test_what_undoes_the_trace_of_a_replay_is_no_part_of_a_step(monkeypatch) -> None:
    # the expected gain of a head alone was told ten times too low
    @contextlib.contextmanager
    def slowly(model: nn.Module) -> Iterator[None]:
        with traceless(model):
            time.sleep(0.2)
            yield
            time.sleep(0.2)

    def frozen(x: Tensor) -> Tensor:
        time.sleep(0.05)
        return nn.Conv2d.forward(model.body, x)

    monkeypatch.setattr(observing, "traceless", slowly)
    model = Pooling()
    model.body.requires_grad_(False).forward = frozen
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 6, 6)), 4)
    with layerwise.PrefixCache(model, loader, storage="memory") as cache:
        for (x,) in cache.batches():
            model(x).sum().backward()
        assert cache.decision is not None
        assert cache.decision.prefix_frac > 0.5
