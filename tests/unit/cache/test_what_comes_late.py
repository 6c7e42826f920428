"""What the first batch does not tell of the others: shapes, errors, values, and how the loop goes on."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, default_collate

from cache_loops import Counted, both, images, off
from helpers import TinyCNN

LAST = ("layer2", "fc")
IN_ORDER = {"shuffle": False}


class Rare(Counted):
    """A few samples, at places where nobody looks at first, are taller; some others cannot be read."""

    taller: tuple[int, ...] = (2, 3)

    def __init__(self, *unreadable: int) -> None:
        base = images(40)
        super().__init__(base.inputs, base.labels)
        self.unreadable = unreadable

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.unreadable:
            raise OSError("no such file")
        x, y = super().__getitem__(index)
        return (torch.cat([x, x], 1) if index in self.taller else x), y


class Epochs(Sampler[list[int]]):
    """Gives the batches of each epoch in turn."""

    def __init__(self, *epochs: list[list[int]]) -> None:
        self.epochs, self.begun = epochs, 0

    def __iter__(self) -> Iterator[list[int]]:
        self.begun += 1
        return iter(self.epochs[(self.begun - 1) % len(self.epochs)])

    def __len__(self) -> int:
        return len(self.epochs[0])


def given(*epochs: list[list[int]]) -> dict[str, Any]:
    return {"batch_size": 1, "shuffle": False, "batch_sampler": Epochs(*epochs)}


def one_ahead(batches: Any) -> Iterator[Any]:
    """Ask for a batch before the one before it is used."""
    waiting = None
    for batch in batches:
        if waiting is not None:
            yield waiting
        waiting = batch
    yield waiting


def passing_over(batches: Any) -> Iterator[Any]:
    """Leave out what cannot be loaded."""
    batches = iter(batches)
    while True:
        try:
            yield next(batches)
        except StopIteration:
            return
        except OSError:
            pass


def less_learns_later(model: nn.Module, epoch: int) -> None:
    if epoch == 1:
        model.layer2[0].bias.requires_grad_(False)


REST = [[i, i + 1] for i in range(4, 40, 2)]


# -- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [iter, one_ahead])
def test_a_rare_shape(through) -> None:
    # the samples are sorted by shape when the first of them comes
    text = both(TinyCNN, Rare, *LAST, batch=2, loader_options=IN_ORDER, through=through).text
    assert "cut at layer1" in text
    assert "samples have 2 shapes" in text


def test_a_rare_shape_in_the_first_batch_of_a_phase() -> None:
    options = given([[0, 1], *REST], [[2, 3], [0, 1], *REST], [[2, 3], *REST])
    cached = both(TinyCNN, Rare, *LAST, loader_options=options, before_epoch=less_learns_later)
    assert "samples have 2 shapes" in cached.text
    assert cached.cache._supplies[0].replays == 18


@pytest.mark.parametrize("in_phase", [0, 1])
def test_a_sample_that_cannot_be_read_when_a_rare_shape_comes(in_phase) -> None:
    # all samples are loaded to sort them; the loop, which would pass over that one, loses no other
    late = [[[0, 1], [6, 7]], [[2, 3], [0, 1], *REST], REST]
    text = off(
        TinyCNN, lambda: Rare(5), *LAST, through=passing_over, before_epoch=less_learns_later,
        loader_options=given(*late) if in_phase else given([[0, 1], [2, 3], *REST]),
    )  # fmt: skip
    assert "off: a sample could not be loaded in this process: OSError: no such file" in text


def similar(samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    x, y = default_collate(samples)
    return x, y, (y[:, None] == y).float()


def counted(samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    return (*default_collate(samples), torch.tensor(len(samples)))


@pytest.mark.parametrize(
    ("collate", "told"),
    [
        (similar, r"differ in shape from batch to batch \(\(4,\), then \(2,\)\)"),
        (counted, r"has the shape \(\): the first dimension"),
    ],
)
def test_tensors_that_are_not_made_of_samples(collate, told) -> None:
    # a row for each sample is as long as the batch, or a number has no rows
    text = off(TinyCNN, images, *LAST, loader_options={"collate_fn": collate})
    assert re.fullmatch(f"prefix cache: off: .*{told}.*", text)


# -- values that are no tensors -------------------------------------------------------------------


class Numbered(Rare):
    """Its samples tell their number."""

    taller = (2, 3, 8, 9)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:  # type: ignore[override]
        return *super().__getitem__(index), index


def noted(special: int, samples: list[Any]) -> tuple[Tensor, Tensor, str]:
    """A word for the batch, another one for that of a special sample."""
    x, y = default_collate([(x, y) for x, y, _ in samples])
    return x, y, "special" if any(number == special for *_, number in samples) else "usual"


def by_word(model: nn.Module, batch: Any) -> Tensor:
    x, y, word = batch
    return nn.functional.cross_entropy(model(x), y) * (1 if word == "usual" else 3)


SOME, ALL = [[0, 1], [2, 3], *REST[:-1]], [[0, 1], [2, 3], *REST]
ORDERS = {
    "in the first epoch": (39, [ALL]),
    "of samples that come later": (39, [SOME, ALL, ALL]),
    "of a few samples of another shape": (2, [ALL]),
}


@pytest.mark.parametrize(("special", "epochs"), ORDERS.values(), ids=ORDERS)
def test_a_word_that_is_another_one_for_later_batches(special, epochs) -> None:
    options = given(*epochs) | {"collate_fn": functools.partial(noted, special)}
    cached = both(TinyCNN, Numbered, *LAST, step=by_word, loader_options=options)
    assert "samples have 2 shapes" in cached.text
    assert cached.cache._supplies[0].replays == len(epochs[-1])


# -- a part of a batch ----------------------------------------------------------------------------


class WithTable(nn.Module):
    """Returns a table beside its features, the same for all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.table(torch.arange(6))


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mix, self.fc = WithTable(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        features, table = self.body(x)
        return self.fc(features.mean((2, 3)) + self.mix(table).mean(0))


def test_one_sample_that_is_missing_beside_a_value_that_is_none_of_samples() -> None:
    # it is computed in a full batch, of which the table is no part
    options = given([[0, 1, 2, 3]], [[0, 1, 2, 4], [3, 5, 6, 7]], [[4, 5, 6, 7]])
    cached = both(Tabled, images, "mix", "fc", loader_options=options)
    assert cached.cache._supplies[0].replays == 1
    assert "8 of 22 samples stored" in cached.text


# -- how the model is called ----------------------------------------------------------------------


class Named(TinyCNN):
    def forward(self, x: Tensor | None = None, images: Tensor | None = None) -> Tensor:
        return super().forward(x if images is None else images)


def test_another_way_to_call_the_model_in_a_later_phase() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        by_name = not model.layer2[0].bias.requires_grad
        return nn.functional.cross_entropy(model(images=batch[0]) if by_name else model(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="is off: the model is called in another way"):
        cached = both(Named, images, *LAST, step=step, before_epoch=less_learns_later)
    assert "cut at layer1" in cached.text


def test_the_loop_writes_into_the_batch_before_the_model_gets_it() -> None:
    text = off(
        TinyCNN, images, *LAST,
        step=lambda m, b: nn.functional.cross_entropy(m(b[0].mul_(0.5)), b[1]),
    )  # fmt: skip
    assert "the loop writes into the batch before the model gets it" in text


@pytest.mark.filterwarnings("ignore:TF32")
def test_other_kernels_around_each_call_than_around_the_loop() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="is off: the model is called under other settings of torch"):
        both(TinyCNN, images, *LAST, step=step)


class OfFour(nn.Module):
    """Takes batches of four, and no others."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, *x.shape[1:])


def test_a_frozen_part_that_takes_one_batch_size_only() -> None:
    def make() -> nn.Module:
        model = TinyCNN()
        model.stem.append(OfFour())
        return model

    text = off(make, images, *LAST, loader_options={"drop_last": True})
    assert "off: looking at the first batch raised RuntimeError: " in text


# -- what is missing of a batch that was made in eval mode, as transformers' Trainer begins an epoch ----


def in_eval_mode(model: nn.Module, epoch: int) -> None:
    model.eval()


def set_to_train(model: nn.Module, batch: Any) -> Tensor:
    model.train()
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_rare_shape_then() -> None:
    # it goes through the plain model, and the samples are sorted, as by a batch of which all was known before
    options = given([[0, 1], [6, 7]], [[2, 3], [0, 1], *REST], [[2, 3], *REST])
    text = both(
        TinyCNN, Rare, *LAST, loader_options=options, before_epoch=in_eval_mode, step=set_to_train
    ).text
    assert "samples have 2 shapes" in text
    assert "samples stored so far" not in text


class Bright(Counted):
    """A sample of very large numbers."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (x * 1e6 if index == 5 else x), y


def test_values_then_that_do_not_fit() -> None:
    base = images()
    text = off(
        TinyCNN, lambda: Bright(base.inputs, base.labels), *LAST,
        before_epoch=in_eval_mode, step=set_to_train, dtype=torch.float16, exact=False,
        loader_options=given([[0, 1]], [[4, 5], [0, 1]], [[0, 1], [4, 5]]),
    )  # fmt: skip
    assert "does not fit into float16" in text


@pytest.mark.parametrize("keeps", [True, False])
def test_less_learns_from_the_middle_of_each_epoch_on(keeps) -> None:
    # batches are made several at once; those that were made for the other state are made anew
    steps = iter(range(10**6))

    def step(model: nn.Module, batch: Any) -> Tensor:
        model.fc.bias.requires_grad_(next(steps) % 16 < 5)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    sampler = None if keeps else list(torch.randperm(64, generator=torch.Generator().manual_seed(0)))
    run = both(
        TinyCNN,
        lambda: images(64),
        *LAST,
        epochs=5,
        step=step,
        loader_options={"shuffle": False, "sampler": sampler},
    )
    assert run.loads[-2:] == [8, 8]  # the first batch of each state, since nobody told it


class Turned(nn.Module):
    """Subtracts what another attribute says of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.is_turned = nn.Linear(192, 8), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x.flatten(1))
        a, b = x.sin(), x.cos()
        return b - a if self.is_turned else a - b


def test_the_same_operations_then_on_exchanged_values() -> None:
    # what is stored is known to be of the others, and is computed again
    def turn(model: nn.Module, epoch: int) -> None:
        model[0].is_turned = epoch >= 3

    cached = both(lambda: nn.Sequential(Turned(), nn.Linear(8, 4)), images, "1", epochs=6, before_epoch=turn)
    assert "off" not in cached.text
    assert [loads > 0 for loads in cached.loads] == [True, False, False, True, False, False]
