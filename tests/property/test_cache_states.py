"""A model that changes while it is trained: modes, attributes, who learns, gradients, from batch to batch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import layerwise

pytestmark = pytest.mark.filterwarnings("ignore:The prefix cache is off")

WIDTH, PARTS, SAMPLES = 16, 3, 24
KINDS = ("attribute in a value", "in a constant", "in a number", "mode in all", "batch-norm")


class Part(nn.Module):
    """Gives a value, a table and a number; one of them follows an attribute or the mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.scale = kind, 1.0
        self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH) if kind == "batch-norm" else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        h = self.norm(self.linear(x)).relu()
        if self.kind == "attribute in a value":
            return h * self.scale, self.table, 1.0
        if self.kind == "in a constant":
            return h, self.table * self.scale, 1.0
        if self.kind == "mode in all":
            return h * (1 + self.training), self.table * self.scale, 1.0 + self.training
        return h, self.table, self.scale


class Net(nn.Module):
    """Parts in a row. It returns their numbers as well."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.parts, self.head = nn.ModuleList(map(Part, kinds)), nn.Linear(WIDTH, 4)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, list[float]]:
        tables, numbers = torch.zeros(4), []
        for part in self.parts:
            x, table, number = part(x)
            tables = tables + table[:4]
            numbers.append(number)
        return (self.head(x) + tables) * sum(numbers) * self.temperature, numbers


class Given(Sampler[list[int]]):
    """Gives the batches of each epoch in turn."""

    def __init__(self, epochs: list[list[list[int]]], draws_at_once: bool) -> None:
        self.epochs, self.begun, self.draws_at_once = epochs, 0, draws_at_once

    def __iter__(self) -> Any:
        self.begun += 1
        return iter(self.epochs[self.begun - 1])

    def __len__(self) -> int:
        return len(self.epochs[self.begun - 1])


@dataclass
class Story:
    """A random run.

    Attributes:
        epochs: batches of indices.
        frozen: how many parts are frozen in each epoch.
        events: what happens before each batch of each epoch.
    """

    kinds: list[str]
    epochs: list[list[list[int]]]
    frozen: list[int]
    events: list[list[list[tuple[str, int, int]]]]
    early: bool
    has_pool: bool
    upcoming: bool

    @classmethod
    def of(cls, seed: int) -> Story:
        dice = random.Random(seed)
        kinds = [dice.choice(KINDS) for _ in range(PARTS)]
        often, varied = dice.random() < 0.5, dice.random() < 0.4
        what = dice.choice(
            [["scale"], ["mode"], ["temperature"], ["scale", "mode", "temperature", "gradients"]]
        )
        frozen, now, epochs, events = [], PARTS, [], []
        for _ in range(dice.randrange(4, 8)):
            if dice.random() < 0.4:
                now = max(0, now - 1) if dice.random() < 0.7 else min(PARTS, now + 1)
            frozen.append(now)
            order, batches = dice.sample(range(SAMPLES), SAMPLES), []
            while order:
                size = dice.choice([2, 4]) if varied else 4
                batches.append(order[:size])
                order = order[size:]
            epochs.append(batches)
            part = dice.randrange(PARTS)
            events.append(
                [
                    [(dice.choice(what), part, dice.randrange(2))]
                    if dice.random() < (0.5 if often else 0.7 * (number == 0))
                    else []
                    for number in range(len(batches))
                ]
            )
        early, has_pool, upcoming = (dice.random() < share for share in (0.5, 0.4, 0.7))
        return cls(kinds, epochs, frozen, events, early, has_pool, upcoming)

    def learning(self, model: nn.Module, frozen: int) -> frozenset[str]:
        names = (name for name, _ in model.named_parameters())
        return frozenset(n for n in names if n.startswith("head") or int(n.split(".")[1]) >= frozen)


def run(story: Story, *, cached: bool) -> tuple[list[Any], dict[str, Tensor], int]:
    """Return losses and numbers, the weights at the end, and how many batches were ghosts."""
    torch.manual_seed(0)
    model = Net(story.kinds)
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, torch.arange(SAMPLES) % 4)
    loader = DataLoader(data, batch_sampler=Given(story.epochs, story.early))
    upcoming = {story.learning(model, frozen): 2 for frozen in set(story.frozen)} if story.upcoming else {}
    pool = layerwise.CachePool(upcoming=upcoming) if story.has_pool or story.upcoming else None
    cache = layerwise.PrefixCache(model, loader, storage="memory", pool=pool)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen, ghosts, gradients = [], 0, True
    for frozen, changes in zip(story.frozen, story.events):
        for number, part in enumerate(model.parts):
            part.requires_grad_(number >= frozen).train(number >= frozen)
        batches = iter(cache.batches() if cached else loader)
        for events in changes:
            for what, number, value in events:
                if what == "scale":
                    model.parts[number].scale = 1.0 + value
                elif what == "mode" and number < frozen:
                    model.parts[number].train(bool(value))
                elif what == "temperature":
                    model.temperature = 1.0 + value
                elif what == "gradients":
                    gradients = bool(value)
            x, y = next(batches)
            ghosts += type(x) is not Tensor
            with torch.set_grad_enabled(gradients):
                logits, numbers = model(x)
                loss = nn.functional.cross_entropy(logits, y)
            if gradients:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seen.append((loss.item(), numbers))
    return seen, {name: value.clone() for name, value in model.state_dict().items()}, ghosts


SEEDS = range(24)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_changes_is_trained_as_without_the_cache(seed: int) -> None:
    story = Story.of(seed)
    plain, plain_weights, _ = run(story, cached=False)
    cached, cached_weights, _ = run(story, cached=True)
    assert plain == cached
    for name, value in plain_weights.items():
        assert torch.equal(value, cached_weights[name]), name


def test_such_runs_are_replayed() -> None:
    assert sum(run(Story.of(seed), cached=True)[2] > 0 for seed in SEEDS) > len(SEEDS) // 2
