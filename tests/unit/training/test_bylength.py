"""Batches padded to lengths that do not change: the same rows of any collate function, and a cache."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, WeightedRandomSampler

import layerwise
from layerwise.errors import DataError, LayerwiseWarning

LENGTHS = [int(n) for n in torch.randint(3, 60, (77,), generator=torch.Generator().manual_seed(2))]


class Texts(torch.utils.data.Dataset):
    """Token ids of many lengths; counts what is loaded."""

    def __init__(self, lengths=LENGTHS):
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(1, 50, (n,), generator=generator) for n in lengths]
        self.loads = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.loads += 1
        return self.ids[index], index


def collate(samples):
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    return {"ids": ids, "mask": ids > 0, "index": torch.tensor([index for _, index in samples])}


def loader_of(data=None, *, batch_size=8, shuffle=True, collate_fn=collate, **options):
    data = Texts() if data is None else data
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=collate_fn, **options)


def test_each_epoch_has_every_sample_once_and_each_sample_one_shape():
    # The rows are the samples, whatever else was collated beside them; orders differ, shapes do not.
    loader = layerwise.by_length(loader_of())
    shapes, orders = [], []
    for _ in range(2):
        found, order = {}, []
        for batch in loader:
            assert len(batch["ids"]) == len(batch["mask"]) == len(batch["index"]) <= 8
            for row, index in zip(batch["ids"], batch["index"].tolist()):
                order.append(index)
                found[index] = len(row)
                assert torch.equal(row[row > 0], loader.dataset.data.ids[index])
        assert sorted(order) == list(range(77))
        shapes.append(found)
        orders.append(order)
    assert shapes[0] == shapes[1]
    assert orders[0] != orders[1]
    assert len(set(shapes[0].values())) > 1
    assert sum(shapes[0].values()) < 0.85 * 77 * max(LENGTHS)
    assert all(length >= own for own, length in zip(LENGTHS, map(shapes[0].get, range(77))))


def test_the_order_is_a_function_of_seed_and_epoch():
    # A resumed run is in the order of the one that was interrupted; another seed is another order.
    def orders(loader, count):
        return [[batch["index"].tolist() for batch in loader] for _ in range(count)]

    whole = orders(layerwise.by_length(loader_of()), 3)
    resumed = layerwise.by_length(loader_of())
    resumed.set_epoch(2)
    assert orders(resumed, 1) == whole[2:]
    assert orders(layerwise.by_length(loader_of(), seed=1), 3) != whole
    straight = layerwise.by_length(loader_of(shuffle=False))
    first, second = orders(straight, 2)
    assert first == second


class Pairs(torch.utils.data.Dataset):
    """Source and target of lengths that have nothing to do with each other."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.ones(3 + index % 7), torch.ones(3 + index * 5 % 11)


def collate_pairs(samples):
    return tuple(nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*samples))


def test_two_lengths_at_once_and_workers():
    # Source and target are each padded to the longest of their own; workers get all of it.
    loader = layerwise.by_length(loader_of(Pairs(), collate_fn=collate_pairs, batch_size=4, num_workers=1))
    shapes = [{(source.shape[1], target.shape[1]) for source, target in loader} for _ in range(3)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert len(shapes[0]) > 1
    for source, target in loader:
        assert len(source) == len(target) == 4


def test_a_cache_works_on_it_to_the_bits_of_the_plain_loop():
    # What is refused with the given loader is cached with this one, and nothing is loaded again.
    torch.manual_seed(0)
    start = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2)
    )
    for part in start[:3]:
        part.requires_grad_(False)

    def run(*, cached):
        model, data = copy.deepcopy(start), Texts()
        loader = layerwise.by_length(loader_of(data))
        cache = layerwise.PrefixCache(model, loader, storage="memory") if cached else None
        optimizer = torch.optim.AdamW(model[4].parameters(), lr=1e-2)
        torch.manual_seed(3)
        for _ in range(3):
            loads = data.loads
            for batch in loader if cache is None else cache.batches():
                optimizer.zero_grad()
                (model(batch["ids"]).mean((1, 2)) - batch["index"] / 77).pow(2).mean().backward()
                optimizer.step()
        return model[4].weight, data.loads - loads

    plain, loads = run(cached=False)
    cached, none = run(cached=True)
    assert torch.equal(plain, cached)
    assert not torch.equal(plain, start[4].weight)
    assert loads > 77  # the longest are loaded beside each batch
    assert none == 0
    with pytest.warns(LayerwiseWarning, match=r"layerwise\.by_length\(loader\) does"):
        list(layerwise.PrefixCache(start, loader_of(), storage="memory").batches())


def test_one_made_anew_goes_on_with_what_was_stored():
    # As Trainer makes its loader anew for each evaluation; one that pads or reads otherwise begins anew.
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    model[:2].requires_grad_(False)
    data, cache = Texts(), layerwise.PrefixCache(model, storage="memory")

    def loads(data, **options):
        loader = layerwise.by_length(loader_of(data, shuffle=False, **options))
        before = data.loads
        for batch in cache.batches(loader):
            model(batch["ids"])
        return data.loads - before

    assert loads(data) >= 77
    assert max(loads(data) for _ in range(3)) < 10  # a few, to see that they did not change
    assert "loader 2" not in cache.describe()
    assert loads(Texts(LENGTHS[::-1])) >= 77
    assert loads(data, collate_fn=lambda samples: collate(samples)) >= 77
    assert loads(data, batch_size=4) >= 77
    assert "loader 4" in cache.describe()


class Noised:
    """A collator that draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, samples):
        batch = collate(samples)
        return {**batch, "ids": torch.randint(1, 50, batch["ids"].shape, generator=self.generator)}


def test_a_collators_own_generator_goes_on_as_in_the_plain_loop():
    # The cache finds it behind the padding, and puts it back after it tried some samples.
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    model[:2].requires_grad_(False)
    plain, cached = (layerwise.by_length(loader_of(collate_fn=Noised())) for _ in range(2))
    cache = layerwise.PrefixCache(model, cached)
    for one, other in zip(plain, cache.batches(), strict=True):
        assert torch.equal(one["ids"], other["ids"])


def test_fit_trains_from_it(capsys):
    # `fit` takes it as a loader of the user's own, and caches it.
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Tanh())
            self.head = nn.Linear(8, 2)

        def forward(self, ids):
            return self.head(self.body(ids).mean(1))

    def pairs(samples):
        batch = collate(samples)
        return batch["ids"], batch["index"] % 2

    train = layerwise.by_length(loader_of(collate_fn=pairs))
    model = Mean()
    layers = layerwise.layer_map(model, torch.zeros(2, 5, dtype=torch.int64))
    plan = layerwise.linear_probe(layers, epochs=2)
    layerwise.fit(model, train, train, plan=plan, layers=layers, cache="memory")
    assert "prefix cache: memory, cut at" in capsys.readouterr().err


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_process_has_its_share(shuffle):
    # Of a loader that takes the share of one process: together they have every sample.
    shares = []
    for rank in range(2):
        data = Texts(LENGTHS[:64])
        sampler = DistributedSampler(data, 2, rank, shuffle=shuffle)
        loader = layerwise.by_length(DataLoader(data, 8, sampler=sampler, collate_fn=collate))
        shares.append({index for batch in loader for index in batch["index"].tolist()})
        assert len(loader) == 4
    assert shares[0] | shares[1] == set(range(64))
    assert not shares[0] & shares[1]


def test_accelerates_loaders():
    # One that Accelerate has prepared, alone or as the share of one of two processes, is read inside.
    data_loader = pytest.importorskip("accelerate.data_loader")
    shares = []
    for rank in range(2):
        prepared = data_loader.prepare_data_loader(loader_of(), num_processes=2, process_index=rank)
        shares.append({i for batch in layerwise.by_length(prepared) for i in batch["index"].tolist()})
    assert shares[0] | shares[1] == set(range(77))
    prepared = data_loader.prepare_data_loader(loader_of())
    assert sum(len(batch["ids"]) for batch in layerwise.by_length(prepared)) == 77


@pytest.mark.parametrize(("split", "size"), [(False, 8), (True, 4)])
def test_accelerates_loaders_keep_their_batches(split, size):
    # The size and drop_last of what the loader was before Accelerate made it anew.
    data_loader = pytest.importorskip("accelerate.data_loader")
    seen = []
    for rank in range(2):
        prepared = data_loader.prepare_data_loader(
            loader_of(drop_last=True), num_processes=2, process_index=rank, split_batches=split
        )
        batches = [batch["index"].tolist() for batch in layerwise.by_length(prepared)]
        assert {len(batch) for batch in batches} == {size}
        seen += [index for batch in batches for index in batch]
    assert len(seen) == 80  # the first batch again, for the other process


def test_what_is_made_of_a_prepared_loader_is_prepared():
    # Accelerate takes it as its own: it moves batches and tells the last one, and is not shared out twice.
    accelerator = pytest.importorskip("accelerate").Accelerator(gradient_accumulation_steps=3)
    loader = layerwise.by_length(accelerator.prepare(loader_of()))
    assert accelerator.prepare(loader) is loader
    synced = []
    for _ in loader:
        with accelerator.accumulate(nn.Linear(1, 1)):
            synced.append(accelerator.sync_gradients)
    assert [number for number, is_synced in enumerate(synced) if is_synced] == [2, 5, 8, 9]
    loader.set_epoch(3)
    again = layerwise.by_length(loader_of())
    again.set_epoch(3)
    assert [batch["index"].tolist() for batch in loader] == [batch["index"].tolist() for batch in again]


def test_samples_of_one_shape_need_nothing():
    # The loader itself, which draws in its own order.
    loader = loader_of(Texts([7] * 20))
    assert layerwise.by_length(loader) is loader


class OwnWay(DataLoader):
    def __iter__(self):
        yield from list(super().__iter__())[::2]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def cut_to_shortest(samples):
    ids = [ids for ids, _ in samples]
    return torch.stack([one[: min(map(len, ids))] for one in ids])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([1, 2], r"by_length got a list; expected a torch DataLoader over a map-style data set"),
        (DataLoader(Endless()), r"by_length got an? Endless; expected a torch DataLoader"),
        (OwnWay(Texts(), 8, collate_fn=collate), r"by_length got an OwnWay; expected a torch DataLoader"),
        (DataLoader(Texts(), batch_size=None), r"made by .*; expected torch's random or sequential order"),
        (
            DataLoader(Texts(), 8, sampler=WeightedRandomSampler([1.0] * 77, 77), collate_fn=collate),
            r"made by a WeightedRandomSampler; expected torch's random or sequential order",
        ),
        (
            loader_of(collate_fn=lambda samples: samples[0][0]),
            r"shape \(\d+,\) of one sample; expected \(1, ",
        ),
        (
            loader_of(collate_fn=lambda samples: {**collate(samples), "name": ["x"] * len(samples)}),
            r"a list of one sample, \['x'\]; expected",
        ),
        (loader_of(collate_fn=cut_to_shortest), r"into the shapes \(\d+,\) and \(\d+,\); expected one shape"),
        (
            loader_of(
                collate_fn=lambda samples: {**collate(samples), "told": {"name": ["x"] * len(samples)}}
            ),
            r"a list of one sample, \['x'\]; expected",
        ),
        (
            loader_of(collate_fn=lambda samples: {**collate(samples), "name": np.arange(len(samples))}),
            r"an? ndarray of one sample, array\(\[0\]\); expected",
        ),
        (
            loader_of(collate_fn=lambda samples: collate(sorted(samples, key=lambda s: -len(s[0])))),
            r"the same batch of the samples \d+ and \d+ in either order; expected rows in the order",
        ),
        (
            loader_of(collate_fn=lambda samples: collate(samples[:1])),
            r"of 2 samples; expected 2 rows\. Leave samples out",
        ),
        (
            loader_of(collate_fn=lambda samples: torch.ones(1, *[2] * (1 + samples[0][1] % 2))),
            r"samples 0 and 1 are collated into tensors of other numbers of dimensions",
        ),
    ],
)
def test_what_cannot_be_done_is_said(loader, message):
    # The error names what was given, what was expected and what to do.
    with pytest.raises(DataError, match=message):
        layerwise.by_length(loader)


def test_loading_draws_nothing():
    # Looking at all samples leaves the random numbers where they were.
    class Noisy(Texts):
        def __getitem__(self, index):
            torch.rand(3)
            return super().__getitem__(index)

    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    layerwise.by_length(loader_of(Noisy()))
    assert torch.equal(torch.rand(2), expected)
