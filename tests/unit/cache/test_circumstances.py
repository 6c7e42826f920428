"""What else may decide what a frozen part computes: modes, gradients on or off, autocast, other samples.

Each loop ends in the losses, weights and buffers of the loop with the loader alone, and `describe` says why
where nothing is cached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from layerwise.cache.cutting.search import find_cut
from layerwise.cache.proof.mixing import compare_skeletons
from layerwise.cache.replay.capturing import capture
from layerwise.cache.replay.replaying import Replay, check_replayed
from layerwise.errors import CacheError
from layerwise.layers.recording import record
from layerwise.tuning.modes import pin_eval

FROZEN = ("body", "tail", "rnn")
CLASSES = 4


class Net(nn.Module):
    """A frozen body and tail, a head that learns."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body, self.tail, self.head = nn.Linear(width, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.body(x)).float().relu())


class Centred(Net):
    """Subtracts a running mean, which the same pass moves afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        output = self.head(self.tail(features - self.centre).relu())
        with torch.no_grad():
            self.centre.mul_(0.9).add_(features.mean(0), alpha=0.1)
        return output


class Scaled(Net):
    """Its own code does something else in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x) if self.training else self.body(x) * 0.8
        return self.head(self.tail(features).relu())


class Shifted(Net):
    """A parameter that learns, later than the first epoch, stands between the frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.body(x) + self.shift).float().relu())


class Recurrent(nn.Module):
    """Its kernel rounds otherwise where no gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class SideAdapter(nn.Module):
    """Features are left in a list for an adapter that begins at zero: a cut that no gradient would show."""

    class Body(nn.Linear):
        def forward(self, x: Tensor, kept: list[Tensor]) -> Tensor:  # type: ignore[override]
            kept.append(super().forward(x).relu())
            return kept[-1]

    def __init__(self) -> None:
        super().__init__()
        self.body, self.adapter, self.head = self.Body(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        y = self.body(x, kept)
        return self.head(y + sum(self.adapter(features) for features in kept))


class PooledCheckpoint(nn.Module):
    """A block that learns is checkpointed, and takes what the model's own code pools."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, CLASSES)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.body(x).mean(1), use_reentrant=False))


class Tied(Net):
    """A frozen weight lies in the memory of one that learns."""

    def __init__(self) -> None:
        super().__init__(width=8)
        self.decoder = nn.Linear(8, 8)
        self.decoder.weight = nn.Parameter(self.body.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.body(x)).relu())


class Padded(nn.Module):
    """torch's own encoder, whose fast path leaves the padding of a batch out."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.body, self.tail = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, CLASSES)
        pin_eval(self.tail.modules())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tail(self.body(ids), src_key_padding_mask=ids == 0)[:, 0])


class Branching(nn.Module):
    """Integers choose between two frozen layers; a batch-norm learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.norm(self.chosen(mask)(x)))

    def chosen(self, mask: Tensor) -> nn.Module:
        return self.body if bool((mask == 0).any()) else self.tail


class PooledBranching(Branching):
    """What is stored is what the head takes, whichever layer computed it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.chosen(mask)(x).tanh().mean(1))


class Positions(nn.Linear):
    """Adds a table that is made anew, and with other numbers, when a longer text comes."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.linspace(0, 1, x.shape[1])[:, None]
        return super().forward(x) + self.table[: x.shape[1]]


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Positions(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().mean(1))


class Lengths(torch.utils.data.Dataset[Any]):
    """The second half of the samples is longer."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4 if index < 8 else 6, 8, generator=generator), index % CLASSES


@dataclass
class Run:
    """One run: what a loop needs, and what it noted."""

    cached: bool
    model: nn.Module
    data: Any
    loader_options: dict[str, Any]
    numbers: list[float] = field(default_factory=list)
    cache: layerwise.PrefixCache | None = None

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        self.loader: DataLoader[Any] = DataLoader(
            self.data, **{"batch_size": 4, "shuffle": True} | self.loader_options
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        if self.cached:
            self.cache = layerwise.PrefixCache(self.model, self.loader, storage="memory")

    def batches(self) -> Iterator[Any]:
        return iter(self.loader if self.cache is None else self.cache.batches())

    def loss(self, batch: Any) -> Tensor:
        *inputs, y = batch
        return nn.functional.cross_entropy(self.model(*inputs), y)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.numbers.append(loss.item())

    def look(self) -> None:
        """Note the losses of an epoch without gradients, on the very samples that are trained on."""
        with torch.no_grad():
            self.numbers += [self.loss(batch).item() for batch in self.batches()]


def samples(*shape: int, count: int = 18) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, *shape, generator=generator), torch.arange(count) % CLASSES)


def trained(run: Run, epochs: int = 3) -> None:
    for _ in range(epochs):
        for batch in run.batches():
            run.step(run.loss(batch))


def seen_twice(run: Run) -> None:
    for _ in range(3):
        for batch in run.batches():
            with torch.no_grad():
                run.numbers.append(run.loss(batch).item())
            run.step(run.loss(batch))


def evaluated(run: Run) -> None:
    for _ in range(4):
        run.model.train()
        trained(run, epochs=1)
        run.model.eval()
        run.look()


def looked_at_in_the_same_mode(run: Run) -> None:
    for _ in range(3):
        trained(run, epochs=1)
        run.look()


def looked_at_first(run: Run) -> None:
    run.look()
    trained(run)


def trained_under_autocast_alone(run: Run) -> None:
    for _ in range(4):
        run.model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trained(run, epochs=1)
        run.model.eval()
        run.look()


def under_autocast_and_more_learns_later(run: Run) -> None:
    for epoch in range(4):
        for parameter in run.model.tail.parameters() if epoch == 1 else ():
            parameter.requires_grad_(True)
        for number, batch in enumerate(run.batches()):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=epoch > 0 and number != 2):
                loss = run.loss(batch)
            run.step(loss)


def weights_rounded_for_the_pass(run: Run) -> None:
    for _ in range(4):
        for batch in run.batches():
            full = [parameter.detach().clone() for parameter in run.model.parameters()]
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.copy_((parameter * 4).round() / 4)
            loss = run.loss(batch)
            run.optimizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter, value in zip(run.model.parameters(), full):
                    parameter.copy_(value)
            run.optimizer.step()
            run.numbers.append(loss.item())


def transformed_now_and_then(run: Run) -> None:
    weights = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    for epoch in range(3):
        for x, y in run.batches():
            if epoch == 1:
                loss = lambda w: nn.functional.cross_entropy(functional_call(run.model, w, (x,)), y)  # noqa: B023, E731
                run.numbers.append(grad(loss)(weights)["head.weight"].norm().item())
            run.step(run.loss((x, y)))


class Collate:
    """Its setting follows a schedule."""

    scale = 1.0

    def __call__(self, chosen: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in chosen]) * self.scale, torch.stack([y for _, y in chosen])


def collated_otherwise_later(run: Run) -> None:
    for epoch in range(4):
        run.loader.collate_fn.scale = 1.0 if epoch < 2 else 2.0
        trained(run, epochs=1)


@dataclass
class Case:
    """A model, its data, what a loop does, and what `describe` says then."""

    model: Callable[[], nn.Module]
    loop: Callable[[Run], None]
    told: str
    data: Callable[[], Any] = lambda: samples(8)
    options: dict[str, Any] = field(default_factory=dict)


def texts() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (24, 12), generator=generator)
    lengths = torch.randint(4, 12, (24, 1), generator=generator)
    return TensorDataset(ids * (torch.arange(12) < lengths), torch.arange(24) % CLASSES)


def masked(*places: int, shape: tuple[int, ...] = (8,), count: int = 24) -> TensorDataset:
    mask = torch.ones(count, dtype=torch.long)
    mask[list(places)] = 0
    return TensorDataset(samples(*shape, count=count).tensors[0], mask, torch.arange(count) % CLASSES)


DROPPED = {"batch_size": 5, "drop_last": True}  # an evaluation meets samples that the epoch before left out
IN_TURN = {"batch_size": 8, "shuffle": False}
OTHER = "cut at .*\n.*off: the value at .* is not what was stored"
CASES = {
    "a buffer that the pass moves": Case(Centred, seen_twice, "cut at body .*'centre' that the pass changes"),
    "the model's mode": Case(Scaled, evaluated, OTHER, options=DROPPED),
    "gradients, twice": Case(Recurrent, seen_twice, "cut at", lambda: samples(12, 64), IN_TURN),
    "gradients, by turns": Case(
        Recurrent, looked_at_in_the_same_mode, OTHER, lambda: samples(12, 64), IN_TURN
    ),
    "no gradients first": Case(SideAdapter, looked_at_first, "off: a replayed batch is not the plain one"),
    "autocast": Case(Net, trained_under_autocast_alone, OTHER, options=DROPPED),
    "autocast later": Case(Shifted, under_autocast_and_more_learns_later, "cut at body"),
    "a checkpoint behind a pooling": Case(PooledCheckpoint, trained, "cut at body", lambda: samples(5, 6)),
    "memory of a weight that learns": Case(
        Tied, looked_at_in_the_same_mode, "'body.weight', which learns", lambda: samples(8)
    ),
    "lengths of other texts": Case(Padded, trained, "off: the frozen part lays the samples", texts),
    "weights at the time of the call": Case(
        Net, weights_rounded_for_the_pass, "off: the frozen weights change while an epoch runs"
    ),
    "another branch beside strange samples": Case(
        Branching, trained, "off: body runs for some samples", lambda: masked(3, 10, 20, count=23), IN_TURN
    ),
    "a table for longer texts": Case(
        Positioned, trained, "cut at", Lengths, {"batch_size": 4, "shuffle": False}
    ),
    "a transform of torch.func": Case(Net, transformed_now_and_then, "off: a transform of torch.func"),
    "settings of collate_fn": Case(
        Net, collated_otherwise_later, "cut at tail", options={"collate_fn": Collate()}
    ),
}


def outcome(case: Case, cached: bool) -> Run:
    torch.manual_seed(0)
    run = Run(cached, case.model(), case.data(), case.options)
    case.loop(run)
    return run


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:The prefix cache is off", "ignore:The PyTorch API of nested tensors")
def test_ends_as_with_the_loader_alone(case: Case) -> None:
    plain, cached = outcome(case, cached=False), outcome(case, cached=True)
    assert cached.numbers == plain.numbers
    weights = cached.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())
    assert cached.cache is not None
    assert re.search(case.told, cached.cache.describe(), re.DOTALL), cached.cache.describe()


def test_other_frozen_modules_than_were_recorded_are_an_error() -> None:
    # the head takes what is stored, so nothing asks for what the other layer would have computed
    model = PooledBranching()
    x, mask, _ = masked(*range(4), shape=(5, 8), count=4).tensors
    cut = find_cut(record(model, (x, mask)), frozenset({"head.weight", "head.bias"}))
    assert [str(site) for site in cut.frontier] == ["input of head"]
    found, part = (capture(model, [cut], ((x[:n], mask[:n]), {}), batch=n) for n in (4, 2))
    compare_skeletons(found.skeletons, part.skeletons)
    options = {"batch": 4, "device": torch.device("cpu")}
    with Replay(cut, found.values, found.skeletons, **options) as replay:
        check_replayed(model(x, mask), replay.not_come)
    with Replay(cut, found.values, found.skeletons, **options) as replay:
        output = model(x, torch.ones_like(mask))
    with pytest.raises(CacheError, match=r"took another way than on the first batch: 'body' was not called"):
        check_replayed(output, replay.not_come)
