"""What is not cached, and what the user is told about it; training goes on to the same weights."""

from __future__ import annotations

import errno
import functools
import random
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

import layerwise
from cache_loops import Counted, both, freeze_prefix, images, off
from helpers import TinyCNN
from layerwise.errors import CacheError, LayerwiseWarning

LAST = ("layer2", "fc")


def test_nothing_frozen() -> None:
    text = off(TinyCNN, images, "stem", "layer1", *LAST, warns=False)
    assert "in stem.0 reads 'stem.0.weight', which learns" in text


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "unused"])
def test_random_augmentation(source) -> None:
    # detected by drawing samples twice; a draw that changes nothing shifts later draws all the same
    def augment(x):
        if source == "torch":
            return x + torch.rand(()) * 0.1
        if source == "numpy":
            return x + float(np.random.rand()) * 0.1
        if source == "python":
            return x + random.random() * 0.1
        torch.rand(1)
        return x

    def data():
        np.random.seed(0)
        random.seed(0)
        base = images()
        return Counted(base.inputs, base.labels, augment)

    text = off(TinyCNN, data, *LAST)
    assert "(random augmentation, or random masks)" in text
    assert "views=V" in text


@pytest.mark.parametrize("source", ["global", "own", "of numpy", "of a transform"])
def test_one_sample_that_is_augmented(source) -> None:
    # its batch has come by then, and holds the draw that the plain loop would have made
    class Noise:
        def __init__(self) -> None:
            self.generator = random.Random(0)

        def __call__(self) -> float:
            return self.generator.random()

    class OneDraws(Counted):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return (x + self.draw() if index == 9 else x), y

    def data():
        base = images()
        made = OneDraws(base.inputs, base.labels)
        made.generator, made.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
        made.draw = {
            "global": lambda: torch.rand(()),
            "own": lambda: torch.rand((), generator=made.generator),
            "of numpy": lambda: float(made.numpy.random(dtype=np.float32)),
            "of a transform": Noise(),
        }[source]
        return made

    assert "random augmentation" in off(TinyCNN, data, "layer1", *LAST)


def test_augmentation_that_depends_on_the_epoch_alone() -> None:
    # the same within an epoch, another one in the next: a function of the dataset's `epoch`
    class Seeded(Counted):
        epoch = 0

        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + 0.1 * ((self.epoch + index) % 3), y

    def data():
        base = images()
        return Seeded(base.inputs, base.labels)

    assert "random augmentation" in off(TinyCNN, data, *LAST)


@pytest.mark.parametrize("source", ["numpy", "python"])
def test_hidden_randomness_in_a_frozen_module(source) -> None:
    # what numpy's and Python's generators decide goes past the recorder: what comes after a draw runs
    class Noisy(nn.Module):
        def forward(self, x):
            return x + (float(np.random.rand()) if source == "numpy" else random.random())

    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem.append(Noisy())

    def make():
        np.random.seed(0)
        random.seed(0)
        return Net()

    text = both(make, images, *LAST).text
    assert re.search("cut at stem.2 .*'add' in stem.3 runs after the model drew random numbers", text), text


def test_samples_that_read_each_other() -> None:
    # a frozen module that subtracts the mean of the batch is not seen by the recorder, but by the check
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.stem.append(Centred())

    cached = both(Net, images, *LAST)  # what is before it is cached all the same
    assert "cut at stem.2 (the operation 'sub' in stem.3 gives a value that mixes the samples" in cached.text


class CentredConv(nn.Conv2d):
    """Subtracts from what it gives for a sample the mean over the batch."""

    def forward(self, x):
        x = super().forward(x)
        return x - x.mean(0, keepdim=True)


def test_a_chain_of_modules_that_read_other_samples_is_given_up() -> None:
    # each that is found takes a recording and some passes
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(CentredConv(3, 3, 1) for _ in range(6)))
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.body(x).mean((2, 3)))

    assert "value at body.2 of one sample depends on the other samples" in off(Net, images, "fc")


def test_of_many_branches_that_read_other_samples_what_is_before_them_is_cached() -> None:
    # the fusion layers of GroundingDINO subtract a largest number of the batch, for each of several values
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Conv2d(3, 3, 3), nn.Linear(3, 4)
            self.branches = nn.ModuleList(CentredConv(3, 3, 1) for _ in range(6))

        def forward(self, x):
            x = self.body(x)
            return self.fc(torch.stack([branch(x).relu() for branch in self.branches]).sum((0, 3, 4)))

    assert "cut at body " in both(Net, images, "fc").text


def test_one_sample_of_a_batch_that_depends_on_those_collated_with_it() -> None:
    # its rank among their labels: that of the smallest label is the same in any company, its own included
    def ranked(samples):
        x, y = default_collate(samples)
        ranks = [len({int(other) for other in y if other < one}) for one in y]
        return x + torch.tensor(ranks)[:, None, None, None], y

    def data():
        base = images()
        base.labels = torch.tensor([1, 2, 3, 0] * 5 + [1, 0])
        return base

    text = off(TinyCNN, data, *LAST, loader_options={"shuffle": False, "collate_fn": ranked})
    assert "depends on the other samples that are collated with it" in text


def test_where_all_that_is_frozen_mixes_samples_the_value_that_showed_it_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer2, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.layer2(x - x.mean(0)).mean((2, 3)))

    assert "value at layer2 of one sample depends on the other samples" in off(Net, images, "fc")


def test_a_value_that_leaves_by_a_side_door() -> None:
    # a frozen module stores a feature map in an attribute that the head reads: the module must run
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.saved = {}

        def forward(self, x):
            self.saved["x"] = x.mean((2, 3))
            return self.conv(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Saving()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.body(self.stem(x)).mean((2, 3))
            return self.fc(x) * self.stem.saved["x"].sum(1, keepdim=True)

    assert "cut at input of fc " in both(Net, images, "fc").text


def test_branches_detached_from_the_gradient_do_not_go_stale() -> None:
    # a trained branch whose output is detached requires no grad, and changes all the same
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.gate = nn.Linear(4, 4)
            self.mix = nn.Linear(4, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.stem(x).mean((2, 3))
            gate = self.gate(x)
            return self.fc(self.mix(x + gate.detach())) + gate

    cached = both(Net, images, "gate", "fc")
    assert "cut at" in cached.text
    assert "mix" not in cached.text.split("(")[0]


def test_skips_to_the_trained_part() -> None:
    # a U-Net: the trained decoder reads two frozen levels
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1 = nn.Conv2d(3, 4, 3, padding=1)
            self.down2 = nn.Conv2d(4, 8, 3, padding=1, stride=2)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            a = self.down1(x).relu()
            b = self.down2(a).relu()
            return self.fc(torch.cat([self.up(b), a], 1).mean((2, 3)))

    assert "cut at down1, down2" in both(Net, images, "up", "fc").text


def test_tuples_and_dictionaries_between_modules() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"maps": (y, y.mean((2, 3))), "size": x.shape[-1]}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Pair()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            found = self.stem(x)
            return self.fc(found["maps"][1]) / found["size"]

    cached = both(Net, images, "fc")
    assert "cut at stem[1]" in cached.text


def test_a_number_that_depends_on_the_batch_size() -> None:
    # stored once it would be wrong for the last, smaller batch
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3)), len(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Counting()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x, count = self.stem(x)
            return self.fc(x) / count

    assert "a number that depends on the batch size" in off(Net, images, "fc")


def test_shared_modules_and_calls() -> None:
    # one frozen module called three times, the last time on what was learned
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.block = nn.Conv2d(4, 4, 3, padding=1)
            self.mid = nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.block(self.block(self.stem(x)).relu())
            return self.fc(self.block(self.mid(x)).mean((2, 3)))

    assert "cut at block#1" in both(Net, images, "mid", "fc").text


def test_calls_within_a_skipped_module_are_counted() -> None:
    # in a replay the second call of `conv` does not happen, and the third is still the third
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.block = nn.Sequential(nn.ReLU(), self.conv, nn.ReLU())
            self.fc = nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(self.conv(self.block(self.conv(x)).tanh()).flatten(1))

    assert "cut at conv#2" in both(Net, images, "fc").text


def test_an_object_that_cannot_be_built_anew() -> None:
    # a frozen module returns a packed sequence, which takes real tensors only: what is in it is skipped
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 5)

        def forward(self, x):
            lengths = torch.full((len(x),), 3)
            return nn.utils.rnn.pack_padded_sequence(self.embed(x.mean(1)), lengths, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn, self.fc = Packing(), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x):
            _, last = self.rnn(self.stem(x))
            return self.fc(last[0])

    assert "cut at stem.embed" in both(Net, images, "rnn", "fc").text


def test_loaders_that_cannot_be_read_by_index() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            base = images()
            return iter([base[i] for i in range(22)])

    assert "IterableDataset" in off(TinyCNN, Stream, *LAST, loader_options={"shuffle": False})

    class Words:
        batch_size = 4

        def __iter__(self):
            return iter([["a", "b"], ["c"]])

    class Dictionary(Counted):
        def __getitem__(self, key):
            return super().__getitem__({"a": 0, "b": 1, "c": 2}.get(key, key))

    of_another = layerwise.PrefixCache(TinyCNN(), DataLoader(images(), 4)).as_loader()
    with pytest.warns(LayerwiseWarning, match="already those of a cache. Put two models"):
        next(layerwise.PrefixCache(TinyCNN(), of_another, storage="memory").batches())

    base = images()
    loader = DataLoader(Dictionary(base.inputs, base.labels), batch_sampler=Words())
    cache = layerwise.PrefixCache(TinyCNN(), loader, storage="memory")
    with pytest.warns(LayerwiseWarning, match="samples cannot be recognised"):
        assert len(list(cache.batches())) == 2


def test_a_loop_that_does_not_use_this_model() -> None:
    model, other = TinyCNN(), TinyCNN()
    model.stem.requires_grad_(False).eval()
    loader = DataLoader(images(), batch_size=4)
    cache = layerwise.PrefixCache(model, loader)
    for _ in range(3):  # the loop might ask for batches ahead, or give those of an epoch to another model
        for x, _ in cache.batches():
            other(x)
    assert "does not pass the loader's batches" in cache.describe()


@pytest.mark.parametrize("learning", [("stem", "fc"), LAST], ids=["nothing to skip", "cached"])
def test_batches_are_let_go_once_used(learning) -> None:
    model = TinyCNN()
    freeze_prefix(model, *learning)
    cache = layerwise.PrefixCache(model, DataLoader(images(), batch_size=2))
    handed_out: list[weakref.ref[torch.Tensor]] = []
    for x, y in cache.batches():
        nn.functional.cross_entropy(model(x), y).backward()
        handed_out.append(weakref.ref(x))
        assert sum(one() is not None for one in handed_out) <= 2


def test_inputs_computed_in_the_loop() -> None:
    # a step between loader and model may be random: it is not cached, and nothing goes wrong
    text = off(
        TinyCNN, images, *LAST, step=lambda m, b: nn.functional.cross_entropy(m(b[0].flip(-1)), b[1]),
    )  # fmt: skip
    assert "does not pass the loader's batches" in text


def test_a_cast_in_the_loop_is_fine() -> None:
    both(
        lambda: TinyCNN().double(), images, *LAST,
        step=lambda m, b: nn.functional.cross_entropy(m(b[0].double()), b[1]),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_is_refused() -> None:
    cache = layerwise.PrefixCache(torch.jit.script(TinyCNN()), DataLoader(images(), 4), storage="memory")
    with pytest.warns(LayerwiseWarning, match="off: the model is a ScriptModule"):
        assert len(list(cache.batches())) == 6


def test_a_compiled_model_is_refused() -> None:
    compiled = torch.compile(TinyCNN(), backend="eager")
    cache = layerwise.PrefixCache(compiled, DataLoader(images(), 4), storage="memory")
    with pytest.warns(LayerwiseWarning, match="compiled"):
        next(cache.batches())


@pytest.mark.parametrize("storage", ["disk", "auto"])
def test_full_disk_falls_back_with_a_warning(monkeypatch, storage) -> None:
    def full(descriptor, size, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("layerwise.cache.store.column.reserve_file", full)
    monkeypatch.setattr("layerwise.cache.stock.free_memory_bytes", lambda: 0)
    monkeypatch.setattr("layerwise.cache.store.decision._LEAST_GAIN", 0.0)
    text = off(TinyCNN, images, *LAST, storage=storage)
    told = (
        r"off: nothing can be stored in '.*': No space left on device \([\d,]+ MiB free there\)\. Make room"
    )
    assert re.search(told, text)


@pytest.mark.parametrize("storage", ["disk", "auto"])
def test_a_folder_that_is_none_is_told_with_what_to_do(tmp_path, storage, monkeypatch) -> None:
    monkeypatch.setattr("layerwise.cache.store.decision._LEAST_GAIN", 0.0)
    (tmp_path / "notes").write_text("mine")
    text = off(TinyCNN, images, *LAST, storage=storage, folder=tmp_path / "notes")
    assert f"nothing can be stored in {str(tmp_path / 'notes')!r}: File exists. Make room there, or" in text


def test_budget() -> None:
    assert "do not fit into the budget of 1.0 KB" in off(TinyCNN, images, *LAST, budget_bytes=1024)


def test_options_are_checked_together() -> None:
    with pytest.raises(CacheError) as caught:
        layerwise.PrefixCache(
            TinyCNN(), None, storage="ram", budget_bytes=-1, views=0, dtype=torch.int8,
            folder=3, tuner="ulmfit", epochs=0.5, pool={},
        )  # fmt: skip
    for part in (
        "got 'ram'", "got -1", "got 0", "torch.int8", "got 3", "Tuner, got a str", "got 0.5", "got a dict",
    ):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_a_setting_that_changes_at_each_batch_is_given_up_and_what_was_before_is_told_as_past() -> None:
    class Tempered(TinyCNN):
        temperature = 1.0

        def forward(self, x):
            return super().forward(x) / self.temperature

    def cooler(model, batch):
        model.temperature *= 0.9
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    text = both(Tempered, images, *LAST, step=cooler, epochs=4).text
    first, *others = text.splitlines()
    told = "off: the attributes of the model's modules change from batch to batch (temperature of Tempered). "
    assert told in first
    assert others
    assert all("until then: memory, cut at layer1" in line for line in others)
    assert len(set(others)) == len(others)


class InParts(TinyCNN):
    """Has its input normalised, and is called in parts."""

    def in_parts(self, images):
        return self.fc(self.layer2(self.layer1(self.stem(images - 0.5))).mean((2, 3)))


class Around(InParts):
    """Does so by itself."""

    def forward(self, images):
        return self.in_parts(images)


class Followed(TinyCNN):
    """Beside a copy that follows its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.target = TinyCNN()

    def forward(self, images):
        with torch.no_grad():
            target = self.target(images)
        return super().forward(images) + target


class Scaled(TinyCNN):
    def forward(self, images, scale):
        return super().forward(images) * scale


def _in_parts(model, batch):
    return nn.functional.cross_entropy(model.in_parts(batch[0]), batch[1])


def _followed(model, batch, learns=False):
    model.target.layer2.requires_grad_(learns)
    with torch.no_grad():
        for name, weight in model.layer2.named_parameters():
            model.target.layer2.get_parameter(name).lerp_(weight, 0.1)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _scaled(model, batch, number=float):
    return nn.functional.cross_entropy(model(batch[0], number(batch[1].sum()) + 1), batch[1])


_followed_by_what_learns = functools.partial(_followed, learns=True)
_scaled_by_tensor = functools.partial(_scaled, number=torch.Tensor.float)


@pytest.mark.parametrize(
    ("make", "step", "reason", "better", "better_step"),
    [
        (InParts, _in_parts, "into the forward of a module around the model", Around, None),
        (Followed, _followed, "if it requires gradients", Followed, _followed_by_what_learns),
        (Scaled, _scaled, "pass a number that changes as a tensor", Scaled, _scaled_by_tensor),
    ],
    ids=["called in parts", "moved by the loop", "given a number"],
)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_what_a_reason_says_to_do_helps(make, step, reason, better, better_step) -> None:
    first = both(make, images, *LAST, step=step)
    assert reason in first.text
    assert not first.cache._supplies[0].replays
    then = both(better, images, *LAST, step=better_step)
    assert "memory, cut at " in then.text
    assert then.cache._supplies[0].replays == 6
