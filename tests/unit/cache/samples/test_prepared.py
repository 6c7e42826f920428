"""Loops of Accelerate: its prepared loaders keep account of the epoch's end, and are cached all the same."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import layerwise
from cache_loops import freeze_prefix, images
from helpers import TinyCNN
from layerwise.cache.samples.prepared import stand_in


@pytest.fixture(autouse=True)
def no_former_state() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Ended:
    """What a run ended with."""

    weights: dict[str, Tensor]
    ends: list[tuple[bool, int, bool]]
    """For each step: last batch of the epoch, samples left over, gradients are synchronised."""
    predicted: list[Tensor]
    loads: list[int]
    told: str = ""


def run(
    *, cached: bool, precision: str = "no", accumulated: int = 2, workers: int = 0, count: int = 22
) -> Ended:
    """Train for four epochs as Accelerate's documentation does."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulated)
    torch.manual_seed(0)
    model = TinyCNN()
    freeze_prefix(model, "layer2", "fc")
    data, held_out = images(count), images(10)
    loaders = [
        DataLoader(data, batch_size=4, shuffle=True, num_workers=workers),
        DataLoader(held_out, batch_size=4),
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, *loaders)
    cache = layerwise.PrefixCache(prepared, loader, storage="memory")
    ended = Ended({}, [], [], [])
    for _ in range(4):
        before = data.loads
        prepared.train()
        for x, y in cache.batches() if cached else loader:
            state = accelerator.gradient_state
            with accelerator.accumulate(prepared), accelerator.autocast():
                ended.ends.append((state.end_of_dataloader, state.remainder, state.sync_gradients))
                accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
                optimizer.step()
                optimizer.zero_grad()
        ended.loads.append(data.loads - before)
        prepared.eval()
        with torch.no_grad():
            for x, y in cache.batches(val_loader) if cached else val_loader:
                ended.predicted.append(accelerator.gather_for_metrics((prepared(x), y))[0])
    ended.weights = {
        name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()
    }
    ended.told = cache.describe()
    return ended


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"accumulated": 1}, {"workers": 1}], ids=str)
def test_a_prepared_loop_is_cached_exactly(options) -> None:
    # under bf16 the model itself enters autocast within that of the loop, whose memory of cast weights must
    # not hold those of a recording
    plain, cached = run(cached=False, **options), run(cached=True, **options)
    assert all(torch.equal(value, cached.weights[name]) for name, value in plain.weights.items())
    assert cached.ends == plain.ends
    assert all(map(torch.equal, cached.predicted, plain.predicted))
    assert "cut at layer1" in cached.told
    assert "off" not in cached.told


def test_a_prepared_loader_loads_nothing_again() -> None:
    assert run(cached=True, count=24).loads[-1] == 0
    assert run(cached=False, count=24).loads[-1] == 24


@pytest.mark.parametrize("again", [copy.copy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_stand_in_can_be_copied(again) -> None:
    # frameworks copy the loaders that they are given
    loader = again(stand_in(DataLoader(torch.arange(6), 2), functools.partial(iter, [1, 2])))
    assert list(loader) == [1, 2]
    assert (len(loader), loader.batch_size) == (3, 2)
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'missing'"):
        _ = loader.missing


def test_stand_ins_that_are_iterated_together() -> None:
    # a loader's iterator draws when it is made: the second one's before the order of the first is drawn
    def epochs(cached: bool) -> list[Any]:
        cache = layerwise.PrefixCache(TinyCNN(), storage="memory")
        plain = [DataLoader(images(count), 4, shuffle=True) for count in (12, 8)]
        loaders = [cache.as_loader(loader) for loader in plain] if cached else plain
        torch.manual_seed(3)
        iterators = list(map(iter, loaders))
        seen = [next(iterator)[1].tolist() for _ in range(2) for iterator in iterators]
        return [*seen, torch.get_rng_state().tolist()]

    assert epochs(cached=True) == epochs(cached=False)
