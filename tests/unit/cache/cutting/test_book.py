"""Cuts of later phases come from one recording, unless the modes have changed where it matters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import freeze_prefix, images, unfreeze_gradually
from layerwise.cache.cutting import book as books
from layerwise.choosing.space import names_by_depth


class Late(nn.Module):
    """A block that drops before its first weight: still while it is frozen, awake when it learns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.drop = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.drop(x))


class Plain(Late):
    """Its first operation reads a weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Identity()


class Net(nn.Module):
    """A stem, three blocks in a sequence, and a head."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(block(4), block(4), block(4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def run(block: type[nn.Module], *, cached: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Unfreeze gradually; return the weights and what the cache says of each phase."""
    torch.manual_seed(0)
    weights, text = unfreeze_gradually(Net(block), images(count=16), cached=cached)
    return weights, text.splitlines()


@pytest.mark.parametrize(("block", "most"), [(Plain, 1), (Late, 4)])
def test_later_phases_need_no_recording_of_their_own(monkeypatch, block, most) -> None:
    # one recording serves all phases; a dropout that wakes inside what would be skipped asks for another
    recordings = []

    def counted(*args, **kwargs):
        recordings.append(args)
        return record(*args, **kwargs)

    record = books.record
    plain, _ = run(block, cached=False)
    monkeypatch.setattr(books, "record", counted)
    cached, told = run(block, cached=True)
    assert (len(recordings) > 1) == (most > 1)
    assert len(recordings) <= most
    assert sum("cut at" in line for line in told) >= 3
    assert "off: no part of the forward pass" in told[-1]
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())


def test_how_long_learns_what_learns_now_and_what_comes_later() -> None:
    # phases of the plan and runs to come; the present set does not come later, though it comes again
    head, both = frozenset({"head"}), frozenset({"body", "head"})
    lengths = [(head, 2), (head, 3), (both, 4), (head, None)]
    tuner = SimpleNamespace(
        phase_index=0,
        trainable_names=lambda index: lengths[index][0],
        plan=SimpleNamespace(phases=[SimpleNamespace(epochs=epochs) for _, epochs in lengths]),
    )
    phases = books.Phases(tuner, {head: 7, both: 5})
    assert phases.epochs_now() == 2 + 3 + 1
    assert phases.later(head) == {both: 4 + 5}
    assert books.Phases(None, {}).epochs_now() is None


def depth(k: int, *, pool: layerwise.CachePool | None, data) -> tuple[dict[str, Tensor], int]:
    """Train the last `k` groups for two epochs; return the weights and how many samples were loaded."""
    torch.manual_seed(0)
    model = Net(Plain)
    loader = DataLoader(data, batch_size=4, shuffle=True)
    layers = layerwise.layer_map(model, data.inputs[:2])
    plan = layerwise.top_k(layers, k=k, epochs=2)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(loader), layers=layers
    )
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, storage="memory", pool=pool)
    before = data.loads
    for _ in tuner.epochs():
        model.train()
        for x, y in cache.batches() if pool is not None else loader:
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
    return {k: v.clone() for k, v in model.state_dict().items()}, data.loads - before


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_a_pool_fills_what_upcoming_runs_need_in_the_first_pass(order) -> None:
    # from the head on, later depths load only what is looked at; in any order the weights are the plain ones
    data = images(count=64)
    layers = layerwise.layer_map(Net(Plain), data.inputs[:2])
    pool = layerwise.CachePool(upcoming=names_by_depth(layers, (1, 2, 3), epochs=2))
    loads = []
    for k in order:
        plain, _ = depth(k, pool=None, data=data)
        cached, count = depth(k, pool=pool, data=data)
        assert all(torch.equal(value, cached[name]) for name, value in plain.items())
        loads.append(count)
    assert loads[0] >= 64
    spared = [count < 64 for count in loads[1:]]  # the data's digest and one batch, and no pass
    assert spared == ([True, True] if order == (1, 2, 3) else [False, False])


def test_a_cut_found_in_eval_mode_does_not_hold_in_train_mode() -> None:
    # a validation that comes first skips a batch-norm; the reverse holds, as less depends on the batch then
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    book, given = books.CutBook(model, books.Phases(None, {})), (torch.randn(3, 4),)

    def skipped(training: bool) -> list[str]:
        model.train(training)
        return [call.path for call in book.find((given, {}), books.Form("")).skipped]

    assert skipped(training=False) == ["0", "1"]
    assert skipped(training=True) == ["0"]
    assert skipped(training=False) == ["0"]


class Domain(nn.Module):
    """A layer whose result is multiplied by a number that the loop chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


class Deep(nn.Module):
    """A stem that depends on the domain, a block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = Domain(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


LATER = frozenset({"block.weight", "block.bias", "head.weight", "head.bias"})


def test_the_cut_of_a_later_phase_is_that_of_the_present_settings() -> None:
    # a domain that comes back: the recording in the other one came last, and tells nothing of this one
    model, given = Deep(), (torch.randn(3, 8),)
    freeze_prefix(model, "head")
    book = books.CutBook(model, books.Phases(None, {LATER: 2}))

    def structure(scale: float) -> str:
        model.stem.scale = scale
        book.find((given, {}), books.Form(""))
        ((epochs, cut),) = book.later(books.Form(""))
        assert epochs == 2
        return cut.sources[cut.frontier[0]].structure

    first, second = structure(1.0), structure(2.0)
    assert first != second
    assert structure(1.0) == first
    model.stem.scale = 3.0
    assert book.later(books.Form("")) == []


def test_the_cut_of_a_later_phase_holds_in_the_present_modes() -> None:
    # found where a frozen batch-norm was in eval mode; in train mode its values are those of one batch
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[:3].requires_grad_(False)
    given = (torch.randn(3, 8),)
    book = books.CutBook(
        model, books.Phases(None, {frozenset({"2.weight", "2.bias", "3.weight", "3.bias"}): 1})
    )
    model.eval()
    book.find((given, {}), books.Form(""))
    (found,) = book.later(books.Form(""))
    assert [call.path for call in found[1].skipped] == ["0", "1"]
    assert book.in_or_around(found[1]) == {*model[:2]}  # the mode of a plain container does not matter
    model[1].train()
    assert book.later(books.Form("")) == []
    book.find((given, {}), books.Form(""))
    (found,) = book.later(books.Form(""))
    assert [call.path for call in found[1].skipped] == ["0"]


class Around(nn.Module):
    """Drops between two frozen layers, itself."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.mid = nn.Linear(8, 8), nn.Linear(8, 8)
        self.high, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.low(x), 0.5, self.training)
        return self.head(self.high(self.mid(x)))


def test_the_cut_of_a_later_phase_holds_in_the_mode_of_what_is_around_it() -> None:
    model, given = Around(), (torch.randn(3, 8),)
    freeze_prefix(model, "head")
    later = frozenset({"high.weight", "high.bias", "head.weight", "head.bias"})
    book = books.CutBook(model, books.Phases(None, {later: 1}))
    model.training = False
    book.find((given, {}), books.Form(""))
    ((_, cut),) = book.later(books.Form(""))
    assert [str(site) for site in cut.frontier] == ["mid"]
    model.training = True
    assert book.later(books.Form("")) == []


def in_domains(cached: bool) -> dict[str, Tensor]:
    """Train the head for two epochs in changing domains, then the block with it for two in the second one."""
    torch.manual_seed(0)
    model, inputs = Deep(), torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    freeze_prefix(model, "head")
    loader = DataLoader(TensorDataset(inputs, torch.arange(12) % 4), batch_size=4)
    pool = layerwise.CachePool(upcoming={LATER: 2})
    cache = layerwise.PrefixCache(model, loader, storage="memory", pool=pool)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for scales in [(1, 2, 1), (2, 1, 1), (2, 2, 2), (2, 2, 2)]:
        model.block.requires_grad_(scales == (2, 2, 2))
        batches = iter(cache.batches() if cached else loader)
        for scale in scales:
            model.stem.scale = float(scale)
            x, y = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_what_a_later_phase_needs_is_not_stored_of_another_domain() -> None:
    plain, cached = in_domains(False), in_domains(True)
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
