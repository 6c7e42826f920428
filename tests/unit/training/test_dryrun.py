"""What a dry run promises, by a clock that only the data move."""

from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layerwise.errors import DataError
from layerwise.layers import devices
from layerwise.training import dryrun
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan


class Clock(Dataset[tuple[Tensor, ...]]):
    """A data set of which each sample takes a second to load; it is a clock as well."""

    def __init__(self, samples: int) -> None:
        self.data, self.now_s = tiny_data(samples), 0.0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.now_s += 1
        return self.data[index]

    def perf_counter(self) -> float:
        return self.now_s


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("samples", [3, 7, 12, 18])
def test_a_smaller_last_batch_is_no_measure_of_the_others(
    monkeypatch: pytest.MonkeyPatch, samples: int, accumulate: int
) -> None:
    # nor are the others one of it, in training and in validation
    train, model = Clock(samples), Tiny()
    monkeypatch.setattr(devices, "time", train)
    found = dryrun.dry_run(
        model, train, train, plan=tiny_plan(), layers=tiny_layers(model), batch_size=5, accumulate=accumulate
    )
    assert [cost.epoch_s for cost in found.costs] == [2 * samples] * 2
    if accumulate == 1:
        assert [cost.step_s for cost in found.costs] == [min(samples, 5)] * 2


def test_the_batches_of_a_loader_are_taken_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    # of one with an order of its own, which does not tell their sizes
    train, model = Clock(12), Tiny()
    monkeypatch.setattr(devices, "time", train)
    loader = DataLoader(train, batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    found = dryrun.dry_run(model, loader, loader, plan=tiny_plan(), layers=tiny_layers(model))
    assert [cost.epoch_s for cost in found.costs] == [24, 24]


def test_a_smaller_last_batch_that_is_left_out_is_not_counted() -> None:
    # as fit leaves it out, and refuses data that make no batch then
    model, settings = Tiny(), {"batch_size": 8, "drop_last": True}
    plan, layers = tiny_plan(), tiny_layers(model)
    assert dryrun.dry_run(model, tiny_data(20), plan=plan, layers=layers, **settings).steps_per_epoch == 2
    with pytest.raises(DataError, match="train makes no batch"):
        dryrun.dry_run(model, tiny_data(5), plan=plan, layers=layers, **settings)


@pytest.mark.parametrize("options", [{"class_weights": "balanced"}, {"class_weights": [1.0, 2.0]}])
def test_weights_that_do_not_fit_the_classes_are_refused_as_by_fit(options: dict[str, Any]) -> None:
    # before a machine is kept busy with what cannot run
    model = Tiny()
    with pytest.raises(DataError, match=r"no training sample|class_weights has 2 numbers for 3 classes"):
        dryrun.dry_run(model, tiny_data(classes=2), plan=tiny_plan(), layers=tiny_layers(model), **options)
