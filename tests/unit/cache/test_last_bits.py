"""Values whose last bits depend on the batch in which a sample stands are replayed only where they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import layerwise
from cache_loops import Counted, assert_same, both, freeze_prefix, images, off, train
from gated import Gated, silu_is_uneven
from helpers import TinyCNN
from layerwise.cache.cutting.cut import CallId, Site
from layerwise.cache.proof.mixing import size_sensitive
from layerwise.errors import LayerwiseWarning


@pytest.mark.parametrize(("seed", "start"), [(4, 3), (5, 2), (5, 3)])
def test_a_first_epoch_that_begins_in_the_middle(seed, start) -> None:
    # later epochs then compute a few samples of a batch: only in batches that give them the same bits, of
    # which the first batch tells nothing here (its samples happen to get the same bits in twos)
    class Late(torch.utils.data.Sampler):
        def __init__(self, size, epoch=-1):
            self.size, self.epoch = size, epoch

        def __iter__(self):
            self.epoch += 1
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
            yield from [order[i : i + 4] for i in range(0, self.size, 4)][0 if self.epoch else start :]

        def __len__(self):
            return -(-self.size // 4)

    def run(cached):
        torch.manual_seed(seed)
        model = Gated(8)
        freeze_prefix(model, "head")
        loader = DataLoader(images(38), batch_sampler=Late(38))
        cache = layerwise.PrefixCache(model, loader, storage="memory") if cached else None
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        for _ in range(6):
            for x, y in loader if cache is None else cache.batches():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        return model.state_dict(), cache

    (plain, _), (cached, cache) = run(False), run(True)
    assert "memory, cut at" in cache.describe()
    assert all(torch.equal(plain[name], cached[name]) for name in plain)


# 4 samples of 10 gates are 40 numbers: processors take 32 or 16 at once and the others one by one
def uneven() -> nn.Module:
    return Gated(10)


needs_two_routines = pytest.mark.skipif(not silu_is_uneven(), reason="this processor has one routine")


class Claims(Sampler):
    """Batches of four that are said to be the same in each epoch, and are if `honest`."""

    shuffle = False

    def __init__(self, size: int, honest: bool) -> None:
        self.size, self.honest, self.epoch = size, honest, 0

    def __iter__(self):
        self.epoch += 0 if self.honest else 1
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from [order[i : i + 4] for i in range(0, self.size, 4)]

    def __len__(self):
        return -(-self.size // 4)


@needs_two_routines
def test_a_loader_that_shuffles_is_refused() -> None:
    plain = train(uneven, images(24), "head", cached=False)
    with pytest.warns(
        LayerwiseWarning, match=r"last bits of .* place in a batch of 4.* shuffles.* multiple of 32"
    ):
        cached = train(uneven, images(24), "head", cached=True)
    assert_same(plain, cached)


@needs_two_routines
def test_where_last_bits_do_not_matter_it_is_cached_nevertheless() -> None:
    plain, cached = (
        train(uneven, images(24), "head", cached=c, **({"exact": False} if c else {})) for c in (0, 1)
    )
    assert "memory, cut at" in cached.text
    assert cached.loads[1:] == [0, 0]
    for name, weight in plain.weights.items():
        torch.testing.assert_close(cached.weights[name], weight, rtol=1e-3, atol=1e-3)


@needs_two_routines
@pytest.mark.parametrize("samples", [24, 22])
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_loader_that_keeps_its_order_is_cached(samples, storage) -> None:
    # each sample comes at the same place in every epoch, so its value holds; a smaller last batch as well
    data = images(samples)
    options = {"loader_options": {"shuffle": False}, "epochs": 4, "validate": True}
    plain = train(uneven, data, "head", cached=False, **options)
    cached = train(uneven, data, "head", cached=True, storage=storage, **options)
    assert_same(plain, cached)
    assert f"{storage}, cut at input of head" in cached.text
    assert cached.loads[1:] == [0, 0, 0]


@needs_two_routines
@pytest.mark.parametrize("honest", [True, False])
def test_values_count_only_for_their_places(honest) -> None:
    # samples that come elsewhere although the sampler says otherwise are computed again
    data = images(24)

    def run(cached):
        options = {"shuffle": False, "batch_size": 1, "batch_sampler": Claims(24, honest)}
        return train(uneven, data, "head", cached=cached, epochs=5, loader_options=options)

    plain, cached = run(False), run(True)
    assert_same(plain, cached)
    assert "memory, cut at" in cached.text
    assert all((load == 0) == honest for load in cached.loads[1:])


@needs_two_routines
def test_a_sample_twice_in_a_batch_has_no_one_place() -> None:
    class Twice(Claims):
        def __iter__(self):
            yield from ([i, i + 1, i + 2, i + 2] for i in range(0, self.size - 2, 3))

    options = {"shuffle": False, "batch_size": 1, "batch_sampler": Twice(24, True)}
    plain = train(uneven, images(24), "head", cached=False, loader_options=options)
    with pytest.warns(LayerwiseWarning, match="a sample twice"):
        cached = train(uneven, images(24), "head", cached=True, loader_options=options)
    assert_same(plain, cached)


@needs_two_routines
def test_a_pass_of_its_own_keeps_the_places() -> None:
    # `fill` takes the loader's batches, whatever size is asked for, and the epochs after find all in place
    torch.manual_seed(0)
    model, data = uneven(), images(22)
    freeze_prefix(model, "head")
    cache = layerwise.PrefixCache(model, DataLoader(data, 4), storage="memory")
    with pytest.warns(LayerwiseWarning, match="batches of 8 are not used: last bits depend on the place"):
        done = cache.fill(batch_size=8)
    loads = data.loads
    outputs = [model(x).detach() for x, _ in cache.batches()]
    assert (done.batch_size, data.loads) == (4, loads)
    assert all(torch.equal(one, model(x).detach()) for one, (x, _) in zip(outputs, DataLoader(data, 4)))


@needs_two_routines
def test_nothing_is_shared_where_places_count(tmp_path) -> None:
    # another run may have another order; a lasting folder holds nothing of it, and no leftovers
    data = images(24)
    options = {"loader_options": {"shuffle": False}, "cached": True, "folder": tmp_path, "storage": "disk"}
    first = train(uneven, data, "head", **options)
    first.cache.close()
    assert list(tmp_path.iterdir()) == []
    second = train(uneven, data, "head", **options)
    assert_same(first, second)
    assert second.loads[0] > 0
    second.cache.close()


def test_values_that_are_random_are_refused_inexact_or_not() -> None:
    # exact=False excuses last bits, and nothing else
    class Net(Gated):
        def forward(self, x):
            return super().forward(x)

        def __init__(self):
            super().__init__(12)
            self.conv = NumpyNoise(self.conv)

    class NumpyNoise(nn.Sequential):
        def forward(self, x):
            import numpy as np

            return super().forward(x * float(np.random.rand()))

    text = train(Net, images(24), "head", cached=True, exact=False).text
    assert "off: " in text
    assert "numpy" in text


class Alternating(nn.Module):
    """Rounds every second row otherwise, as MKL does where the next row begins elsewhere in a vector."""

    def forward(self, x):
        return x * (1 + 2.0**-20 * (torch.arange(len(x)) % 2).view(-1, *[1] * (x.dim() - 1)))


def test_a_last_batch_with_other_bits_that_only_the_values_tell() -> None:
    # of an operation that is not tried by itself: a sample of the smaller batch is not what it is in others
    @torch.library.custom_op("layerwise_sized::round", mutates_args=())
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2.0**-20) if len(x) > 2 else x.clone()

    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return rounded(x)

    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem.append(Rounding())

    assert "memory, cut at" in both(Net, images, "layer2", "fc").text


def test_what_is_missing_of_a_batch_is_computed_where_it_stands() -> None:
    # with all samples around it
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 8), Alternating(), nn.Flatten())
    model = nn.Sequential(OrderedDict(body=body, head=nn.Linear(4, 4)))
    freeze_prefix(model, "head")
    loader = DataLoader(images(8), 4)
    cache = layerwise.PrefixCache(model, loader, storage="memory")
    cache.fill()
    ((feed,),) = (supply.feeds for supply in cache._supplies)
    for stored in feed.sites.values():
        stored.column.forget(torch.tensor([1, 6]))
    outputs = [model(x).detach() for x, _ in cache.batches()]
    assert "memory, cut at" in cache.describe()
    assert all(torch.equal(one, model(x).detach()) for one, (x, _) in zip(outputs, loader, strict=True))


@pytest.mark.parametrize("batch", [3, 4, 5, 7])
@pytest.mark.parametrize("pooled", [True, False])
def test_every_second_place_is_a_place_of_its_own(batch, pooled) -> None:
    # backwards, a batch of an odd size has each sample at a place of the same kind
    def make():
        front = [nn.AdaptiveAvgPool2d(1)] if pooled else []
        low = nn.Sequential(*front, nn.Conv2d(3, 4, 1), Alternating())
        return nn.Sequential(OrderedDict(low=low, flat=nn.Flatten(), head=nn.LazyLinear(4)))

    def made():
        model = make()
        model(torch.zeros(1, 3, 8, 8))
        return model

    text = off(made, lambda: images(4 * batch), "head", loader_options={"batch_size": batch})
    assert "depend on a sample's place in a batch" in text


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("share", [0.1, 5e-4, 1e-6])
def test_samples_that_read_each_other_a_little_are_no_matter_of_last_bits(share, exact) -> None:
    # so little that values are near whatever the companions in the first batch; what is before is cached
    class Leaning(nn.Module):
        def forward(self, x):
            return x + share * x.mean(0, keepdim=True)

    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem.append(Leaning())

    cached = both(Net, images, "layer2", "fc", exact=exact)
    assert "cut at stem.2 " in cached.text
    assert "in stem.3 gives a value that mixes the samples" in cached.text


@pytest.mark.parametrize(("indices", "more"), [([0, 1, 2, 3], 0), ([0, 1, 5, 5], 1)])
def test_a_sample_that_stands_twice_in_a_batch_tells_nothing_new(indices, more) -> None:
    # a weighted sampler repeats some: equal bits of 400 numbers of which 200 are copies may be luck
    site, values, runs = Site(CallId("body", 0), "out", 0), torch.rand(4, 200) + 1, []

    def run(positions, seed):
        runs.append(positions)
        return {site: values[positions]}

    assert not size_sensitive({site: values}, {site: values[[3, 2]]}, [3, 2], run, indices)
    assert len(runs) == more


@pytest.mark.parametrize("sensitive", [False, True])
def test_others_of_the_batch_are_computed_until_one_has_other_bits(sensitive) -> None:
    # few numbers: equal bits can be luck; the samples that are computed already tell nothing new
    site = Site(CallId("body", 0), "out", 0)
    full, ran = {site: torch.rand(8, 100) + 1}, []

    def run(positions: list[int], seed: int) -> dict[Site, torch.Tensor]:
        ran.append(sorted(positions))
        return {site: full[site][positions]}

    part = {site: full[site][[7, 6]] * (1 + 1e-6 * sensitive)}
    assert size_sensitive(full, part, [7, 6], run, range(8)) == sensitive
    assert (ran == [list(range(8))]) if sensitive else (len(ran) == 1 and not {6, 7} & {*ran[0]})


class InTurn(Sampler[list[int]]):
    """Batches of several sizes."""

    def __init__(self, *epochs: list[list[int]]) -> None:
        self.epochs, self.begun = epochs, 0

    def __iter__(self):
        self.begun += 1
        return iter(self.epochs[self.begun - 1])

    def __len__(self) -> int:
        return 3


class Scheduled(nn.Module):
    """Each epoch is another state of what learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(192, 64), nn.Linear(64, 4), 1.0

    def forward(self, x):
        return self.head(self.body(x.flatten(1))) * self.scale


@pytest.mark.parametrize("large", [[4, 5, 6, 7], [4, 5, 6]])
def test_a_state_that_begins_with_a_batch_of_another_size(large) -> None:
    # one sample alone meets another kernel: what is stored of larger batches must not be handed out for it
    epochs = [[0, 1, 2, 3], large], [[8], [0], large], [[9], [0], [1], large], [[2], large, [3]]

    def run(cached: bool):
        return train(
            Scheduled, images(12), "head", cached=cached, epochs=4,
            before_epoch=lambda model, epoch: setattr(model, "scale", 1.0 + epoch),
            loader_options={"batch_size": 1, "shuffle": False, "batch_sampler": InTurn(*epochs)},
        )  # fmt: skip

    one = nn.Linear(192, 64)
    x = torch.randn(4, 192)
    if torch.equal(one(x[:1]), one(x)[:1]):
        pytest.skip("this processor has one kernel for both")
    cached = run(True)
    assert_same(run(False), cached)
    assert "off" not in cached.text  # looked at is a batch of the same size, if one comes


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_batch_with_gaps_tells_that_one_without_is_packed() -> None:
    # torch lays samples end to end where all padding of a batch stands at the end: not in the first batch
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.body(self.embed(x), src_key_padding_mask=x == 0).mean(1))

    def texts():
        tokens = torch.randint(1, 50, (22, 6), generator=torch.Generator().manual_seed(3))
        tokens[:, 4:] = 0
        tokens[::3, 2] = 0
        return Counted(tokens, torch.arange(22) % 4)

    assert "lays the samples of a batch end to end" in off(Padded, texts, "head")
    assert "cut at" in train(Padded, texts(), "head", cached=True, exact=False).text


class Attending(nn.Module):
    """Small products, of which torch makes another operation where a batch is one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.embed(x)
        return (values + self.attend(values, values, values)[0]).mean(1)


def test_a_last_batch_of_one_sample_hides_no_place(monkeypatch) -> None:
    # Its operations are others than those of a whole batch, so the two cannot be compared one by one; and
    # the values of the first batch may well agree at all places by chance.
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(body=Attending(), head=nn.Linear(8, 3)))
    model.body.requires_grad_(False)
    sample = torch.randn(3, 5)
    placed = model.body.embed(sample.expand(5, 3, 5).contiguous())
    if torch.equal(placed, placed[:1].expand_as(placed)):
        pytest.skip("this processor multiplies alike at all places")
    monkeypatch.setattr("layerwise.cache.proof.proving.size_sensitive", lambda *given: True)
    data = TensorDataset(torch.randn(16, 3, 5), torch.arange(16) % 3)
    cache = layerwise.PrefixCache(model, DataLoader(data, batch_size=5, shuffle=True), storage="memory")
    batches = cache.batches()
    x, _ = next(batches)
    with pytest.warns(LayerwiseWarning, match="last bits of aten.addmm.default depend on a sample's place"):
        model(x)


class Tabled(nn.Module):
    """Computes a table, in a way that rounds some of it otherwise; one sample alone takes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 8), nn.Parameter(torch.ones(40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1 if len(x) == 1 else x
        return self.conv(x).flatten(1) + nn.functional.silu(self.table).sum()


def test_a_table_has_no_places_where_a_last_batch_runs_other_operations() -> None:
    # the same operations of twice as many samples tell that it does not depend on the batch
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(body=Tabled(), head=nn.Linear(4, 4)))

    assert "memory, cut at" in both(make, lambda: images(21), "head", batch=5).text


class InPieces(nn.Module):
    """Computes so many samples at a time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(192, 8), size

    def forward(self, x):
        return torch.cat([self.linear(piece) for piece in x.flatten(1).split(self.size)])


def test_samples_that_are_a_batch_each_have_no_places() -> None:
    # though a batch of more of them, which is tried as well, runs other operations
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(body=InPieces(1), head=nn.Linear(8, 4)))

    assert "memory, cut at" in both(make, images, "head", batch=1).text


class AttendingInPieces(nn.Module):
    """Attends in two samples at a time, by an operation that is not tried by itself."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.activation = nn.Parameter(torch.ones(20)), activation

    def forward(self, x):
        rows = (x.flatten(1)[:, :160].view(-1, 1, 8, 20) * self.scale).split(2)
        values = [nn.functional.scaled_dot_product_attention(piece, piece, piece) for piece in rows]
        return torch.cat([self.activation(value[:, 0, 0].contiguous()) for value in values])


@needs_two_routines
@pytest.mark.parametrize("activation", [nn.functional.relu, nn.functional.silu])
def test_what_runs_in_pieces_is_refused_if_numbers_in_them_have_places(activation) -> None:
    # of two samples in a piece, 40 numbers
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(body=AttendingInPieces(activation), head=nn.Linear(20, 4)))

    if activation is nn.functional.relu:
        assert "memory, cut at" in both(make, lambda: images(24), "head").text
    else:
        assert "last bits of aten.silu.default depend on" in off(make, lambda: images(24), "head")


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_product_in_pieces_that_no_other_batch_has_proves_nothing(shuffle) -> None:
    # how many pieces there are depends on the batch: in none of another size the same operations run
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(body=InPieces(2), head=nn.Linear(8, 4)))

    data = lambda: images(24)  # noqa: E731
    if shuffle:
        assert "aten.addmm.default" in off(make, data, "head")
    else:
        assert "memory, cut at" in both(make, data, "head", loader_options={"shuffle": False}).text
