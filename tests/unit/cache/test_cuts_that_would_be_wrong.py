"""Models whose first replayed batch looks right, and which a careless cut would train wrongly after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise

SIZE, COUNT, BATCH = 8, 16, 4


class Slotted:
    """An object whose state is in slots."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 1


class Encoder(nn.Module):
    """A frozen layer, and what `more(encoder, input, output, *others)` returns beside its output."""

    def __init__(self, more: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(SIZE, SIZE), nn.Parameter(torch.ones(SIZE))
        self.register_buffer("ones", torch.ones(SIZE))
        self.more = more

    def forward(self, x: Tensor, *others: Any) -> tuple[Tensor, Any]:
        y = self.linear(x).relu()
        return y, self.more(self, x, y, *others)


class Net(nn.Module):
    """Uses what the encoder returned by `use(net, x, encoder)`; `start`, `zero` and `head` learn."""

    def __init__(self, more: Callable[..., Any], use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder, self.use = Encoder(more), use
        self.start, self.zero, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, x, self.encoder))


def product(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    y, value = encoder(x)
    return y * value + encoder.scale.sum()


def write_to(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    y, value = encoder(x)
    return y * value.mul_(0.9)


def adapt_in_place(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    y, alias = encoder(x)
    y += net.zero(y.clone())  # nothing at first
    return y + alias.view(-1, SIZE)


def of_learning(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    start = net.start(x)
    y, view = encoder(x, start)
    return y * view.reshape(len(x), -1).mean(1, keepdim=True) + start


def side_adapters(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    kept: list[Tensor] = []
    y, _ = encoder(x, kept)
    return y + sum(net.zero(feature) for feature in kept)


def counted(net: Net, x: Tensor, encoder: Encoder) -> Tensor:
    y, state = encoder(x)
    if isinstance(state, dict):
        state = state["in it"]
    if isinstance(state, deque | bytearray):
        state.append(1)
        return y * len(state)
    if isinstance(state, set):
        state.add(len(state))
        return y * len(state)
    state.count += 1
    return y * state.count


def by_python(read: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Scale a frozen layer's input by what Python read of weights that learn."""
    return lambda net, x, encoder: encoder(x * float(read(net.zero.bias.detach().cos())[0]))[0] + net.zero(x)


def nothing(*_: Any) -> None:
    return None


MODELS: dict[str, Callable[[], Net]] = {
    "learning parameter": lambda: Net(lambda e, x, y: e.scale, product),
    "view of a learning parameter": lambda: Net(lambda e, x, y: e.scale.view(1, -1), product),
    "detached parameter that learns": lambda: Net(lambda e, x, y: e.scale.detach(), product),
    "buffer that is written to": lambda: Net(lambda e, x, y: e.ones, write_to),
    "constant that is written to": lambda: Net(lambda e, x, y: e.ones.cos(), write_to),
    "the same tensor twice": lambda: Net(lambda e, x, y: y, adapt_in_place),
    "a tensor and its view": lambda: Net(lambda e, x, y: y.view(-1, 2, SIZE // 2), adapt_in_place),
    "a tensor and another in its memory": lambda: Net(
        lambda e, x, y: torch.empty(0).set_(y.detach()), adapt_in_place
    ),
    "view of what learning layers made": lambda: Net(lambda e, x, y, start: start[:, :4], of_learning),
    "what learning layers made, detached": lambda: Net(lambda e, x, y, start: start.detach(), of_learning),
    "what learning layers made": lambda: Net(lambda e, x, y, start: start, of_learning),
    "appended to a list": lambda: Net(lambda e, x, y, kept: kept.append(y), side_adapters),
    "appended to a list and not returned": lambda: Net(
        lambda e, x, y, kept: kept.append(y.tanh()), side_adapters
    ),
    "object with a state": lambda: Net(lambda e, x, y: SimpleNamespace(count=1), counted),
    "object with slots": lambda: Net(lambda e, x, y: Slotted(), counted),
    "object in a dictionary": lambda: Net(lambda e, x, y: {"in it": SimpleNamespace(count=1)}, counted),
    "deque": lambda: Net(lambda e, x, y: deque([1]), counted),
    "set": lambda: Net(lambda e, x, y: {0}, counted),
    "bytearray": lambda: Net(lambda e, x, y: bytearray(1), counted),
    "tolist": lambda: Net(nothing, by_python(Tensor.tolist)),
    "numpy": lambda: Net(nothing, by_python(Tensor.numpy)),
}
SAYS = {  # of the others the encoder runs, and the layer in it is skipped
    "constant that is written to": "cut at encoder ",
    "what learning layers made": "cut at encoder ",
    "appended to a list": "gradients reach 2 parameters, and 4 in the plain one",
    "tolist": "'cos' in the model's own forward reads 'zero.bias', which learns",
    "numpy": "'cos' in the model's own forward reads 'zero.bias', which learns",
}


def trained(
    make: Callable[[], nn.Module], learning: tuple[str, ...], *, cached: bool, shuffle: bool = True
) -> tuple[Any, str]:
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learning))
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(COUNT, SIZE, generator=generator), torch.arange(COUNT) % 4)
    loader = DataLoader(data, BATCH, shuffle=shuffle)
    cache = layerwise.PrefixCache(model, loader, storage="memory") if cached else None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        for x, y in loader if cache is None else cache.batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return (losses, state), "" if cache is None else cache.describe()


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_exact_whatever_a_frozen_module_hands_out(name: str) -> None:
    learning = ("start", "zero", "head", "encoder.scale")
    plain, _ = trained(MODELS[name], learning, cached=False)
    cached, text = trained(MODELS[name], learning, cached=True)
    assert_same(plain, cached)
    assert SAYS.get(name, "cut at encoder.linear ") in text


@pytest.mark.parametrize(
    "name",
    ["object with a state", "object with slots", "object in a dictionary", "deque", "set", "bytearray"],
)
def test_a_module_that_hands_out_what_can_change_runs_and_what_is_in_it_is_skipped(name: str) -> None:
    _, text = trained(MODELS[name], ("zero", "head"), cached=True)
    assert "cut at encoder.linear" in text


class Mixing(nn.Module):
    """Writes to one argument and reads two; what it adds is nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.zero, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        one += self.zero(one.clone())
        return self.out(one * other)


class Pooled(nn.Module):
    """Hands one pooled tensor on as both arguments: less to store than what is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, SIZE), Mixing()

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.body(x[..., None]).mean(1)
        return self.head(pooled, pooled)


def test_an_argument_that_is_passed_twice_and_written_to_is_not_stored_as_two() -> None:
    plain, _ = trained(Pooled, ("head",), cached=False)
    cached, text = trained(Pooled, ("head",), cached=True)
    assert_same(plain, cached)
    assert "cut at body " in text


class Recurrent(nn.Module):
    """An LSTM, whose kernel rounds in another way where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 16, num_layers=2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[..., None])[0][:, -1])


class AsksForGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.is_grad_enabled() else x.clamp(max=1.5)


class PopsItsInput(nn.Module):
    """Changes the list that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.head(self.body(x.pop()).relu())


@pytest.mark.parametrize(
    "make",
    [
        Recurrent,
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(SIZE, SIZE), AsksForGradients()), nn.Sequential(), nn.Linear(SIZE, 4)
        ),
    ],
)
def test_values_are_computed_with_gradients_on_or_off_as_in_the_loop(make) -> None:
    # in order: with AVX2, an LSTM of oneDNN's rounds samples by their place
    plain, _ = trained(make, ("head", "2"), cached=False, shuffle=False)
    cached, text = trained(make, ("head", "2"), cached=True, shuffle=False)
    assert_same(plain, cached)
    assert "cut at" in text


def test_a_model_may_change_the_list_it_is_called_with() -> None:
    model = PopsItsInput()
    model.body.requires_grad_(False)
    data = TensorDataset(torch.randn(8, SIZE), torch.arange(8) % 4)
    cache = layerwise.PrefixCache(model, DataLoader(data, 4), storage="memory")
    for _ in range(2):
        for x, y in cache.batches():
            argument = [x]
            nn.functional.cross_entropy(model(argument), y).backward()
            assert not argument
    assert "cut at" in cache.describe()
