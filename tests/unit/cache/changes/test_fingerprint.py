"""A cache's name changes with everything that its values depend on."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from layerwise.cache.changes.fingerprint import (
    checksum,
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


def test_the_order_in_memory_of_a_weight() -> None:
    weight = torch.randn(4, 3, 2, 2)
    states = [
        (weights_digest(held, ["w"]), quick_state(held, ["w"]), joint_state([held["w"]]))
        for lying in (weight, weight.to(memory_format=torch.channels_last))
        for held in ({"w": lying},)
    ]
    assert [one == other for one, other in zip(*states, strict=True)] == [False] * 3


SPECIAL: dict[str, Callable[[float], torch.Tensor]] = {
    "conjugate": lambda v: torch.full((4,), complex(1, v)).conj(),
    "negative": lambda v: torch.full((4,), complex(1, v)).conj().imag,
    "complex": lambda v: torch.full((3, 2), complex(1, v), dtype=torch.complex128).t(),
    "quantised": lambda v: torch.quantize_per_tensor(torch.full((8, 8), v), 0.5, 0, torch.qint8),
    "quantised in other steps": lambda v: torch.quantize_per_tensor(torch.full((8,), v), v, 0, torch.qint8),
    "quantised from another zero": lambda v: torch.quantize_per_tensor(
        torch.full((8,), -v), 1.0, int(v), torch.quint8
    ),
    "quantised by rows": lambda v: torch.quantize_per_channel(
        torch.full((2, 3), v), torch.tensor([v, v]), torch.zeros(2), 0, torch.qint8
    ),
    "sparse": lambda v: torch.full((3, 3), v).to_sparse(),
    "sparse rows": lambda v: torch.full((3, 3), v).to_sparse_csr(),
    "sparse columns": lambda v: torch.full((3, 3), v).to_sparse_csc(),
    "of mkldnn": lambda v: torch.full((4,), v).to_mkldnn(),
    "nested": lambda v: torch.nested.nested_tensor([torch.ones(2), torch.full((3,), v)]),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.filterwarnings("ignore:Sparse CS", "ignore:.*quantiz", "ignore:The PyTorch API of nested")
def test_every_form_has_a_digest(kind) -> None:
    one, same, other = SPECIAL[kind](1.0), SPECIAL[kind](1.0), SPECIAL[kind](2.0)
    assert tensor_digest(one) == tensor_digest(same) != tensor_digest(other)
    assert checksum(one) == checksum(same) != checksum(other)
    assert joint_state([one]) == joint_state([same]) != joint_state([other])
    assert (
        quick_state({"x": one}, ["x"]) == quick_state({"x": same}, ["x"]) != quick_state({"x": other}, ["x"])
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_the_shapes_of_the_parts_count() -> None:
    one, other = (torch.nested.nested_tensor([torch.ones(n), torch.ones(5 - n)]) for n in (2, 3))
    assert tensor_digest(one) != tensor_digest(other)
    assert joint_state([one]) != joint_state([other])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_every_type_has_a_digest(dtype) -> None:
    one, other = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    assert tensor_digest(one) != tensor_digest(other)
    assert quick_state({"x": one}, ["x"]) != quick_state({"x": other}, ["x"])
    assert joint_state([one]) != joint_state([other])
    assert tensor_digest(torch.zeros((), dtype=dtype)) != tensor_digest(torch.zeros(0, dtype=dtype))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (3, 1021), (40, 1000)])
@pytest.mark.parametrize("lying", ["densely", "spread"])
def test_a_checksum_tells_which_number_is_another(dtype, shape, lying) -> None:
    tensor = (
        torch.zeros(shape, dtype=dtype) if lying == "densely" else torch.zeros(*shape, 2, dtype=dtype)[..., 0]
    )
    places, sums = {0, tensor.numel() // 2, tensor.numel() - 1}, {checksum(tensor)}
    for place in places:
        tensor[np.unravel_index(place, shape)] = 1
        sums.add(checksum(tensor))
        tensor.zero_()
    assert len(sums) == 1 + len(places)
    assert checksum(tensor.reshape(-1)[:0]) == checksum(torch.empty(0))


def exchange(tensors: list[torch.Tensor]) -> None:
    tensors[0], tensors[1] = tensors[1], tensors[0]


CHANGES = {
    "a bit": lambda tensors: tensors[1].view(torch.int32)[0].add_(1),
    "a bit of a large one": lambda tensors: tensors[2].view(torch.int32)[-1].add_(1),
    "a bit amid a large one": lambda tensors: tensors[2].view(torch.int32)[77].add_(1),
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


class Numbered:
    """Reads files that it does not list."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index):
        return torch.tensor(float((Path(self.folder) / f"{index}.txt").read_text()))


@pytest.mark.parametrize("changed", [0, 50])
def test_every_sample_of_a_dataset_whose_files_are_not_listed(changed, tmp_path) -> None:
    for index in range(100):
        (tmp_path / f"{index}.txt").write_text("1")
    base = digest(Numbered(tmp_path))
    assert digest(Numbered(tmp_path)) == base
    (tmp_path / f"{changed}.txt").write_text("2")
    assert digest(Numbered(tmp_path)) != base


class Labelled:
    """Inputs in a data set, labels and a clip value beside it; counts its loads, keeps what it loaded."""

    def __init__(self, labels: Any = None, limit: float = 9.0, transform: Any = None) -> None:
        inputs = torch.arange(300.0).view(100, 3) / 100
        inputs[4] = 5.0  # a sample that is not loaded, and the only one that a limit of 4 acts on
        self.data = TensorDataset(inputs)
        self.lab = list(range(100)) if labels is None else labels
        self.limit, self.transform, self.loads, self.kept, self.epoch = limit, transform, 0, {}, 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        self.loads += 1
        self.kept[index] = x = self.data[index][0].clamp(max=self.limit)
        return x if self.transform is None else self.transform(x)


def bounded(limit: float) -> Any:
    return lambda x: x.clamp(max=limit)


class Clip:
    """A transform, and two others of its name."""

    limit = 9.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(max=self.limit)


OtherNumber = type("Clip", (), {"limit": 4.0, "__call__": Clip.__call__})
OtherCode = type("Clip", (), {"limit": 9.0, "__call__": lambda self, x: x.clamp(max=self.limit - 5)})
FOURTH = [*range(4), -1, *range(5, 100)]  # between the samples that are loaded
OTHERS = {
    "a label": (lambda: Labelled(list(range(100))), lambda: Labelled(FOURTH)),
    "a label in an array": (lambda: Labelled(np.arange(100)), lambda: Labelled(np.array(FOURTH))),
    "a label of a type that numpy lacks": (
        lambda: Labelled(torch.arange(100).bfloat16()), lambda: Labelled(torch.tensor(FOURTH).bfloat16())
    ),
    "a label in a record": (
        lambda: Labelled([{"y": i, "x": torch.ones(1)} for i in range(100)]),
        lambda: Labelled([{"y": i, "x": torch.ones(1)} for i in FOURTH]),
    ),
    "a number": (Labelled, lambda: Labelled(limit=4.0)),
    "a number of a partial": (
        lambda: Labelled(transform=functools.partial(torch.clamp, max=9.0)),
        lambda: Labelled(transform=functools.partial(torch.clamp, max=4.0)),
    ),
    "a number that a function closes over": (
        lambda: Labelled(transform=bounded(9.0)), lambda: Labelled(transform=bounded(4.0))
    ),
    "a number of a class": (lambda: Labelled(transform=Clip()), lambda: Labelled(transform=OtherNumber())),
    "the code of a class": (lambda: Labelled(transform=Clip()), lambda: Labelled(transform=OtherCode())),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_all_that_attributes_say(name) -> None:
    # none of it shows in the samples that are loaded
    one, other = OTHERS[name]
    assert digest(one()) == digest(one())
    assert digest(one()) != digest(other())


def test_all_of_a_large_tensor() -> None:
    labels = torch.zeros(2**19)
    base = digest(Labelled(labels))
    assert digest(Labelled(labels.clone())) == base
    labels[12_345] = 1
    assert digest(Labelled(labels)) != base


def test_labels_in_a_file_are_told_by_it_and_not_read(tmp_path) -> None:
    # by its path, size and time, and by which part of it they are
    def labels(changed: int = 0) -> Any:
        mapped = np.memmap(tmp_path / "labels", mode="w+", shape=(200,), dtype=np.int64)
        mapped[4] = changed
        mapped.flush()
        os.utime(tmp_path / "labels", (1000, 1000 + changed))
        return mapped

    base = digest(Labelled(labels()[:100]))
    assert digest(Labelled(labels()[:100])) == base
    assert digest(Labelled(labels()[100:])) != base
    assert digest(Labelled(labels(1)[:100])) != base


def test_a_data_set_that_leads_to_itself() -> None:
    def circular(labels: Any) -> Labelled:
        data = Labelled(labels)
        data.data.dataset = data
        return data

    assert digest(circular(list(range(100)))) == digest(circular(list(range(100))))
    assert digest(circular(list(range(100)))) != digest(circular(FOURTH))


def test_what_loading_and_epochs_change_is_no_part() -> None:
    base = digest(Labelled())
    used = Labelled()
    for index in range(7):
        used[index]
    used.epoch = 3
    assert digest(used) == base


def test_a_data_set_that_opens_itself_when_it_is_loaded_from() -> None:
    class Lazy(Labelled):
        def __init__(self, y: torch.Tensor) -> None:
            super().__init__()
            self.y, self.dataset = y, None

        def __getitem__(self, index: int) -> Any:
            self.dataset = self.dataset or TensorDataset(torch.ones(100, 3), self.y)
            return self.dataset[index][0]

    assert digest(Lazy(torch.arange(100))) == digest(Lazy(torch.arange(100)))
    assert digest(Lazy(torch.arange(100))) != digest(Lazy(torch.tensor(FOURTH)))


SCRIPT = """
import functools, re, sys, torch
from torch import nn
from layerwise.cache.changes.fingerprint import data_digest

class Words:
    kinds = {"train", "val", "test"}
    def __init__(self):
        self.texts = ["b", "a", "c"] * 10
        self.names = {"one", "two", "three"}
        self.pattern, self.lock = re.compile("[ab]"), __import__("threading").Lock()
        self.steps = [nn.Linear(2, 2), functools.partial(self.code, known={"x", "y", "z"}), lambda x: x]
        self.held = [self.steps, self.steps]
        nn.init.ones_(self.steps[0].weight); nn.init.zeros_(self.steps[0].bias)
    def code(self, text, known):
        return float(len(text) + len(known) + (text in {"a", "bb", "ccc"}))
    def __len__(self):
        return 30
    def __getitem__(self, index):
        return torch.tensor(self.steps[1](self.texts[index]))

data = Words()
print(data_digest(data, lambda indices: torch.stack([data[i] for i in indices]), 30))
"""


def test_the_same_name_in_another_process() -> None:
    # where sets have another order and objects other addresses
    def run(seed: str, script: str = SCRIPT) -> str:
        path = os.pathsep.join(sys.path)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        command = [sys.executable, "-c", "unused = [object()] * int(" + seed + ")\n" + script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    base = run("1")
    assert len(base.strip()) == 64
    assert run("2") == base
    assert run("2", SCRIPT.replace('"three"', '"four"')) != base
