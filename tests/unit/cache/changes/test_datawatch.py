"""What somebody changes in a data set is seen, what loading changes is not."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import time
from array import array
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from layerwise.cache.changes.contents import Contents
from layerwise.cache.changes.datawatch import DataNames, DataWatch


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


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change(name, within) -> None:
    # of data anywhere; of a number that samples depend on; between two epochs, or amid the loads of one
    data = Data()
    watch = DataWatch(data)
    watch.loaded(data.load())
    data.load()
    loads = data.loads
    assert watch.changed(data.load) == ""
    assert data.loads == loads  # nothing is loaded to say so
    CHANGES[name](data)
    if within:
        data.load()
    assert watch.changed(data.load) == name
    data.load()
    assert watch.changed(data.load) == ""


def test_what_does_not_matter() -> None:
    # a number that no sample depends on; counters and stores of loading
    data = Data()
    watch = DataWatch(data)
    watch.loaded(data.load())
    data.load()
    assert watch.changed(data.load) == ""
    data.unused = 7
    assert watch.changed(data.load) == ""


class Level:
    """A curriculum: of 30 samples, the three hardest change with a level."""

    fixed, epoch = 0, 0

    def __init__(self) -> None:
        self.level, self.options, self.shared = 0, SimpleNamespace(level=0), multiprocessing.Value("i", 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def now(self) -> int:
        return self.level + self.options.level + self.shared.value + self.fixed + LEVEL

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index + (self.now if index > 26 else 0))])


class Warm(Level):
    """Only its epoch counts, from the third on."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(self.epoch > 1)])


class Inheriting(Level):
    """All that it has is of its base class."""


def easy(index: int) -> float:
    return float(index)


class ByFunction(Level):
    """What a function of its file says of the hardest samples counts."""

    options_of_all = {"level": 0}  # noqa: RUF012

    def __getitem__(self, index: int) -> torch.Tensor:
        level = LEVELS_OF["level"] + self.options_of_all["level"]
        return torch.tensor([easy(index) + level if index > 26 else float(index)])


class Part(Level):
    """The part of the samples that changes is a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.part = slice(0, 0)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index + self.part.stop if index > 26 else index)])


class Listed(list[float]):
    """A list that has settings."""

    level = 0

    def __init__(self) -> None:
        super().__init__(map(float, range(30)))

    def __getitem__(self, index: Any) -> Any:
        return torch.tensor([super().__getitem__(index) + (self.level if index > 26 else 0)])


LEVEL = 0
LEVELS_OF = {"level": 0}
LEVELS = {
    "attribute": ("level", Level, lambda d: setattr(d, "level", 1)),
    "of options": ("options.level", Level, lambda d: setattr(d.options, "level", 1)),
    "of several processes": ("shared._obj", Level, lambda d: setattr(d.shared, "value", 1)),
    "of the class": ("__class__.fixed", Level, lambda d: setattr(Level, "fixed", 1)),
    "of a base class": ("__class__.fixed", Inheriting, lambda d: setattr(Level, "fixed", 1)),
    "global": ("__class__.now.fget.global LEVEL", Level, lambda d: globals().update(LEVEL=1)),
    "in a global dictionary": (
        "__class__.__getitem__.global LEVELS_OF", ByFunction, lambda d: LEVELS_OF.update(level=1)
    ),
    "in a dictionary of the class": (
        "__class__.options_of_all", ByFunction, lambda d: d.options_of_all.update(level=1)
    ),
    "another function": (
        "__class__.__getitem__.global easy", ByFunction,
        lambda d: globals().update(easy=lambda index: index + 1.0)
    ),
    "other code of a function": (
        "__class__.__getitem__.global easy.__code__", ByFunction,
        lambda d: setattr(easy, "__code__", (lambda index: index + 1.0).__code__)
    ),
    "a slice": ("part", Part, lambda d: setattr(d, "part", slice(0, 1))),
    "of a list": ("level", Listed, lambda d: setattr(d, "level", 1)),
    "epoch": ("epoch", Warm, lambda d: d.set_epoch(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEVELS)
def test_a_number_that_decides_about_few_samples(name, monkeypatch) -> None:
    # those that are loaded to compare them are not among them, or not yet
    monkeypatch.setattr(Level, "fixed", 0)
    monkeypatch.setitem(globals(), "LEVEL", 0)
    monkeypatch.setitem(globals(), "easy", easy)
    monkeypatch.setattr(easy, "__code__", easy.__code__)
    monkeypatch.setitem(LEVELS_OF, "level", 0)
    monkeypatch.setitem(ByFunction.options_of_all, "level", 0)
    path, kind, change = LEVELS[name]
    data = kind()
    load = lambda: [data[index] for index in (0, 13, 26)]  # noqa: E731
    watch = DataWatch(data)
    watch.loaded(load())
    change(data)
    assert watch.changed(load) == path
    assert watch.changed(load) == ""


def test_an_epoch_that_nobody_reads() -> None:
    data = Level()
    load = lambda: [data[0]]  # noqa: E731
    watch = DataWatch(data)
    watch.loaded(load())
    data.set_epoch(3)
    assert watch.changed(load) == ""


@pytest.mark.parametrize("form", ["texts", "paths", "pairs", "records"])
def test_files_that_are_written_anew(form, tmp_path) -> None:
    # pseudo-labels that a loop writes after an epoch, to be read in the next one
    paths = [tmp_path / f"{number}.txt" for number in range(6)]
    named = {
        "texts": list(map(str, paths)), "paths": paths, "pairs": [(str(path), 1) for path in paths],
        "records": [{"file": str(path), "label": 1} for path in paths],
    }  # fmt: skip
    for path in paths:
        path.write_text("0")
    watch = DataWatch(SimpleNamespace(held=named[form]))
    watch.loaded([])
    assert watch.changed(list) == ""
    paths[4].write_text("10")
    assert watch.changed(list).startswith("held")
    assert watch.changed(list) == ""


def test_an_image_that_is_kept_in_its_record() -> None:
    # what loading a few samples changes of their records, it changes of the others later
    records = [SimpleNamespace(number=i, image=None) for i in range(30)]

    def load(*numbers: int) -> list[torch.Tensor]:
        for number in numbers:
            records[number].image = torch.full((2,), float(number))
        return [records[number].image for number in numbers]

    watch = DataWatch(SimpleNamespace(records=records))
    watch.loaded(load(0, 9))
    load(*range(30))
    assert watch.changed(lambda: load(0, 9)) == ""
    records[20].number = -1  # no setting that few samples would show: one of many records
    assert watch.changed(lambda: load(0, 9)) == "records[].number"


# -- what a data set may hold -----------------------------------------------------------------------


class Same:
    def __call__(self, x: Any) -> Any:
        return x


class Negated:
    def __call__(self, x: Any) -> Any:
        return -x


class Shift(nn.Module):
    """A transform that is a module, with a number and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0
        self.register_buffer("bias", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        return x + self.by + self.bias


@dataclass(slots=True)
class Slots:
    y: int


class ByObject:
    """A transform with a setting of its own."""

    by = 1.0

    def shifted(self, x: Any) -> Any:
        return x + self.by

    def scaled(self, x: Any) -> Any:
        return x * self.by


def shifted(x: Any, by: float = 1.0) -> Any:
    return x + by


class ByClass:
    """A transform with a setting of its class."""

    by = 1.0

    def __call__(self, x: Any) -> Any:
        return x + self.by


def closing_over(held: list[float]) -> Any:
    return lambda x: x + held[0]


def scaled(x: Any) -> Any:
    return x * SCALE


def scaled_by_another(x: Any) -> Any:
    return (lambda: scaled(x))()


class Scaled:
    def __call__(self, x: Any) -> Any:
        return x * SCALE


def rescale() -> None:
    global SCALE
    SCALE += 1


def records(count: int) -> list[dict[str, Any]]:
    return [{"x": torch.tensor([float(i), 0.0]), "y": i} for i in range(count)]


def exchange(held: list[Any]) -> None:
    held[0], held[1] = held[1], held[0]


def of_last(held: list[dict[str, Any]], name: str, value: Any) -> None:
    held[-1][name] = value


SETTINGS = {  # what `held` is, what calls it, what changes it
    "object without attributes": (Same, lambda d: d.held, lambda d: setattr(d, "held", Negated())),
    "order in a list": (lambda: [Same(), Negated()], lambda d: d.held[0], lambda d: exchange(d.held)),
    "partial": (
        lambda: functools.partial(torch.mul, other=1.0), lambda d: d.held,
        lambda d: setattr(d, "held", functools.partial(torch.mul, other=2.0)),
    ),
    "number of a module": (Shift, lambda d: d.held, lambda d: setattr(d.held, "by", 2.0)),
    "tensor of a module": (Shift, lambda d: d.held, lambda d: d.held.bias.data.fill_(1)),
    "module in a list": (lambda: [Shift()], lambda d: d.held[0], lambda d: setattr(d.held[0], "by", 2.0)),
    "number of a class": (ByClass, lambda d: d.held, lambda d: setattr(ByClass, "by", ByClass.by + 1)),
    "object of a method": (
        lambda: ByObject().shifted, lambda d: d.held, lambda d: setattr(d.held.__self__, "by", 2.0)
    ),
    "default of a function": (
        lambda: shifted, lambda d: d.held,
        lambda d: setattr(shifted, "__defaults__", (shifted(0, *shifted.__defaults__) + 1,)),
    ),
    "what a function closes over": (
        lambda: closing_over(HELD), lambda d: d.held, lambda d: HELD.__setitem__(0, HELD[0] + 1)
    ),
    "global of a function": (lambda: scaled, lambda d: d.held, lambda d: rescale()),
    "global of a function of a function": (lambda: scaled_by_another, lambda d: d.held, lambda d: rescale()),
    "global of a class": (Scaled, lambda d: d.held, lambda d: rescale()),
}  # fmt: skip
HELD, SCALE = [1.0], 1.0


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting(name) -> None:
    make, call, change = SETTINGS[name]
    data = SimpleNamespace(held=make())
    watch = DataWatch(data)
    load = lambda: [call(data)(torch.ones(2))]  # noqa: E731
    watch.loaded(load())
    assert watch.changed(load) == ""
    change(data)
    assert watch.changed(load).startswith("held")
    assert watch.changed(load) == ""


def table() -> Any:
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"x": np.arange(30.0), "label": np.arange(30), "file": ["a.png"] * 30})


def quantised(value: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.full((9,), value), 0.5, 0, torch.qint8)


def large_inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(2**19)


def circle() -> list[Any]:
    held: list[Any] = records(3)
    held.append(held)
    return held


def put_in_place_of(held: list[Any], value: int) -> None:
    held[5] = None  # what is made next lies where this image lay
    held[5] = Image.new("L", (2, 2), value)


def nested_deeply() -> list[Any]:
    held: list[Any] = []
    for _ in range(2000):
        held = [held, Same()]
    return held


CONTENT = {  # what `held` is, what changes a part of it that no sample of the test shows
    "through data": (lambda: torch.zeros(9), lambda h: h.data[5:].fill_(1)),
    "through numpy": (lambda: torch.zeros(9), lambda h: h.numpy().fill(1)),
    "bfloat16": (lambda: torch.zeros(9, dtype=torch.bfloat16), lambda h: h.data.fill_(1)),
    "float8": (
        lambda: torch.zeros(9).to(torch.float8_e4m3fn), lambda h: h.view(torch.uint8).data.fill_(1)
    ),
    "large tensor through data": (lambda: torch.zeros(2**19), lambda h: h.data[: 2**18].fill_(1)),
    "large tensor": (lambda: torch.zeros(2**19), lambda h: h[77].fill_(1)),
    "column of a large tensor": (lambda: torch.zeros(2**19, 4), lambda h: h.data[:, 3].fill_(1)),
    "large turned array": (lambda: np.zeros((4, 2**19)).T, lambda h: h.__setitem__((slice(None), 3), 1)),
    "array of objects": (lambda: np.array(["a", None, 1], dtype=object), lambda h: h.__setitem__(2, 2)),
    "records": (lambda: records(1200), lambda h: of_last(h, "y", 7)),
    "tensors of records": (lambda: records(1200), lambda h: h[-1]["x"].data.fill_(7)),
    "slots": (lambda: [Slots(i) for i in range(22)], lambda h: setattr(h[5], "y", 0)),
    "cell of a table": (table, lambda h: h.__setitem__("label", 0)),
    "text of a table": (table, lambda h: h.__setitem__("file", "b.png")),
    "name of a column": (table, lambda h: setattr(h, "columns", ["z", "label", "file"])),
    "column of a table": (lambda: table()["label"], lambda h: h.__setitem__(9, 0)),
    "sparse": (lambda: torch.eye(9).to_sparse(), lambda h: h.mul_(2)),
    "sparse rows": (lambda: torch.eye(9).to_sparse_csr(), lambda h: h.values().mul_(2)),
    "large sparse": (lambda: torch.eye(600).to_sparse(), lambda h: h._values()[77:].mul_(2)),
    "quantised": (lambda: quantised(1.0), lambda h: h.copy_(quantised(2.0))),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda h: h[1].mul_(2)),
    "without numbers": (lambda: torch.zeros(2**19, device="meta"), lambda h: h.resize_(9)),
    "large tensor without a version": (large_inference_tensor, lambda h: h.numpy()[: 2**18].fill(1)),
    "bytes": (lambda: bytearray(9), lambda h: h.__setitem__(5, 1)),
    "compact array": (lambda: array("i", range(9)), lambda h: h.__setitem__(5, 1)),
    "memory that processes share": (lambda: (ctypes.c_int * 9)(), lambda h: h.__setitem__(5, 1)),
    "images": (
        lambda: [Image.new("L", (2, 2)) for _ in range(22)],
        lambda h: h.__setitem__(5, Image.new("L", (2, 2), 9)),
    ),
    "few images": (
        lambda: [Image.new("L", (2, 2)) for _ in range(9)],
        lambda h: h.__setitem__(5, Image.new("L", (2, 2), 9)),
    ),
    "image in place of another": (
        lambda: [Image.new("L", (2, 2)) for _ in range(22)], lambda h: put_in_place_of(h, 9)
    ),
    "key of one of many": (
        lambda: {number: torch.ones(1) for number in range(22)}, lambda h: h.update({99: h.pop(21)})
    ),
    "one more of very many": (lambda: [Same()] * 20_002, lambda h: h.append(h[0])),
    "lists in lists": (nested_deeply, lambda h: h.append(1)),
    "what holds itself": (circle, lambda h: h[0].update(y=7)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz", "ignore:The PyTorch API of nested")
def test_content_that_no_sample_shows(name) -> None:
    make, change = CONTENT[name]
    held = make()
    watch = DataWatch(SimpleNamespace(held=held))
    watch.loaded([])
    assert watch.changed(list) == ""
    change(held)
    assert watch.changed(list).startswith("held")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_large_thing_in_place_of_another(kind) -> None:
    # of both only some numbers are read, and those are alike
    values = np.zeros((2, 2**19))
    values[1, 1] = 1
    data = SimpleNamespace(held=kind(values[0]))
    watch = DataWatch(data)
    watch.loaded([])
    data.held = kind(values[1])
    assert watch.changed(list) == "held"


OBJECT = ByObject()
ONE, TWO = SimpleNamespace(by=1), SimpleNamespace(by=2)


@pytest.mark.parametrize(
    ("held", "other"),
    [
        ([ONE, TWO, ONE], [ONE, TWO, TWO]),
        (slice(0, 1), slice(0, 2)),
        (torch.sin, torch.cos),
        (functools, ctypes),
        (OBJECT.shifted, OBJECT.scaled),
        (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.zeros(2, device="meta"), torch.zeros(3, device="meta")),
    ],
    ids=["objects", "slices", "functions", "modules", "methods", "dtypes", "shapes"],
)
def test_what_another_process_can_tell_apart(held, other) -> None:
    texts, data = Contents(held, "anywhere").differing(Contents(other, "anywhere"))
    assert texts | data


def test_what_is_no_longer_there() -> None:
    data = SimpleNamespace(held=[1.0], more=torch.ones(2))
    watch = DataWatch(data)
    watch.loaded([])
    del data.more
    assert watch.changed(list) == "more"


def test_a_list_is_a_data_set() -> None:
    data = [(float(i), i) for i in range(30)]
    watch = DataWatch(data)
    watch.loaded([])
    data[9] = (1.0, 9)
    assert watch.changed(list) == "its items"


def test_of_a_file_only_some_numbers_are_read(tmp_path, monkeypatch) -> None:
    mapped = np.memmap(tmp_path / "x", mode="w+", shape=(2**12, 2**8), dtype=np.uint8)
    read = []
    monkeypatch.setattr(np, "ascontiguousarray", lambda array: read.append(array.size) or np.asarray(array))
    for part in (mapped, mapped[1:], np.asarray(mapped)):
        Contents(SimpleNamespace(x=part), "here")
    assert len(read) == 3
    assert max(read) <= 1024


@pytest.mark.parametrize("of", ["dictionaries", "objects"])
def test_records_are_compared_fast(of) -> None:
    # ten times what it takes on one core: a machine may be busy
    held = records(10_000) if of == "dictionaries" else [SimpleNamespace(**r) for r in records(10_000)]
    start = time.process_time()
    Contents(SimpleNamespace(held=held), "here")
    assert time.process_time() - start < 1.5


def test_a_data_set_is_named_once() -> None:
    data, names, made = Data(), DataNames(), []

    def make() -> str:
        data.load()
        made.append(1)
        return f"name {len(made)}"

    assert [names.name_of(data, None, make), names.name_of(data, None, make)] == ["name 1", "name 1"]
    data.labels[0] = 1
    assert names.name_of(data, None, make) == "name 2"
    assert names.name_of(Data(), None, make) == "name 3"
