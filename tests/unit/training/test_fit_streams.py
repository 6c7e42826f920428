"""Loaders over iterable data sets: streams that are shorter or longer than they tell, used up, or empty."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from layerwise.errors import DataError, LayerwiseWarning
from layerwise.training.fit import fit
from layerwise.training.result import Result
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

DATA = tiny_data(48)


class Stream(IterableDataset):
    """The first `count` samples, in order; it tells that there are `told`."""

    def __init__(self, count: int = 48, told: int = 48) -> None:
        self.samples, self.told = [DATA[index] for index in range(count)], told

    def __iter__(self):
        return iter(self.samples)

    def __len__(self) -> int:
        return self.told


class UsedUp(Stream):
    """Goes on where it stopped, so that its second epoch has no sample."""

    def __init__(self) -> None:
        super().__init__(told=40)  # fit looks at a first batch
        self.left = iter(self.samples)

    def __iter__(self):
        return self.left


def run(train: object, **options: object) -> Result:
    """Fit all groups for three epochs on batches of 8."""
    model = Tiny()
    rates = {"stem": 1.0, "body": 1.0, "head": 1.0}
    settings: dict = {
        "plan": tiny_plan(phases=[{"name": "all", "rates": rates, "epochs": 3}]),
        "layers": tiny_layers(model),
        "lr": 3e-2,
        "cache": "off",
        "progress": False,
        **options,
    }
    return fit(model, train, **settings)


def loader(data: object) -> DataLoader:
    """Its own generator: else each epoch draws a seed from the global one, which dropout draws from."""
    return DataLoader(data, batch_size=8, generator=torch.Generator())


def test_a_stream_is_trained_on_like_its_samples_in_order() -> None:
    # The same losses and weights as a loader that does not shuffle.
    stream, samples = run(loader(Stream())), run(loader(DATA))
    assert stream.history == samples.history
    for ours, theirs in zip(stream.model.parameters(), samples.model.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_beyond_the_length_of_a_stream_are_left_out(accumulate: int) -> None:
    # The epoch has as many batches as the schedule was laid out for, and the others are warned of.
    with pytest.warns(LayerwiseWarning, match="gives more than the 4 batches that its length tells"):
        result = run(loader(Stream(count=48, told=32)), accumulate=accumulate)
    assert result.history == run(loader(Stream(count=32, told=32)), accumulate=accumulate).history
    assert [entry["steps"] for entry in result.history] == [4 // accumulate] * 3


def test_a_window_that_a_short_stream_leaves_open_is_dropped() -> None:
    # 5 of 6 batches at 2 a step: the gradient of the fifth does not join the next epoch's first step.
    with pytest.warns(LayerwiseWarning, match=r"had 2 optimiser steps.*steps_per_epoch=3"):
        short = run(loader(Stream(count=40)), accumulate=2, plan=head_only())
    with pytest.warns(LayerwiseWarning, match="had 2 optimiser steps"):
        even = run(loader(Stream(count=32)), accumulate=2, plan=head_only())
    assert [entry["steps"] for entry in short.history] == [2, 2]
    assert torch.equal(short.model.head.weight, even.model.head.weight)


def head_only() -> object:
    """Two epochs in which no batch-norm moves, so that a batch without a step leaves no trace."""
    return tiny_plan(phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 2}])


def test_a_stream_that_is_used_up_is_told() -> None:
    # A second epoch without a batch is an error for each part, and no epoch of NaN and zeros.
    with pytest.raises(DataError, match=r"gives no batch in this epoch.*begin again"):
        run(loader(UsedUp()))
    with pytest.raises(DataError, match="gives no batch in this epoch"):
        run(DATA, val=loader(UsedUp()))


def test_data_without_samples_are_told_before_training() -> None:
    # Of the test data too, and of loaders whose order is their own.
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 8), torch.zeros(0))
    for name, data in (("val", loader(Stream(0, 0))), ("test", empty), ("test", loader(Stream(0, 0)))):
        with pytest.raises(DataError, match=f"{name} holds no samples"):
            run(DATA, on_epoch=lambda entry: pytest.fail("trained"), **{name: data})
    with pytest.raises(DataError, match="train holds no samples"):
        run(loader(Stream(0, 0)))


def test_a_train_loader_must_tell_its_length() -> None:
    # Schedules need it; the message names the two ways out.
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    with pytest.raises(DataError, match="__len__, or use a map-style data set"):
        run(loader(Endless()))
    with pytest.raises(DataError, match=r"fewer samples than batch_size.*--batch-size.*--drop-last.* out"):
        run(tiny_data(5), batch_size=8, drop_last=True)


def test_a_data_set_of_whole_batches_trains_as_one_of_their_samples() -> None:
    # batch_size=None hands its samples out as they are; two of them are no pair of inputs and labels.
    batches = [DATA[start : start + 8] for start in range(0, 48, 8)]
    whole = run(DataLoader(batches, batch_size=None, generator=torch.Generator()))
    plain = run(loader(DATA))
    assert whole.steps == plain.steps == 18
    assert whole.history == plain.history
