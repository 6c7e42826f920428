"""What somebody changes in a data set between two epochs is seen, what loading changes is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.cache.datawatch import DataNames, DataWatch


class Data:
    """A data set with attributes of every kind."""

    def __init__(self) -> None:
        self.x, self.array = torch.arange(6.0), np.arange(6)
        self.labels, self.files = [0, 1] * 3, [("a.png", 0), ("b.png", 1)]
        self.strength, self.unused, self.loads, self.store = 1.0, 0, 0, {}

    def load(self) -> list[torch.Tensor]:
        self.loads += 1
        self.store[self.loads] = torch.ones(1)
        return [self.x[:2] * self.strength]


CHANGES = {
    "x": lambda d: d.x.__setitem__(5, 9.0),
    "array": lambda d: d.array.__setitem__(5, 9),
    "labels": lambda d: d.labels.__setitem__(3, 0),
    "files": lambda d: d.files.__setitem__(1, ("c.png", 1)),
    "strength": lambda d: setattr(d, "strength", 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_epochs(name) -> None:
    # of data anywhere; of a number that samples depend on
    data = Data()
    watch = DataWatch(data)
    watch.loaded(data.load())
    data.load()
    watch.epoch_ended()
    loads = data.loads
    assert watch.changed(data.load) == ""
    assert data.loads == loads  # nothing is loaded to say so
    CHANGES[name](data)
    assert watch.changed(data.load) == name
    watch.epoch_ended()
    assert watch.changed(data.load) == ""


def test_what_does_not_matter() -> None:
    # a number that no sample depends on; counters and stores of loading
    data = Data()
    watch = DataWatch(data)
    watch.loaded(data.load())
    watch.epoch_ended()
    data.load()
    assert watch.changed(data.load) == ""
    data.unused = 7
    assert watch.changed(data.load) == ""


def test_a_data_set_is_named_once() -> None:
    data, names, made = Data(), DataNames(), []

    def make() -> str:
        data.load()
        made.append(1)
        return f"name {len(made)}"

    assert [names.name_of(data, make), names.name_of(data, make)] == ["name 1", "name 1"]
    data.labels[0] = 1
    assert names.name_of(data, make) == "name 2"
    assert names.name_of(Data(), make) == "name 3"
