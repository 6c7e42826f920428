"""Arguments of the model that the loop makes: they go to it as they are, and nothing of them is stored."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import Outcome, assert_same, both, freeze_prefix, images, off, train
from helpers import TinyCNN
from layerwise.errors import LayerwiseWarning

LAST = ("layer2", "fc")


class Steered(TinyCNN):
    """What `place` says is done with a second argument."""

    def __init__(self, place: str = "late") -> None:
        super().__init__()
        self.place = place

    def forward(self, images: Tensor, steer: Tensor) -> Tensor:
        if self.place == "branch first" and bool(steer.mean() > 0.5):
            images = images.flip(-1)
        if self.place == "first":
            images = images * steer.reshape(-1, 1, 1, 1)
        features = self.layer1(self.stem(images))
        if self.place == "late":
            features = features * steer.reshape(-1, 1, 1, 1)
        if self.place == "branch" and bool(steer.mean() > 0):
            features = features + 1
        if self.place == "written":
            steer.mul_(0)
        return self.fc(self.layer2(features).mean((2, 3))) + (0 if self.place == "unused" else steer.mean())


def step(model: nn.Module, batch: Any, size: int | None = None) -> Tensor:
    x, y = batch
    steer = torch.rand(()) if size == 0 else torch.rand(len(x) if size is None else size)
    return nn.functional.cross_entropy(model(x, steer), y)


@pytest.mark.parametrize("place", ["late", "unused", "branch"])
def test_one_number_for_each_sample(place) -> None:
    # drawn anew in each step, for batches of several sizes; a branch by it runs as the loop decides
    outcome = both(lambda: Steered(place), images, *LAST, step=step, validate=True)
    assert "cut at layer1" in outcome.text
    assert outcome.loads[-1] == 0


def test_one_number_for_the_batch() -> None:
    outcome = both(Steered, images, *LAST, step=lambda m, b: step(m, b, size=0))
    assert "cut at layer1" in outcome.text


class Led(nn.Module):
    """What learns comes before the frozen part, and needs as many numbers as it has samples, or a table."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.body, self.head = nn.Linear(3, 5), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, steer: Tensor, images: Tensor) -> Tensor:
        led = self.neck(images.mean((2, 3)))
        led = led * steer if len(steer) == len(images) else led @ steer
        return self.head(self.body(images).relu().mean((2, 3))) + led


@pytest.mark.parametrize("size", [None, 5], ids=["for each sample", "a table"])
def test_it_comes_first_and_is_read_first(size) -> None:
    # in the cache's own passes, too, which are of fewer samples
    def led(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(torch.rand(size or len(x), 5), x), y)

    outcome = both(Led, images, "neck", "head", step=led)
    assert "cut at input of head" in outcome.text


def test_a_number_given_by_name_that_is_counted_from_the_labels() -> None:
    # as Hugging Face's Trainer gives `num_items_in_batch`
    def counted(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(images=x, steer=(y > 0).sum().float()), y)

    assert "cut at layer1" in both(Steered, images, *LAST, step=counted).text


class Centred(nn.Module):
    """Code between the modules mixes samples, so that what the head reads cannot be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.mix = nn.Linear(12, 8), nn.Linear(12, 2), nn.Bilinear(2, 1, 4)
        self.head = nn.Linear(1, 4)

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        wide = self.wide(x)
        distances = (wide - wide.mean(0)).pow(2).sum(1, keepdim=True)
        return self.head(distances) * self.mix(self.narrow(x), steer.expand(len(x), 1))


def test_the_loop_makes_it_and_a_smaller_cut_does_not_hold() -> None:
    data = TensorDataset(torch.randn(22, 12), torch.arange(22) % 4)
    outcome = both(Centred, lambda: data, "head", step=lambda m, b: step(m, b, size=0))
    assert "cut at wide, narrow" in outcome.text


@pytest.mark.parametrize("place", ["first", "branch first"])
def test_what_the_frozen_part_computes_depends_on_it(place) -> None:
    text = off(lambda: Steered(place), images, *LAST, step=step, warns=False)
    assert "reads an argument of the model that is not one of the batch's tensors" in text


def test_the_model_writes_to_it() -> None:
    assert "writes to an argument" in off(lambda: Steered("written"), images, *LAST, step=step)


def test_a_view_of_the_batch_is_not_an_argument_of_its_own() -> None:
    def viewed(model, batch):
        return nn.functional.cross_entropy(model(batch[0], batch[0][:, 0, 0, 0]), batch[1])

    assert "is a part of another tensor" in off(Steered, images, *LAST, step=viewed)


class Translator(nn.Module):
    """Reads a source, and what is there of the target."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh())
        self.words, self.decoder = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(self.words(target) + self.encoder(source).mean(1, keepdim=True))


def translations() -> TensorDataset:
    drawn = torch.Generator().manual_seed(1)
    return TensorDataset(*(torch.randint(9, (22, length), generator=drawn) for length in (5, 7)))


@pytest.mark.parametrize("words", [("words",), ()], ids=["all of the decoder", "a part of it"])
def test_a_part_of_what_else_is_in_the_batch(words) -> None:
    # teacher forcing: the model is given all words but the last, and is to tell all but the first
    def forced(model, batch):
        source, target = batch
        return nn.functional.cross_entropy(model(source, target[:, :-1]).mT, target[:, 1:])

    outcome = both(Translator, translations, *words, "decoder", step=forced, validate=True)
    assert "cut at encoder" in outcome.text


def test_the_model_writes_to_a_part_of_the_batch() -> None:
    class Writing(Translator):
        def forward(self, source, target):
            target[:, 0] = 0
            return super().forward(source, target)

    def forced(model, batch):
        return nn.functional.cross_entropy(model(batch[0], batch[1][:, :-1]).mT, batch[1][:, :-1])

    assert "writes to an argument" in off(Writing, translations, "decoder", step=forced)


def test_a_part_of_an_argument_is_refused() -> None:
    def forced(model, batch):
        return nn.functional.cross_entropy(model(batch[1], batch[1][:, :-1]).mT, batch[1][:, 1:])

    assert "is a part of another" in off(Translator, translations, "decoder", step=forced)


@pytest.mark.parametrize("other", [(3, 3), (5, 2)], ids=["width", "length"])
def test_another_shape_goes_through_the_plain_model(other) -> None:
    class Summed(Steered):
        def forward(self, images, steer):
            if tuple(steer.shape) == other:  # the shape decides what the frozen part gets
                images = images.flip(-1)
            return super().forward(images, steer.mean())

    def run(cached: bool) -> Outcome:
        shapes = itertools.cycle([(3, 2), (3, 2), other])
        return train(
            Summed, images(20), *LAST, cached=cached,
            step=lambda m, b: nn.functional.cross_entropy(m(b[0], torch.rand(next(shapes))), b[1]),
        )  # fmt: skip

    plain, cached = run(False), run(True)
    assert_same(plain, cached)
    assert "cut at layer1" in cached.text


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.body(self.table(ids)) * mask[..., None]).mean(1))


def one_by_one(model: Masked, cache: layerwise.PrefixCache) -> Iterator[Any]:
    """Between its steps, a loop passes other samples with an equal mask."""
    for x, mask, y in cache.batches():
        model(x.flip(0) % 7, torch.ones_like(mask))
        yield x, mask, y


def all_at_hand(model: Masked, cache: layerwise.PrefixCache) -> Iterator[Any]:
    return iter(list(cache.batches()))


@pytest.mark.parametrize("batches", [one_by_one, all_at_hand])
def test_a_batch_is_known_by_all_its_arguments(batches) -> None:
    # all masks are equal, so one argument of a batch has the values of that of any other
    ids = torch.randint(0, 30, (24, 5))
    data = TensorDataset(ids, torch.ones_like(ids), ids.sum(1) % 2)
    model = Masked()
    freeze_prefix(model, "head")
    cache = layerwise.PrefixCache(model, DataLoader(data, batch_size=4), storage="memory")
    for _ in range(3):
        for x, mask, y in batches(model, cache):
            nn.functional.cross_entropy(model(x, mask), y).backward()
    assert "cut at" in cache.describe()
    (supply,) = cache._supplies
    assert supply.replays == 6


class TwoPlaces(TinyCNN):
    """A second argument acts before or behind the frozen layers, by its name; `scale` does so too."""

    def forward(
        self, images: Tensor, early: Tensor | None = None, late: Tensor | None = None, scale: float = 1
    ) -> Tensor:
        if early is not None:
            images = images + early
        if scale is True:
            images = images.flip(-1)
        features = self.layer1(self.stem(images.abs() * math.copysign(1, scale)))
        return self.fc((self.layer2(features) + (0 if late is None else late)).mean((2, 3)))


WAYS: dict[str, Any] = {
    "None where a tensor was": [
        lambda m, x: m(x, None, torch.rand(())),
        lambda m, x: m(x, torch.rand(()), None),
    ],
    "by other names": [lambda m, x: m(x, late=torch.rand(())), lambda m, x: m(x, early=torch.rand(()))],
    "equal, and not the same": [lambda m, x: m(x, scale=1), lambda m, x: m(x, scale=True)],
    "another zero": [lambda m, x: m(x, scale=0.0), lambda m, x: m(x, scale=-0.0)],
    "another beside it": [lambda m, x: m(x), lambda m, x: m(x, None, torch.rand(()))],
    "left out": [lambda m, x: m(x, None, torch.rand(())), lambda m, x: m(x)],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_calls_in_another_way_than_the_first_are_plain(ways) -> None:
    def run(cached: bool) -> Outcome:
        turns = itertools.cycle([ways[0], ways[0], ways[1]])
        return train(
            TwoPlaces, images(20), *LAST, cached=cached,
            step=lambda m, b: nn.functional.cross_entropy(next(turns)(m, b[0]), b[1]),
        )  # fmt: skip

    plain, cached = run(False), run(True)
    assert_same(plain, cached)
    assert "cut at layer1" in cached.text
    (supply,) = cached.cache._supplies
    assert 0 < supply.replays < 5


def test_two_loaders_may_call_the_model_in_two_ways() -> None:
    # what one call's recording tells does not hold for the other: there, the argument acts before the cut
    def stepped(model, batch):
        name = "late" if model.training else "early"
        return nn.functional.cross_entropy(model(batch[0], **{name: torch.rand(())}), batch[1])

    outcome = both(TwoPlaces, images, *LAST, step=stepped, validate=True)
    train_told, eval_told = outcome.text.split("(loader 2)")
    assert "cut at layer1" in train_told
    assert "off" in eval_told


class Named(TinyCNN):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return super().forward(one) + 2 * super().forward(other)


def test_names_in_another_order_are_another_way() -> None:
    pairs = TensorDataset(*images().inputs.split(11), torch.randint(0, 4, (11,)))
    turns = [itertools.cycle([True, True, False]) for _ in range(2)]

    def stepped(model, batch, turn=None):
        one, other, y = batch
        names = {"one": one, "other": other} if next(turn) else {"other": one, "one": other}
        return nn.functional.cross_entropy(model(**names), y)

    runs = [
        train(Named, pairs, *LAST, cached=cached, step=functools.partial(stepped, turn=turn))
        for cached, turn in zip((False, True), turns)
    ]
    assert_same(*runs)


def test_what_the_model_writes_past_torch_is_not_written_twice() -> None:
    class Counting(Steered):
        def forward(self, images, steer):
            steer.numpy()[...] += 1
            return super().forward(images, steer)

    kept = [torch.zeros(()), torch.zeros(())]

    def run(cached: bool) -> Outcome:
        return train(
            Counting, images(), *LAST, cached=cached,
            step=lambda m, b: nn.functional.cross_entropy(m(b[0], kept[cached]), b[1]),
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerwiseWarning)
        assert_same(run(False), run(True))
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2)]),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),  # as many as labels
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:.*quantiz")
def test_arguments_that_are_not_dense_are_refused(make) -> None:
    class Weighted(TinyCNN):
        def forward(self, images, weights):
            return super().forward(images) * len(weights.values() if weights.is_sparse_csr else [1])

    text = off(
        Weighted, images, *LAST, step=lambda m, b: nn.functional.cross_entropy(m(b[0], make()), b[1])
    )  # fmt: skip
    assert "sparse, nested or quantised" in text


class Remembering(TinyCNN):
    """Takes a memory of its calls, as decoders do that generate a text."""

    def forward(self, images: Tensor, memory: Any = None) -> Tensor:
        features = super().forward(images)
        if memory is not None:
            memory.texts.append(features.argmax(1))
        return features


class Memory:
    def __init__(self) -> None:
        self.texts: list[Tensor] = []


@pytest.mark.parametrize("scored", [True, False])
def test_a_batch_that_comes_with_an_object_first_and_then_without(scored) -> None:
    # as transformers' Seq2SeqTrainer evaluates: texts are generated, then the loss is computed
    def stepped(model, batch):
        memory = Memory()
        output = model(batch[0], memory)
        return nn.functional.cross_entropy(model(batch[0]) if scored else output, batch[1])

    if scored:
        assert "cut at layer1" in both(Remembering, images, *LAST, step=stepped, validate=True).text
    else:
        assert "an object whose content may change" in off(Remembering, images, *LAST, step=stepped)
