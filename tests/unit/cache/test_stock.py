"""Where values are kept when room is short, and when what is found in a folder is not what is computed."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import layerwise
from cache_loops import assert_same, both, images, train
from helpers import TinyCNN
from layerwise.cache import stock
from layerwise.cache.stock import CachePool
from layerwise.cache.store import column, decision
from layerwise.errors import LayerwiseWarning
from layerwise.files import sha256

LAST = ("layer2", "fc")


def test_values_of_another_machine_are_not_taken(tmp_path: Path) -> None:
    # a folder that machines share holds numbers whose last bits are those of another processor
    options = {"cached": True, "storage": "disk", "folder": tmp_path}
    train(TinyCNN, images(), *LAST, **options)
    for folder in tmp_path.iterdir():
        meta = json.loads((folder / "meta.json").read_text())
        if "layer1" in meta["what"]:
            size = meta["rows"] * math.prod(meta["shape"])
            torch.from_file(str(folder / "rows.bin"), shared=True, size=size).mul_(1 + 1e-6)
            (folder / "meta.json").write_text(json.dumps(meta | {"sha256": sha256(folder / "rows.bin")}))
    plain = train(TinyCNN, images(), *LAST, cached=False)
    cached = train(TinyCNN, images(), *LAST, **options)
    assert_same(plain, cached)
    assert "disk, cut at layer1" in cached.text
    assert len(list(tmp_path.iterdir())) == 2  # and nothing half-made


def test_values_of_another_kind_of_processor_have_a_name_of_their_own(tmp_path: Path, monkeypatch) -> None:
    options = {"cached": True, "storage": "disk", "folder": tmp_path}
    train(TinyCNN, images(), *LAST, **options)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    train(TinyCNN, images(), *LAST, **options)
    assert len(list(tmp_path.iterdir())) == 4  # the value and the labels, twice


class Drawn(Dataset[Any]):
    """Each sample is drawn in one of seven kinds, which its label tells, as a mask tells of a crop."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 7, ())
        return torch.full((8,), float(kind)), kind


@pytest.mark.parametrize("lasting", [True, False])
def test_each_cache_has_draws_of_its_own(tmp_path, lasting) -> None:
    # else one would find labels that belong to the draws of another
    data, pool = Drawn(), None if lasting else CachePool()
    caches = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 7))
        model[0].weight.data.copy_(torch.eye(8))
        model[0].requires_grad_(False)
        loader = DataLoader(data, 4, shuffle=True)
        cache = layerwise.PrefixCache(
            model, loader, storage="disk" if lasting else "memory", views=2, pool=pool,
            folder=tmp_path if lasting else None,
        )  # fmt: skip

        caches.append((model, cache))
    kinds: list[Tensor] = []
    for model, _ in caches:
        model[1].register_forward_pre_hook(lambda _, args: kinds.append(args[0][:, 0].round().long()))
    for _ in range(4):
        for model, cache in caches:
            for x, y in cache.batches():
                nn.functional.cross_entropy(model(x), y).backward()
                assert torch.equal(kinds[-1], y)
            assert "cut at" in cache.describe()
    assert not list(tmp_path.glob("[0-9a-f]*"))


@pytest.mark.parametrize("lasting", [True, False])
def test_each_tensor_of_a_batch_has_a_name_of_its_own(tmp_path, lasting) -> None:
    # else what is found of the second is what was stored of the first, as they look the same
    class Two(Dataset[Any]):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
            return torch.full((3, 8, 8), index / 22), torch.tensor(index % 4), torch.tensor(index % 3)

    def step(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        return nn.functional.cross_entropy(output, batch[1]) - nn.functional.cross_entropy(output, batch[2])

    where = {"storage": "disk", "folder": tmp_path} if lasting else {"pool": CachePool()}
    for _ in range(2):
        assert "cut at layer1" in both(TinyCNN, Two, *LAST, step=step, **where).text


class Activated(TinyCNN):
    def forward(self, images: Tensor, activation: Any) -> Tensor:  # type: ignore[override]
        return activation(super().forward(images))


def test_a_function_that_the_model_is_given_has_the_same_name_in_each_run(tmp_path, caplog) -> None:
    # and not that of its place in memory
    caplog.set_level("INFO", logger="layerwise.cache")
    for _ in range(2):

        def double(x: Tensor) -> Tensor:
            return 2 * x

        def step(model: nn.Module, batch: Any, activation: Any = double) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0], activation), batch[1])

        train(Activated, images(), *LAST, cached=True, storage="disk", folder=tmp_path, step=step)
    assert "found the values at layer1, computed before" in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


def test_two_functions_of_one_name_are_told_apart(tmp_path) -> None:
    # by their code, and by what they hold
    def times(count: int) -> Any:
        return lambda x: count * x

    for activation in (times(2), times(3), *(lambda x: x + 1, lambda x: x + 2), times(2)):

        def step(model: nn.Module, batch: Any, activation: Any = activation) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0], activation), batch[1])

        train(Activated, images(), *LAST, cached=True, storage="disk", folder=tmp_path, step=step)
    assert len(list(tmp_path.iterdir())) == 4 * 2  # the value and the labels


class Roots(nn.Module):
    """Its frozen values hold missing numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.head = nn.Sequential(nn.Flatten(), Roots.Root(), nn.Linear(192, 8)), nn.Linear(8, 4)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 3, torch.nan, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.low(x).nan_to_num())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_missing_numbers_are_no_other_values_than_those_found(tmp_path, caplog, dtype) -> None:
    caplog.set_level("INFO", logger="layerwise.cache")
    for _ in range(2):
        options = {"storage": "disk", "folder": tmp_path, "dtype": dtype, "exact": dtype is None}
        cached = train(Roots, images(), "head", cached=True, **options)
        assert "disk, cut at low" in cached.text
    assert "found the values at low, computed before" in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


class Narrowing(nn.Module):
    """The value that a later phase needs is eight times as large as that of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean((2, 3)))


def unfrozen(budget_bytes: int | None, *, cached: bool = True) -> tuple[dict[str, Tensor], str, set[str]]:
    """Train the head, then more; return the weights, what is told, and where the first phase kept values."""
    torch.manual_seed(0)
    model, data = Narrowing(), images(16)
    loader = DataLoader(data, batch_size=4)
    layers = layerwise.layer_map(model, data.inputs[:2])
    plan = layerwise.gradual_unfreezing(layers, epochs=9)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(loader), layers=layers
    )
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, budget_bytes=budget_bytes)
    places: list[set[str]] = []
    for _ in tuner.epochs():
        model.train()
        for x, y in cache.batches() if cached else loader:
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
        places.append({column.where for column in cache.stock._held})
    return model.state_dict(), cache.describe(), places[0]


@pytest.mark.parametrize(
    ("budget_bytes", "free_bytes", "first", "told"),
    [
        (None, 2**30, {"memory"}, "memory, cut at low"),
        (4_000, 2**30, {"memory", "disk"}, "disk, cut at low"),
        (4_000, 4_000, {"memory"}, "fit neither in the budget of memory"),
    ],
)
def test_a_later_phase_takes_what_room_there_is(monkeypatch, budget_bytes, free_bytes, first, told) -> None:
    # in memory up to the budget, else on the disk; else it is looked at again when it comes
    monkeypatch.setattr(decision, "_LEAST_GAIN", 0.0)
    monkeypatch.setattr(stock, "free_disk_bytes", lambda folder: free_bytes)
    plain, *_ = unfrozen(None, cached=False)
    cached, text, places = unfrozen(budget_bytes)
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    assert places == first
    assert "memory, cut at" in text.splitlines()[0]
    assert told in text


def test_a_disk_that_is_full_for_a_later_phase_costs_that_phase_alone(monkeypatch) -> None:
    # a quota does not show in the free space
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decision, "_LEAST_GAIN", 0.0)
    monkeypatch.setattr(column, "reserve_file", full)
    with pytest.warns(LayerwiseWarning, match="No space left on device"):
        _, text, places = unfrozen(4_000)
    assert places == {"memory"}
    assert "memory, cut at" in text.splitlines()[0]
    assert "No space left on device" in text
