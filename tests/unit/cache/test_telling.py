"""What people are told of a cache."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import layerwise
from cache_loops import Counted, both, images
from helpers import TinyCNN
from layerwise.cache.samples.feed import Phase
from layerwise.cache.store.decision import Decision
from layerwise.cache.telling import merged


def test_phases_of_several_shapes_are_told_as_one() -> None:
    cached = Phase(decision=Decision("memory", "asked for", 10, 6))
    stored = Phase(decision=Decision("memory", "stored in an earlier pass", 0, 2))
    alone = Phase(decision=Decision("off", "only one sample has this shape"))
    assert merged([alone]) is alone
    told = merged([cached, stored, alone]).decision
    assert told is not None
    assert (told.bytes_per_sample, told.samples) == (8, 8)
    assert told.reason == (
        "asked for; samples have 3 shapes, 60 B in all; 1 of them not cached: only one sample has this shape"
    )
    unseen = merged([cached, Phase()]).decision  # of one shape no batch could be looked at
    assert unseen is not None
    assert unseen.reason == "asked for; samples have 2 shapes, 60 B in all"
    told = merged([stored, stored]).decision
    assert told is not None
    assert told.reason == "stored in an earlier pass; samples have 2 shapes"


class Texts(Dataset):
    """Samples of two lengths, the second of which may grow."""

    longer = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.ones(4 if index < 4 else 6 + self.longer, 3), index % 2


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_shape_of_which_no_batch_was_as_before_can_be_told() -> None:
    # the loader is given up where a first batch of one shape is longer than its samples were
    model, data = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 2)), Texts()
    model[:2].requires_grad_(False)
    order = [[0, 1], [2, 3], [4, 5], [6, 7]]
    cache = layerwise.PrefixCache(model, DataLoader(data, batch_sampler=order), storage="memory")
    for x, _ in cache.batches():
        model(x).sum().backward()
        data.longer = 1
    assert "off: samples differ in shape" in cache.describe()
    assert "until then: memory, cut at 1 " in cache.describe()


def test_a_choice_that_could_not_be_carried_out_is_told_as_off(tmp_path) -> None:
    # A file lies in the place of the folder: `fit` repeats this decision, and may not promise a gain.
    (tmp_path / "file").touch()
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 2))
    model[:6].requires_grad_(False)
    loader = DataLoader(TensorDataset(torch.randn(16, 64)), 8)

    def train() -> None:
        for (x,) in cache.batches():
            model(x).sum().backward()

    with layerwise.PrefixCache(model, loader, storage="disk", folder=tmp_path / "file") as cache:
        with pytest.warns(layerwise.LayerwiseWarning, match="File exists"):
            train()
        assert cache.decision is not None
        assert cache.decision.storage == "off"
        assert "File exists" in cache.decision.reason
        assert "File exists" in cache.describe()


def test_what_is_lost_follows_a_reason_without_its_full_stop() -> None:
    class Together(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Together(nn.Linear(64, 64).requires_grad_(False), nn.Linear(64, 2))
    loader = DataLoader(TensorDataset(torch.randn(16, 64)), 8)

    def train() -> None:
        for (x,) in cache.batches():
            model(x).sum().backward()

    with layerwise.PrefixCache(model, loader, storage="memory") as cache:
        with pytest.warns(layerwise.LayerwiseWarning, match="Checkpoint them apart"):
            train()
        assert "Checkpoint them apart; 100% of the frozen operations" in cache.describe()


def test_a_loop_within_a_mode_is_told_why_nothing_is_looked_at() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    with layerwise.PrefixCache(model, DataLoader(TensorDataset(torch.randn(4, 4)), 2)) as cache:
        for (x,) in cache.batches():
            with FlopCounterMode(display=False):
                model(x)
        assert cache.describe().endswith(
            "waiting for a batch that comes to the model outside of a TorchDispatchMode"
        )


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (nn.Identity(), ""),
        (nn.Dropout(), "75% of the frozen operations run in every epoch, without which a step would be over"),
        (nn.BatchNorm1d(64), "; 100% of the frozen operations run in every epoch"),
    ],
)
def test_the_speed_that_is_lost_where_frozen_layers_run_is_told(first, told) -> None:
    # a frozen layer left in train mode, in the middle or at the beginning; nothing is said where all is cut
    layers = [nn.Linear(64, 64) for _ in range(4)]
    layers.insert(0 if isinstance(first, nn.BatchNorm1d) else 1, first)
    model = nn.Sequential(nn.Sequential(*layers).requires_grad_(False), nn.Linear(64, 2))
    loader = DataLoader(TensorDataset(torch.randn(16, 64)), 8)
    with layerwise.PrefixCache(model, loader, storage="memory") as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore", layerwise.LayerwiseWarning)
        for (x,) in cache.batches():
            model(x).sum().backward()
        assert told in cache.describe()
        assert ("frozen operations" in cache.describe()) == bool(told)


class Named(Counted):
    """With what tells samples apart: a path, or a number."""

    tell = staticmethod(lambda index: f"{index}.png")

    def __getitem__(self, index):
        return *super().__getitem__(index), self.tell(index)


class Numbered(Named):
    tell = staticmethod(int)


def test_that_samples_with_texts_are_loaded_in_each_epoch_is_told() -> None:
    def run(kind, **options):
        data = images()
        return both(TinyCNN, lambda: kind(data.inputs, data.labels), "layer2", "fc", **options)

    named, numbered, asked = run(Named), run(Numbered), run(Named, keep_inputs=True)
    assert "samples are loaded again in each epoch: they hold what is no tensor" in named.text
    assert "hand out its number instead" in named.text
    assert numbered.loads[1:] == [0, 0] != named.loads[1:]  # which helps
    assert "loaded again" not in numbered.text
    assert "loaded again" not in asked.text
