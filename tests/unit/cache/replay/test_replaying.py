"""A replayed pass: which calls are answered, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import layerwise
from cache_loops import both, freeze_prefix, images
from layerwise.cache.replay.ghost import ghost
from layerwise.cache.replay.replaying import check_replayed
from layerwise.errors import CacheError


class Frozen(nn.Module):
    """Gives its first argument as it is, and features of the second, made by `last` in the end."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), last

    def forward(self, given: Any, x: Tensor) -> Any:
        return given, self.last(self.first(x))


class Net(nn.Module):
    """A module that is called within a frozen one is also called by the model itself; `run` does it all."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.shared, self.neck, self.head = nn.Linear(8, 8), nn.Linear(192, 8), nn.Linear(8, 4)
        self.body, self.run = Frozen(self.shared), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x.flatten(1))


def called_again(model: Any, x: Tensor) -> Tensor:
    _, features = model.body(None, x)
    return model.head(features.tanh() * model.neck(x) + model.shared(features))


def handed_through(model: Any, x: Tensor) -> Tensor:
    learned, features = model.body(model.neck(x), x)
    return model.head(learned * features)


@pytest.mark.parametrize(
    ("run", "where"), [(called_again, "cut at body, shared#1 "), (handed_through, "cut at body[1] ")]
)
def test_calls_within_a_skipped_one(run, where) -> None:
    # they count, though they do not happen; what a module hands through is that of the replay
    assert where in both(lambda: Net(run), images, "neck", "head").text


def test_a_part_of_the_model_has_a_cache_of_its_own() -> None:
    # in a loop over both, in whatever order
    data = images()

    def run(cached: bool) -> tuple[list[float], list[Any]]:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        model = nn.Sequential(body, nn.Flatten(), nn.Linear(64, 4))
        freeze_prefix(model, "2")
        loaders = [DataLoader(data, 4, shuffle=True), DataLoader(data, 4)]
        caches = [layerwise.PrefixCache(*pair) for pair in zip((model, body), loaders)] if cached else []
        optimizer, losses = torch.optim.SGD(model[2].parameters(), 0.1), []
        for _ in range(3):
            for (x, y), (other, _) in zip(*((c.batches() for c in caches) if cached else loaders)):
                loss = (
                    nn.functional.cross_entropy(model(x), y) + model[2](body(other).flatten(1)).square().sum()
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, caches

    (plain, _), (losses, caches) = run(False), run(True)
    assert losses == plain
    assert all("memory, cut at" in cache.describe() for cache in caches)


def test_an_output_that_was_not_computed_is_an_error() -> None:
    check_replayed({"logits": torch.ones(2, 3)}, set())
    with pytest.raises(CacheError, match=r"shape \(2, 3\) that was not computed"):
        check_replayed({"logits": ghost((2, 3), torch.float32)}, set())
