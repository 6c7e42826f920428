"""A user's training loop, plain and cached, to compare bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from layerwise.errors import LayerwiseWarning
from layerwise.tuning.modes import pin_eval


class Counted(Dataset[Any]):
    """Samples in memory that count how often they are loaded."""

    def __init__(self, inputs: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor] | None = None):
        self.inputs, self.labels, self.transform = inputs, labels, transform
        self.loads = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.loads += 1
        x = self.inputs[index]
        return (x if self.transform is None else self.transform(x)), self.labels[index]


def images(count: int = 22, size: int = 8, classes: int = 4) -> Counted:
    generator = torch.Generator().manual_seed(1)
    return Counted(
        torch.randn(count, 3, size, size, generator=generator),
        torch.randint(0, classes, (count,), generator=generator),
    )


def freeze_prefix(model: nn.Module, *learning: str) -> None:
    """Let only the children `learning` learn, and hold the others in eval mode."""
    for name, child in model.named_children():
        for parameter in child.parameters():
            parameter.requires_grad_(name in learning)
        if name not in learning and any(True for _ in child.parameters()):
            pin_eval(child.modules())
    model.train()


@dataclass
class Outcome:
    """What a run ended with."""

    weights: dict[str, Tensor]
    losses: list[float]
    random: Tensor
    loads: list[int] = field(default_factory=list)
    text: str = ""
    cache: Any = None


def train(
    make: Callable[[], nn.Module],
    data: Any,
    *learning: str,
    cached: bool,
    epochs: int = 3,
    batch: int = 4,
    validate: bool = False,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    before_epoch: Callable[[nn.Module, int], None] | None = None,
    loader_options: dict[str, Any] | None = None,
    through: Callable[[Any], Any] = iter,
    **options: Any,
) -> Outcome:
    """Train.

    Args:
        step: returns the loss of a batch; default: cross-entropy of ``model(x)``.
        through: what the loop does with an epoch's batches before it takes one.
    """
    torch.manual_seed(0)
    model = make()
    freeze_prefix(model, *learning)
    loader: DataLoader[Any] = DataLoader(
        data, **{"batch_size": batch, "shuffle": True, **(loader_options or {})}
    )
    held_out: DataLoader[Any] = DataLoader(data, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cache = layerwise.PrefixCache(model, loader, **{"storage": "memory", **options}) if cached else None
    step = step or (lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]))
    outcome = Outcome({}, [], torch.empty(0), cache=cache)
    torch.manual_seed(5)
    for epoch in range(epochs):
        model.train()
        if before_epoch is not None:
            before_epoch(model, epoch)
        loads = getattr(data, "loads", 0)
        for item in through(loader if cache is None else cache.batches()):
            optimizer.zero_grad()
            loss = step(model, item)
            loss.backward()
            optimizer.step()
            outcome.losses.append(loss.item())
        if validate:
            model.eval()
            with torch.no_grad():
                for item in held_out if cache is None else cache.batches(held_out):
                    outcome.losses.append(step(model, item).item())
        outcome.loads.append(getattr(data, "loads", 0) - loads)
    outcome.random = torch.get_rng_state()
    outcome.weights = {name: value.clone() for name, value in model.state_dict().items()}
    if cache is not None:
        outcome.text = cache.describe()
    return outcome


def assert_same(one: Outcome, other: Outcome) -> None:
    """Raise unless two runs are equal bit for bit: losses, weights, buffers, random numbers after."""
    assert one.losses == other.losses
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        assert torch.equal(value, other.weights[name]), name
    assert torch.equal(one.random, other.random)


def both(make: Callable[[], nn.Module], data: Callable[[], Any], *learning: str, **options: Any) -> Outcome:
    """Return a cached run after comparing it with the plain one; the weights must have moved."""
    shared = {
        k: options.pop(k)
        for k in ("epochs", "batch", "validate", "step", "before_epoch", "loader_options", "through")
        if k in options
    }
    plain = train(make, data(), *learning, cached=False, **shared)
    cached = train(make, data(), *learning, cached=True, **shared, **options)
    assert_same(plain, cached)
    torch.manual_seed(0)
    start = make().state_dict()
    assert any(not torch.equal(start[name], value) for name, value in cached.weights.items())
    return cached


def off(
    make: Callable[[], nn.Module], data: Callable[[], Any], *learning: str, warns: bool = True, **options: Any
) -> str:
    """Return why a run is not cached, after comparing it with the plain one."""
    keys = ("batch", "step", "before_epoch", "loader_options", "through")
    shared = {k: options.pop(k) for k in keys if k in options}
    plain = train(make, data(), *learning, cached=False, **shared)
    if warns:
        with pytest.warns(LayerwiseWarning, match="The prefix cache is off") as found:
            cached = train(make, data(), *learning, cached=True, **shared, **options)
        ours = [one.filename for one in found if one.category is LayerwiseWarning]
        assert not any(Path(file).is_relative_to(Path(layerwise.__file__).parent) for file in ours), ours
    else:
        cached = train(make, data(), *learning, cached=True, **shared, **options)
    assert_same(plain, cached)
    assert "off" in cached.text
    return cached.text


def unfreeze_gradually(
    model: nn.Module, data: Counted, *, cached: bool, shuffle: bool = True, **options: Any
) -> tuple[dict[str, Tensor], str]:
    """Return the weights after gradual unfreezing over 6 epochs, and what the cache says."""
    loader = DataLoader(data, batch_size=4, shuffle=shuffle)
    layers = layerwise.layer_map(model, data.inputs[:2])
    plan = layerwise.gradual_unfreezing(layers, epochs=6)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(loader), layers=layers
    )
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, storage="memory", **options)
    for _ in tuner.epochs():
        model.train()
        for x, y in cache.batches() if cached else loader:
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
    return {name: value.clone() for name, value in model.state_dict().items()}, cache.describe()
