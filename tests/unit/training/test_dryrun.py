"""What a dry run promises, by a clock that only the data move."""

import pytest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
    monkeypatch.setattr(dryrun, "time", train)
    found = dryrun.dry_run(
        model, train, train, plan=tiny_plan(), layers=tiny_layers(model), batch_size=5, accumulate=accumulate
    )
    assert [cost.epoch_s for cost in found.costs] == [2 * samples] * 2
    if accumulate == 1:
        assert [cost.step_s for cost in found.costs] == [min(samples, 5)] * 2


def test_the_batches_of_a_loader_are_taken_for_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    # of one with an order of its own, which does not tell their sizes
    train, model = Clock(12), Tiny()
    monkeypatch.setattr(dryrun, "time", train)
    loader = DataLoader(train, batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    found = dryrun.dry_run(model, loader, loader, plan=tiny_plan(), layers=tiny_layers(model))
    assert [cost.epoch_s for cost in found.costs] == [24, 24]
