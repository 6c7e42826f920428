"""A cache's name changes with everything that its values depend on."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from layerwise.cache.fingerprint import (
    data_digest,
    joint_state,
    named_tensors,
    quick_state,
    tensor_digest,
    weights_digest,
)


def test_one_bit_of_a_weight() -> None:
    model = nn.Linear(3, 2)
    names = ["weight", "bias"]
    digest, state = weights_digest(named_tensors(model), names), quick_state(named_tensors(model), names)
    assert weights_digest(named_tensors(model), names[::-1]) == digest
    weight = model.weight.detach()
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_digest(named_tensors(model), names) != digest
    assert quick_state(named_tensors(model), names) != state


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_every_type_has_a_digest(dtype) -> None:
    one, other = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    assert tensor_digest(one) != tensor_digest(other)
    assert quick_state({"x": one}, ["x"]) != quick_state({"x": other}, ["x"])
    assert joint_state([one]) != joint_state([other])
    assert tensor_digest(torch.zeros((), dtype=dtype)) != tensor_digest(torch.zeros(0, dtype=dtype))


def exchange(tensors: list[torch.Tensor]) -> None:
    tensors[0], tensors[1] = tensors[1], tensors[0]


CHANGES = {
    "a bit": lambda tensors: tensors[1].view(torch.int32)[0].add_(1),
    "a bit of a large one": lambda tensors: tensors[2].view(torch.int32)[-1].add_(1),
    "two exchanged": exchange,
    "a value moved on": lambda tensors: tensors.__setitem__(1, tensors[1].roll(1)),
    "another shape": lambda tensors: tensors.__setitem__(0, tensors[0].view(5, 10)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_joint_state_sees(change) -> None:
    tensors = [torch.randn(50), torch.randn(50), torch.randn(300_000), torch.ones(3, dtype=torch.bool)]
    before = joint_state(tensors)
    assert joint_state([tensor.clone() for tensor in tensors]) == before
    change(tensors)
    assert joint_state(tensors) != before


def digest(data) -> str:
    def load(indices):
        return torch.utils.data.default_collate([data[i] for i in indices])

    return data_digest(data, load, len(data))


def test_tensors_and_subsets() -> None:
    x, y = torch.randn(100, 3), torch.arange(100)
    base = digest(TensorDataset(x, y))
    assert digest(TensorDataset(x.clone(), y)) == base
    changed = x.clone()
    changed[50] += 1  # between the samples that are loaded
    assert digest(TensorDataset(changed, y)) != base
    first = digest(Subset(TensorDataset(x, y), range(50)))
    assert first != base
    assert digest(Subset(TensorDataset(x, y), [*range(49), 99])) != first


class Folder:
    """Like an image folder: paths, labels, a transform."""

    def __init__(self, paths, targets, scale=1.0) -> None:
        self.paths, self.targets, self.scale = paths, targets, scale

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        return torch.tensor(float(len(self.paths[index].read_text()))) * self.scale, self.targets[index]


def test_files_labels_and_transform(tmp_path) -> None:
    paths = [tmp_path / f"{i:03d}.txt" for i in range(100)]
    for path in paths:
        path.write_text("same")
        os.utime(path, (1000, 1000))
    targets = [0] * 100
    base = digest(Folder(paths, targets))
    assert digest(Folder(paths, targets)) == base
    assert digest(Folder(paths, targets, scale=2.0)) != base
    assert digest(Folder(paths, [0] * 50 + [1] + [0] * 49)) != base
    paths[50].write_text("else")
    assert digest(Folder(paths, targets)) != base


def test_every_sample_of_a_dataset_that_lists_nothing() -> None:
    # between the samples that are loaded of other datasets
    samples = [(torch.tensor(float(i)), i) for i in range(100)]
    changed = [*samples[:50], (torch.tensor(9.0), 50), *samples[51:]]
    assert digest(samples) == digest(list(samples))
    assert digest(changed) != digest(samples)
