"""What one batch shows of the frozen part, and what keeps it from being cached, or moves the cut."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import default_collate

from cache_loops import Counted, both, images, off, train
from helpers import TinyCNN


class Net(nn.Module):
    """A frozen body, and two heads that learn; `run` calls them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.other = nn.Linear(192, 8), nn.Linear(8, 8)
        self.head, self.second, self.run = nn.Linear(4, 4), nn.Linear(4, 4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x.flatten(1))


class Giving(nn.Linear):
    """Gives what `made` makes of the features of a batch; has no module inside at which to cut."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__(192, 4)
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(super().forward(x.flatten(1)))


class Reader(nn.Module):
    """Reads the tensors that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, given: Any) -> Tensor:
        added = given[1].sum() if len(given) > 1 and isinstance(given[1], Tensor) else 0
        return self.head(given[0] + added)


def giving(made: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Giving(made), Reader())


# -- samples that come otherwise --------------------------------------------------------------------


def centred(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x - x.mean(0), y


def test_a_collate_function_that_mixes_samples() -> None:
    text = off(giving(lambda x: (x,)), images, "1", loader_options={"collate_fn": centred})
    assert "a sample of a batch depends on the other samples that are collated with it" in text


@pytest.mark.parametrize("first", [[0, 1, 2, 3], [0, 1, 2, 2]])
def test_a_collate_function_that_counts_labels(first) -> None:
    # a label comes in the first batch as often as among its samples that are loaded again
    def weighted(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x, y, torch.bincount(y)[y] * 1.0

    def data() -> Counted:
        found = images()
        found.labels[:4], found.labels[4:] = torch.tensor(first), 1
        return found

    text = off(
        giving(lambda x: (x,)), data, "1",
        step=lambda m, b: (nn.functional.cross_entropy(m(b[0]), b[1], reduction="none") * b[2]).mean(),
        loader_options={"collate_fn": weighted, "shuffle": False},
    )  # fmt: skip
    assert "a sample of a batch depends on the other samples that are collated with it" in text


def test_names_in_a_batch_are_loaded_again() -> None:
    # with ghosts in place of the images all the same
    seen = []

    def named(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x, y, [f"sample {label}" for label in y.tolist()]

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch[2] == [f"sample {label}" for label in batch[1].tolist()])
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    cached = both(giving(lambda x: (x,)), images, "1", step=step, loader_options={"collate_fn": named})
    assert "memory, cut at" in cached.text
    assert all(seen)


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_batches_that_are_loaded_again_in_another_size(monkeypatch) -> None:
    # which nothing tells that the cache watches
    def cropped(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x[..., : int(os.environ["CROPPED_TO"])], y, [f"sample {label}" for label in y.tolist()]

    def crop(model: nn.Module, epoch: int) -> None:
        monkeypatch.setenv("CROPPED_TO", "8" if epoch < 2 else "6")

    both(TinyCNN, images, "layer2", "fc", before_epoch=crop, epochs=4, loader_options={"collate_fn": cropped})


# -- values and calls that depend on the batch ------------------------------------------------------


GIVEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "pairs of samples": (lambda x: (x, x @ x.T), r"shape \(4, 4\) for 4 samples and \(2, 2\) for 2"),
    "more tensors": (lambda x: [x] * len(x), "has a different structure at another batch size"),
    "their number": (lambda x: (x, len(x)), "holds a number that depends on the batch size"),
    "an array": (lambda x: (x, np.ones(3)), "or what cannot be compared"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_frozen_module_gives_something_else_for_fewer_samples(name) -> None:
    made, why = GIVEN[name]
    assert re.search(why, off(giving(made), images, "1"))


def by_size(model: Any, x: Tensor) -> Tensor:
    features = model.body(x)[:, :4]
    return (model.head if len(x) > 2 else model.second)(features)


def by_missing_values(model: Any, x: Tensor) -> Tensor:
    with _disable_current_modes():  # a recording does not see that a value of the batch is looked at
        missing = type(x) is Tensor and bool(x.isnan().any())
    return (model.second if missing else model.head)(model.body(x)[:, :4])


def by_first_sample(model: Any, x: Tensor) -> Tensor:
    with _disable_current_modes():
        is_marked = type(x) is Tensor and bool(x[0, 0] < -5)
    return (model.second if is_marked else model.head)(model.body(x)[:, :4])


def by_pairs(model: Any, x: Tensor) -> Tensor:
    features = model.body(x)[:, :4]
    return model.head(nn.functional.pad((features @ features.T).sum(1, keepdim=True), (0, 3)))


def marked() -> Counted:
    data = images(24)
    data.inputs[3, 0, 0, 0] = -9.0
    return data


HEADS = {  # what calls the heads, the data, where it is cut: at a head, unless that is not called each time
    "by size": (by_size, images, "cut at body "),
    "by missing values": (by_missing_values, images, "cut at input of head "),
    "by the first sample": (by_first_sample, marked, "cut at body "),
    "of pairs": (by_pairs, images, "cut at body .*mixes the samples"),
}


@pytest.mark.parametrize("name", HEADS)
def test_which_head_is_called(name) -> None:
    run, data, where = HEADS[name]
    options = {"loader_options": {"shuffle": False}, "batch": 6 if data is marked else 4}
    assert re.search(where, both(lambda: Net(run), data, "head", "second", **options).text)


def test_a_head_that_gets_fewer_rows_than_there_are_samples() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        return nn.functional.pad(model.head(model.body(x)[1:, :4]), (0, 0, 1, 0))

    text = off(lambda: Net(run), images, "head", "second")
    assert "the value at input of head has the shape (3, 4) for 4 samples and (1, 4) for 2" in text


@pytest.mark.parametrize("needed", [True, False])
def test_a_frozen_module_that_is_not_called_for_few_samples(needed) -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        features = model.body(x)
        if len(x) > 2:
            more = model.other(features)
            features = more if needed else features
        return model.head(features[:, :4])

    text = off(lambda: Net(run), images, "head", "second")
    assert ("for some samples of a batch" if needed else "other runs at one batch size and not at") in text


# -- what nobody sees -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda x, n: (x + n,), "differs when the same batch is computed again"),
        (lambda x, n: (x, torch.full((4,), float(n))), r"value at 0\[1\] differs from batch to batch"),
    ],
)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_frozen_part_that_counts_its_calls(what, why) -> None:
    def make() -> nn.Module:
        counts = itertools.count()  # where no snapshot finds it
        return nn.Sequential(Giving(lambda x: what(x, next(counts))), Reader())

    assert re.search(why, train(make, images(), "1", cached=True).text)


@pytest.mark.parametrize("other", [range(1, 100), {1}])
def test_a_head_that_is_not_called_each_time(other) -> None:
    # in neither pass after the recording, or not in the first of them, that of the whole batch
    def make() -> nn.Module:
        counts = itertools.count()
        heads = lambda model: model.second if next(counts) in other else model.head  # noqa: E731
        return Net(lambda model, x: heads(model)(model.body(x)[:, :4]))

    assert "cut at body " in train(make, images(), "head", "second", cached=True).text


def test_an_operation_that_draws_one_random_number_for_a_batch() -> None:
    # torch is not told that it draws: only other random numbers tell
    @torch.library.custom_op("layerwise_drawing::scaled", mutates_args=())
    def scaled(x: Tensor) -> Tensor:
        return x * torch.rand(())

    assert "draws random numbers" in off(giving(lambda x: (scaled(x),)), images, "1")


class Noise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self) -> Tensor:
        return torch.rand(4, generator=self.generator)


def test_a_generator_of_torch_s_that_draws_for_what_learns() -> None:
    # before the frozen part runs, which has nothing of it: the recording knows where such numbers go
    def run(model: Any, x: Tensor) -> Tensor:
        noise = model.noise()
        return model.head(model.body(x)[:, :4] + noise)

    def make() -> nn.Module:
        model = Net(run)
        model.noise = Noise()
        return model

    assert "memory, cut at body" in both(make, images, "head", "second").text


class DrawingRarely(Counted):
    """One of 60 samples draws a random number, and makes nothing of it."""

    def __init__(self, rare: int) -> None:
        base = images(60)
        super().__init__(base.inputs, base.labels)
        self.rare = rare

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.rare:
            torch.rand(1)
        return super().__getitem__(index)


def test_a_sample_that_is_loaded_beside_the_only_one_of_a_batch_draws_nothing() -> None:
    # random numbers of the loop go on as if it had not been loaded; the loop itself leaves it out
    order = [0, *range(2, 20)]
    options = {"shuffle": False, "sampler": order, "batch_size": 1}
    cached = both(giving(lambda x: (x,)), lambda: DrawingRarely(1), "1", loader_options=options)
    assert "memory, cut at" in cached.text


@pytest.mark.parametrize("rare", [3, 5])
def test_a_sample_that_draws_is_drawn_once(rare) -> None:
    # it is noticed when its batch was made, and the batch is then loaded again
    options = {"shuffle": False, "batch_size": 4}
    text = off(giving(lambda x: (x,)), lambda: DrawingRarely(rare), "1", loader_options=options)
    assert "draws random numbers" in text


def test_draws_of_samples_that_are_a_batch_each() -> None:
    # what was drawn is compared, and not what a second loading draws
    data = images(12)
    data.transform = lambda x: x + 0.1 * torch.randn_like(x)
    options = {"batch_size": 1, "shuffle": False}
    text = train(
        giving(lambda x: (x,)), data, "1", cached=True, views=2, epochs=4, loader_options=options
    ).text
    assert "memory, cut at" in text


# -- how many samples are tried beside the batch ----------------------------------------------------


def test_a_last_batch_is_replayed_as_so_many_samples_were_tried() -> None:
    cached = both(giving(lambda x: (x,)), lambda: images(23), "1")
    assert cached.loads[1:] == [0, 0]


class Normed(nn.Module):
    """What learns runs before the frozen part, and cannot train on one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.head = nn.BatchNorm1d(192), nn.Linear(192, 8), nn.Linear(200, 4)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.flatten(1))
        return self.head(torch.cat([normed, self.body(x.flatten(1))], 1))


def test_one_sample_alone_is_not_tried_where_the_loader_makes_no_such_batch() -> None:
    cached = both(Normed, lambda: images(21), "norm", "head", loader_options={"drop_last": True})
    assert "memory, cut at body" in cached.text
