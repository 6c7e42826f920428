"""`PrefixCache.fill`: batches of another size and folded batch-norms, only where the values allow it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

import layerwise
from cache_loops import freeze_prefix, images
from gated import Gated, silu_is_uneven
from helpers import TinyCNN
from layerwise.cache.cutting.cut import CallId, Site
from layerwise.cache.cutting.search import find_cut
from layerwise.cache.folding import Folding, find_pairs, relative_difference
from layerwise.errors import CacheError, LayerwiseWarning
from layerwise.layers.recording import record

LAST = ("layer2", "fc")


def tiny(make=TinyCNN, *learning: str) -> nn.Module:
    """Return a model with a frozen prefix whose running statistics are those of some training."""
    torch.manual_seed(0)
    model = make()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    freeze_prefix(model, *(learning or LAST))
    return model


def cached(model: nn.Module, data=None, batch: int = 4, **options) -> layerwise.PrefixCache:
    loader = DataLoader(images(32) if data is None else data, batch, shuffle=True)
    return layerwise.PrefixCache(model, loader, **{"storage": "memory", **options})


def stored(cache: layerwise.PrefixCache) -> torch.Tensor:
    """Return the values of the one site of the one loader, in the order of the dataset."""
    ((feed,),) = (supply.feeds for supply in cache._supplies)
    ((site),) = feed.sites.values()
    assert bool(site.column.filled.all())
    return site.column.get(torch.arange(len(site.column.filled)))


# -- the pass itself ------------------------------------------------------------------------------


SEEN: list[int] = []


class Counting(nn.Module):
    """Notes how often it was called before."""

    calls = 0

    def forward(self, x):
        SEEN.append(self.calls)
        self.calls += 1
        return x


class Iterating(nn.Module):
    """Notes what an iterator of its own gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(100))

    def forward(self, x):
        SEEN.append(next(self.numbers))
        return x


@pytest.mark.parametrize("front", [Counting, Iterating])
def test_each_pass_of_a_row_begins_with_the_same_model(front) -> None:
    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.front = front()

        def forward(self, x):
            return super().forward(self.front(x))

    SEEN.clear()
    model = tiny(Net)
    attributes = {**vars(model.front)}
    cached(model).fill()
    assert len(SEEN) > 8
    assert set(SEEN) == {0}
    assert all(vars(model.front)[name] is value for name, value in attributes.items())
    model(torch.zeros(1, 3, 8, 8))
    assert SEEN[-1] == 0


def test_only_what_is_missing_is_computed() -> None:
    # a second pass loads nothing, and says so
    data = images(22)
    cache = cached(tiny(), data)
    assert cache.fill().samples == 18  # the first batch was looked at before, and stored
    loads = data.loads
    assert cache.fill().samples == 0
    assert data.loads == loads


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64])
def test_another_batch_size_changes_no_bit(size) -> None:
    # whether it is taken or not
    plain, other = cached(tiny()), cached(tiny())
    plain.fill()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = other.fill(batch_size=size)
    assert torch.equal(stored(plain), stored(other))
    assert done.batch_size == (4 if size == 64 or done.notes else size)  # there are 32 samples


def test_what_a_later_phase_has_no_room_for_is_not_computed() -> None:
    model = tiny()
    later = frozenset(name for name, _ in model.named_parameters() if name.startswith(("layer1", *LAST)))
    cache = cached(model, budget_bytes=40_000, pool=layerwise.CachePool(upcoming={later: 3}))
    assert cache.fill(batch_size=8).batch_size == 8
    plain = cached(tiny())
    plain.fill()
    assert torch.equal(stored(cache), stored(plain))


class Sized(TinyCNN):
    """Gives other last bits for more than 8 samples, as a kernel that is chosen by size does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.append(Rounding())


class Rounding(nn.Module):
    def forward(self, x):
        return x * (1 + 2.0**-20) if len(x) > 8 else x


def test_a_batch_size_with_other_bits_is_refused() -> None:
    # the user is told, and the values are those of the loader's batches
    plain, other = cached(tiny(Sized)), cached(tiny(Sized))
    plain.fill()
    with pytest.warns(LayerwiseWarning, match="batches of 16 are not used: the last bi"):
        done = other.fill(batch_size=16)
    assert done.batch_size == 4
    assert "differ from those in batches of 4" in done.notes[0]
    assert torch.equal(stored(plain), stored(other))


class Odd(TinyCNN):
    """Gives other last bits for a number of samples that is no multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.append(RoundingOdd())


class RoundingOdd(nn.Module):
    def forward(self, x):
        return x * (1 + 2.0**-20) if len(x) % 4 else x


def test_what_is_missing_of_a_larger_batch_is_computed_in_a_size_that_was_tried() -> None:
    # some samples of the batches of 16 were stored in an epoch that was left: 16 less these were not tried
    plain, other = cached(tiny(Odd)), cached(tiny(Odd))
    plain.fill()
    torch.manual_seed(1)
    for _, (x, _) in zip(range(2), other.batches()):
        other.model(x)
    assert other.fill(batch_size=16).batch_size == 16
    assert torch.equal(stored(plain), stored(other))


def test_a_batch_size_with_other_bits_is_taken_if_the_cache_need_not_be_exact() -> None:
    plain, other = cached(tiny(Sized)), cached(tiny(Sized), exact=False)
    plain.fill()
    assert other.fill(batch_size=16).batch_size == 16
    assert not torch.equal(stored(plain), stored(other))
    torch.testing.assert_close(stored(plain), stored(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [4, 8])
def test_a_batch_size_whose_last_bits_agree_by_luck_is_refused(batch) -> None:
    # 5 samples of 8 gates are 40 numbers: 32 at once and 8 one by one; of zeros, both give the same.
    # So it is whether the loader's batches are smaller or larger.
    def make() -> nn.Module:
        model = Gated(8)
        nn.init.zeros_(model.squeeze.weight)
        nn.init.zeros_(model.squeeze.bias)
        return model

    if not silu_is_uneven():
        pytest.skip("this processor has one routine")
    with pytest.warns(LayerwiseWarning, match=r"the last bits of .*silu.* depend on the size of the batch"):
        assert cached(tiny(make, "head"), batch=batch).fill(batch_size=5).batch_size == batch


def test_a_batch_size_is_tried_on_one_draw_of_each_sample() -> None:
    # another loading is another draw, whose values tell nothing of the size
    data = images(32)
    data.transform = lambda x: x + torch.randn(())
    assert cached(tiny(), data, views=2).fill(batch_size=16).batch_size == 16


# -- what `fill` cannot do ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2.5, "8"])
def test_a_batch_size_that_is_none(size) -> None:
    with pytest.raises(CacheError, match=f"batch_size must be an integer of at least 1, got {size!r}"):
        cached(tiny()).fill(batch_size=size)


REFUSED = {
    "nothing is frozen": (lambda: cached(TinyCNN()), {}, "no part of the forward pass that does any work"),
    "switched off": (lambda: cached(tiny(), storage="off"), {}, "switched off"),
    "no batches": (lambda: cached(tiny(), batch=None), {}, r"does not batch \(batch_size=None\)"),
    "another model": (lambda: cached(tiny()), {"call": lambda batch: None}, "the model was not called"),
}


@pytest.mark.parametrize(("make", "options", "why"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_loader_that_cannot_be_cached(make, options, why) -> None:
    with pytest.raises(CacheError, match=f"this loader is not cached: .*{why}"):
        make().fill(**options)


# -- folding --------------------------------------------------------------------------------------


def test_folding_keeps_values_near_and_the_model_as_it_is() -> None:
    # both pairs of the prefix; weights, buffers, attributes and outputs of the model are what they were
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    plain, folded = cached(tiny()), cached(model, exact=False)
    plain.fill()
    done = folded.fill(fold=True)
    assert (done.folded, done.notes) == (2, ())
    assert 0 < done.difference < 1e-5
    assert not torch.equal(stored(plain), stored(folded))  # it was at work
    torch.testing.assert_close(stored(plain), stored(folded))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    probe = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(probe), tiny().eval()(probe))


def test_folding_is_for_caches_that_need_not_be_exact() -> None:
    with pytest.raises(CacheError, match="pass exact=False"):
        cached(tiny()).fill(fold=True)


def test_folding_is_refused_where_values_move() -> None:
    # a large mean that bias and batch-norm cancel: folded values are another 10 % of the small rest
    model = tiny()
    with torch.no_grad():
        model.stem[0].bias += 1e6
        model.stem[1].running_mean += 1e6
    plain, folded = cached(model), cached(model, exact=False)
    plain.fill()
    with pytest.warns(LayerwiseWarning, match="nothing is folded: values would differ"):
        done = folded.fill(fold=True)
    assert (done.folded, done.difference) == (0, 0.0)
    assert torch.equal(stored(plain), stored(folded))


SITE = Site(CallId("norm", 0), "out", 0)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, 4.0], [1.0, 4.4], 0.1),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([1.0, 4.0], [1.0, torch.nan], torch.nan),
        ([1.0, torch.inf], [1.5, torch.inf], 0.5),
        ([1.0, -torch.inf], [1.0, 3.0], torch.inf),
        ([True, False], [True, True], 1.0),
        ([1j, 2.0], [0.0, 2.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_how_far_folded_values_are_from_plain_ones(one, other, difference) -> None:
    # what is not a number is not near, infinities are compared with each other, masks and indices as numbers
    values = ({SITE: torch.tensor(numbers)} for numbers in (one, other))
    assert relative_difference(*values) == pytest.approx(difference, nan_ok=True)


def test_nothing_to_fold_is_told() -> None:
    class Plain(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem[1], self.layer1[1] = nn.Identity(), nn.Identity()

    with pytest.warns(LayerwiseWarning, match="no frozen batch-norm follows a frozen convolution"):
        assert cached(tiny(Plain), exact=False).fill(fold=True).folded == 0


@pytest.mark.parametrize("channels", [3, 4])
def test_a_transposed_convolution_is_not_folded(channels) -> None:
    # its weight has the channels of its input first
    class Upwards(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem[0] = nn.ConvTranspose2d(channels, 4, 3)

        def forward(self, x):
            return super().forward(x[:, [0] * channels])

    plain, folded = cached(tiny(Upwards)), cached(tiny(Upwards), exact=False)
    plain.fill()
    assert folded.fill(fold=True).folded == 1
    torch.testing.assert_close(stored(plain), stored(folded), rtol=1e-4, atol=1e-5)


def pairs(model: nn.Module, *cuts: tuple[str, ...]) -> list[str]:
    """Return the convolutions that can be folded when the children named by each cut learn."""
    recording = record(model, (torch.zeros(2, 3, 8, 8),))
    found = []
    for learning in cuts:
        names = {name for name, _ in model.named_parameters() if name.startswith(learning)}
        found.append(find_cut(recording, frozenset(names)))
    return [pair.convolution[0] for pair in find_pairs(recording, found)]


def test_which_pairs_are_folded() -> None:
    # those before every stored value, or behind it; never a pair with a stored value in its middle
    model = tiny()
    assert pairs(model, LAST) == ["stem.0.weight", "layer1.0.weight"]
    assert pairs(model, LAST, ("layer1", *LAST)) == ["stem.0.weight", "layer1.0.weight"]
    assert pairs(model, LAST, ("layer1.1", *LAST)) == ["stem.0.weight"]  # layer1.0's own output is stored


def test_a_convolution_that_somebody_else_reads_is_not_folded() -> None:
    class Shortcut(TinyCNN):
        def forward(self, x):
            x = self.stem[0](x)
            x = self.layer1(x + self.stem[1](x))
            return self.fc(self.flatten(self.pool(self.layer2(x))))

    assert pairs(tiny(Shortcut), LAST) == ["layer1.0.weight"]


class Doubled(nn.Module):
    def forward(self, bias):
        return bias * 2


def test_weights_that_are_computed_or_used_twice_are_not_folded() -> None:
    class Twice(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(self.layer1[0], self.layer1[1], self.layer1[0], nn.ReLU())
            parametrize.register_parametrization(self.stem[0], "bias", Doubled())

    assert pairs(tiny(Twice), LAST) == []


class ByName(nn.Conv2d):
    """Calls the function of torch in a way of its own."""

    def forward(self, x):
        return torch.conv2d(input=x, weight=self.weight, padding=self.padding)


class TwoBranches(nn.Module):
    """Both convolutions run before their batch-norms; another one has none, nor has a batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), ByName(3, 4, 3, padding=1, bias=False)
        self.one_norm, self.other_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.norm, self.third, self.fc = nn.BatchNorm2d(3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        one, other = self.one(x), self.other(self.norm(x))
        return self.fc(self.third(self.one_norm(one) + self.other_norm(other)).mean((2, 3)))


def test_each_batch_norm_belongs_to_its_convolution() -> None:
    plain, folded = cached(tiny(TwoBranches, "fc")), cached(tiny(TwoBranches, "fc"), exact=False)
    plain.fill()
    assert folded.fill(fold=True).folded == 2
    assert not torch.equal(stored(plain), stored(folded))
    torch.testing.assert_close(stored(plain), stored(folded))


class Native(nn.BatchNorm2d):
    """Calls a function of torch that is not watched."""

    def forward(self, x):
        return torch.native_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.0, self.eps
        )[0]


def test_a_batch_norm_of_another_kind_is_told() -> None:
    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem[1] = Native(4)

    plain, folded = cached(tiny(Net)), cached(tiny(Net), exact=False)
    plain.fill()
    with pytest.warns(LayerwiseWarning, match="nothing is folded: 1 batch-norms did not follow"):
        assert folded.fill(fold=True).folded == 0
    assert torch.equal(stored(plain), stored(folded))


def test_a_batch_norm_that_does_not_come_is_found() -> None:
    # the pass takes another way than the recorded one: the convolution's folded output is not handed on
    model = tiny()
    recording = record(model, (torch.zeros(2, 3, 8, 8),))
    names = frozenset(name for name, _ in model.named_parameters() if name.startswith(LAST))
    folding = Folding(model, find_pairs(recording, [find_cut(recording, names)]))
    with torch.no_grad(), folding:
        model.stem(torch.zeros(2, 3, 8, 8))
    with pytest.raises(CacheError, match="1 batch-norms did not follow"), torch.no_grad(), folding:
        model.stem[0](torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_each_rank(rank) -> None:
    # with and without bias and affine weights
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(3, 4, 3, bias=False), norm(4), nn.ReLU())
            self.layer1 = nn.Sequential(conv(4, 4, 1), norm(4, affine=False), nn.ReLU())
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.layer1(self.stem(x)).flatten(2).mean(2))

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, *[6] * rank, generator=generator), i % 3) for i in range(8)]
    plain, folded = (cached(tiny(Net, "fc"), data, exact=exact) for exact in (True, False))
    plain.fill()
    assert folded.fill(fold=True).folded == 2
    torch.testing.assert_close(stored(plain), stored(folded))


def test_values_that_are_not_exact_have_names_of_their_own(tmp_path) -> None:
    # an exact cache in the same folder must not take folded values for its own
    cached(tiny(), exact=False, storage="disk", folder=tmp_path).fill(fold=True)
    data = images(32)
    exact, plain = cached(tiny(), data, storage="disk", folder=tmp_path), cached(tiny())
    exact.fill()
    plain.fill()
    assert torch.equal(stored(exact), stored(plain))
    assert data.loads >= 32


def test_values_that_are_not_exact_are_found_by_a_loop_that_need_not_be_exact(tmp_path, caplog) -> None:
    # folded values are no other ones than those of its first batch
    caplog.set_level("INFO", logger="layerwise.cache")
    options = {"exact": False, "storage": "disk", "folder": tmp_path}
    assert cached(tiny(), **options).fill(fold=True).folded == 2
    loop = cached(tiny(), **options)
    torch.manual_seed(1)
    for x, _ in loop.batches():
        loop.model(x).sum().backward()
    assert "found the values at layer1, computed before" in caplog.text
