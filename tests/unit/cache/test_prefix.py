"""Cached training ends in the weights of plain training, or the cache says why it is off."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import random
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from cache_loops import Counted, assert_same, both, freeze_prefix, images, off, train
from helpers import TinyCNN
from layerwise.cache.replay.ghost import Ghost
from layerwise.cache.store.column import Column
from layerwise.errors import CacheError

LAST = ("layer2", "fc")


# -- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["memory", "disk", "auto"])
@pytest.mark.parametrize("learning", [LAST, ("fc",)])
def test_bit_equal_with_dropout_and_batchnorm_in_the_trained_part(storage, learning) -> None:
    # same weights, buffers, losses and random state; validation cached too; nothing loaded after epoch 1
    cached = both(TinyCNN, images, *learning, storage=storage, validate=True, epochs=4)
    assert "off" not in cached.text or storage == "auto"
    if storage != "auto":
        assert cached.loads[1:] == [0, 0, 0]


def test_dropout_of_the_trained_part_is_random_and_equal() -> None:
    # the dropout stands in the part that learns: replay draws the same masks as the plain loop
    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.layer2 = nn.Sequential(self.layer2, nn.Dropout(0.5))

    cached = both(Net, images, *LAST)
    assert "cut at layer1" in cached.text


def test_workers_leave_the_same_random_state() -> None:
    cached = both(TinyCNN, images, *LAST, loader_options={"num_workers": 1, "persistent_workers": True})
    assert "cut at layer1" in cached.text


def test_samplers_of_torch() -> None:
    # a weighted sampler repeats some samples and leaves others out; drop_last leaves others each epoch
    weights = torch.rand(22, generator=torch.Generator().manual_seed(0))
    sampler = lambda: torch.utils.data.WeightedRandomSampler(weights, 22)  # noqa: E731
    both(TinyCNN, images, *LAST, loader_options={"shuffle": False, "sampler": sampler()})
    both(TinyCNN, images, *LAST, loader_options={"drop_last": True}, epochs=5)


def test_gradient_accumulation_and_two_forwards_of_one_batch() -> None:
    # a loop may call the model several times for one batch
    def step(model, batch):
        x, y = batch
        first, second = model(x), model(x)
        return nn.functional.cross_entropy(first, y) + (first - second).pow(2).mean()

    class Net(TinyCNN):
        def __init__(self) -> None:
            super().__init__()
            self.layer2 = nn.Sequential(self.layer2, nn.Dropout(0.5))

    both(Net, images, *LAST, step=step)


NUMPY = PYTHON = TORCH = None  # generators, as a model's file may hold them beside its classes


class DrawsFromGlobals(TinyCNN):
    """Draws random numbers from generators that are no attribute of anything."""

    def __init__(self) -> None:
        super().__init__()
        globals()["NUMPY"] = np.random.default_rng(0)
        globals()["PYTHON"] = random.Random(0)
        globals()["TORCH"] = torch.Generator().manual_seed(0)

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        return NUMPY.random() + PYTHON.random() + torch.rand(like.shape, generator=TORCH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer1(self.stem(images))
        return self.fc(self.layer2(features + self.noise(features)).mean((2, 3)))


class DrawsFromGlobalsFirst(DrawsFromGlobals):
    def noise(self, like: torch.Tensor) -> float:
        return NUMPY.random()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(images + self.noise(images)))).mean((2, 3)))


def test_generators_among_the_globals_of_a_models_file() -> None:
    # passes of the cache's own draw from them as well, and leave them as they were
    assert "cut at layer1" in both(DrawsFromGlobals, images, *LAST).text
    assert "draws random numbers of Python's or numpy's" in off(DrawsFromGlobalsFirst, images, *LAST)


def test_channels_last_survives() -> None:
    # the physical layout of the stored value is that of the computed one
    seen = []

    class Net(TinyCNN):
        def forward(self, x):
            x = self.layer1(self.stem(x.to(memory_format=torch.channels_last)))
            seen.append(x.stride())
            return self.fc(self.flatten(self.pool(self.layer2(x))))

    make = lambda: Net().to(memory_format=torch.channels_last)  # noqa: E731
    cached = both(make, images, *LAST, batch=11)
    assert "cut at" in cached.text
    assert len(set(seen)) == 1


def test_in_place_changes_of_the_trained_part_do_not_reach_the_cache() -> None:
    class Net(TinyCNN):
        def forward(self, x):
            x = self.layer1(self.stem(x))
            x.mul_(0.5)
            return self.fc(self.flatten(self.pool(self.layer2(x))))

    assert "cut at layer1" in both(Net, images, *LAST, epochs=4).text


def test_autocast_is_part_of_the_cut() -> None:
    def step(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    cached = both(TinyCNN, images, *LAST, step=step)
    assert "cut at layer1" in cached.text
    ((feed,),) = (s.feeds for s in cached.cache._supplies)
    assert {s.column.spec.dtype for s in feed.sites.values()} == {torch.bfloat16}


class EntersAutocast(TinyCNN):
    def forward(self, images):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = self.layer1(self.stem(images))
            return super().forward(images) + self.fc(self.layer2(features).mean((2, 3)))


@pytest.mark.parametrize("whose", ["loop", "model"])
def test_operations_that_call_others_under_autocast(whose) -> None:
    # torch's fused attention casts within: not so where a mode of the cache's own sees it
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            entered = torch.autocast("cpu", dtype=torch.bfloat16) if whose == "model" else nullcontext()
            with entered:
                return self.head(self.body(x.flatten(1, 2)).mean(1))

    def step(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=whose == "loop"):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    assert (
        "memory, cut at" in both(Attends, images, "head", step=step, loader_options={"drop_last": True}).text
    )


def test_a_forward_that_enters_autocast_and_uses_a_weight_twice() -> None:
    # autocast remembers the weight in the loop, and not in passes of the cache's own: that is no difference
    assert "cut at layer1" in both(EntersAutocast, images, "layer2", "fc").text


def test_autocast_switched_off_in_the_middle_of_a_loop() -> None:
    # values computed under autocast must not be used in a call without it: the real samples are loaded
    counter = iter(range(10_000))

    def step(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(counter) != 9):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    plain = train(TinyCNN, images(), *LAST, cached=False, step=step)
    counter = iter(range(10_000))
    cached = train(TinyCNN, images(), *LAST, cached=True, step=step)
    assert_same(plain, cached)
    assert cached.loads[1] > 0


def test_dictionaries_of_several_inputs() -> None:
    # batches as Hugging Face makes them: integer inputs stay real, others become ghosts
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask, extra, labels=None):
            hidden = self.body(self.embed(input_ids)) + extra[:, None]
            pooled = (hidden * attention_mask[..., None]).sum(1)
            logits = self.head(pooled)
            return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}

    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "input_ids": torch.randint(0, 20, (6,), generator=generator),
            "attention_mask": torch.tensor([1, 1, 1, 1, 0, 0]),
            "extra": torch.randn(8, generator=generator),
            "labels": torch.tensor(i % 3),
        }
        for i in range(22)
    ]
    cached = both(Net, lambda: samples, "head", step=lambda m, batch: m(**batch)["loss"])
    assert "cut at input of head" in cached.text or "cut at body" in cached.text


def test_names_of_samples_are_loaded_again() -> None:
    # what is not a tensor cannot be stored by row: samples are read again, the prefix is still skipped
    class Named(Counted):
        def __getitem__(self, index):
            self.loads += 1
            return {"x": self.inputs[index], "y": self.labels[index], "name": f"image {index}"}

    def make_data():
        base = images()
        return Named(base.inputs, base.labels)

    names = []

    def step(model, batch):
        names.extend(batch["name"])
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    cached = both(TinyCNN, make_data, *LAST, step=step)
    assert "cut at layer1" in cached.text
    assert len(set(names)) == 22
    assert cached.loads[2] == 22


def test_inputs_that_a_loop_uses_itself() -> None:
    # a ghost is loaded where the loop reads its value; keep_inputs has the loader's workers do it
    def step(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y) + (model(x).sum() - x.sum()).pow(2) * 1e-4

    assert "cut at layer1" in both(TinyCNN, images, *LAST, step=step).text
    assert "cut at layer1" in both(TinyCNN, images, *LAST, step=step, keep_inputs=True).text


# -- what changes while it runs -------------------------------------------------------------------


def test_a_batch_is_freed_as_soon_as_the_loop_drops_it() -> None:
    # not by the garbage collector, which may come late: values would pile up
    model = TinyCNN()
    model.layer1.requires_grad_(False)
    model.stem.requires_grad_(False)
    cache = layerwise.PrefixCache(model.eval(), DataLoader(images(count=8), batch_size=2), storage="memory")
    cache.fill()
    gc.collect()
    gc.disable()
    try:
        seen = []
        for x, _ in cache.batches():
            model(x)
            seen.append(weakref.ref(x))
        assert isinstance(x, Ghost)
        assert [ref() for ref in seen] == [None, None, None, x]
        x, _ = next(iter(cache.batches()))  # and goes no further
        left = weakref.ref(x)
        del x
        assert left() is None
    finally:
        gc.enable()


def test_the_look_at_the_first_batch_keeps_nothing_alive() -> None:
    # an operation that saves its own output (a ReLU) is easily held for ever by what it saved
    def with_history() -> int:
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        return sum(tensor.grad_fn is not None for tensor in tensors)

    model = TinyCNN()
    model.stem.requires_grad_(False)
    cache = layerwise.PrefixCache(model.eval(), DataLoader(images(), batch_size=4), storage="memory")
    before = with_history()
    x, _ = next(batches := cache.batches())
    model(x)
    assert "cut at" in cache.describe()
    assert with_history() == before
    next(batches)


INTERRUPTIONS: list[type[BaseException]] = []


class Interrupted(TinyCNN):
    """Somebody presses Ctrl-C after the frozen part."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer1(self.stem(images))
        if INTERRUPTIONS:
            raise INTERRUPTIONS.pop()
        return self.fc(self.layer2(features).mean((2, 3)))


def test_a_replay_that_is_interrupted_leaves_nothing_behind() -> None:
    model = Interrupted()
    model.stem.requires_grad_(False)
    model.layer1.requires_grad_(False)
    cache = layerwise.PrefixCache(model.eval(), DataLoader(images(), batch_size=4), storage="memory")
    cache.fill()
    expected = model(inputs := torch.ones(2, 3, 8, 8))

    batches = iter(cache.batches())
    x, _ = next(batches)
    assert isinstance(x, Ghost)
    INTERRUPTIONS.append(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert not any("_call_impl" in vars(module) for module in list(model.modules())[1:])
    assert torch.equal(x, images().inputs[:4])
    assert torch.equal(copy.deepcopy(model)(inputs), expected)  # the epoch is still under way
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(inputs), expected)
    assert torch.equal(model(next(batches)[0]), model(images().inputs[4:8]))
    del batches
    assert "_call_impl" not in vars(model)


def test_a_first_forward_that_is_interrupted_decides_nothing() -> None:
    # the loop's own one, which comes after those of the cache: there is no output to compare a replay with
    calls: list[int] = []

    class Counting(TinyCNN):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            output = super().forward(images)
            if len(calls) == interrupted:
                raise KeyboardInterrupt
            return output

    def looked_at(times: int) -> str:
        torch.manual_seed(0)  # how many passes the cache makes depends on the numbers
        model = Counting()
        model.stem.requires_grad_(False)
        cache = layerwise.PrefixCache(model.eval(), DataLoader(images(), batch_size=4), storage="memory")
        batches = iter(cache.batches())
        for _ in range(times):
            with contextlib.suppress(KeyboardInterrupt):
                model(next(batches)[0])
        return cache.describe()

    interrupted = 0
    assert "cut at" in looked_at(1)
    interrupted = len(calls)
    calls.clear()
    assert looked_at(1) == "prefix cache: waiting for the first batch"
    calls.clear()
    assert "cut at" in looked_at(2)


def test_trainable_set_changes() -> None:
    # gradual unfreezing by hand: the cache finds the new cut by itself
    def unfreeze(model, epoch):
        if epoch == 2:
            for parameter in model.layer2.parameters():
                parameter.requires_grad_(True)

    cached = both(TinyCNN, images, "fc", before_epoch=unfreeze, epochs=4)
    assert "cut at pool" in cached.text
    assert "cut at layer1" in cached.text


@pytest.mark.parametrize("way", ["in place", "data", "buffer", "load_state_dict", "order in memory"])
def test_changed_prefix_weights_are_noticed(way) -> None:
    # stale values are refused and computed again, however the weights were changed
    def change(model, epoch):
        if epoch != 2:
            return
        weight = model.stem[0].weight
        if way == "in place":
            with torch.no_grad():
                weight.mul_(2)
        elif way == "data":
            weight.data.mul_(2)
        elif way == "buffer":
            model.stem[1].running_mean.add_(1)
        elif way == "order in memory":  # another kernel has other last bits
            model.to(memory_format=torch.channels_last)
        else:
            state = {k: v.clone() for k, v in model.state_dict().items()}
            state["stem.0.weight"] *= 2
            model.load_state_dict(state)

    cached = both(TinyCNN, images, *LAST, before_epoch=change, epochs=4)
    assert cached.loads[2] >= 22
    assert cached.loads[3] == 0


def test_modes_that_change_between_the_batch_and_the_call() -> None:
    # some trainers call train() inside the loop; then the cut of the modes at the call counts
    def step(model, batch):
        model.train(step.calls % 3 != 1)
        step.calls += 1
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    step.calls = 0
    plain = train(TinyCNN, images(), *LAST, cached=False, step=step)
    step.calls = 0
    cached = train(TinyCNN, images(), *LAST, cached=True, step=step)
    assert_same(plain, cached)


def test_a_frozen_dropout_in_train_mode_moves_the_cut() -> None:
    # random operations are never skipped: later draws would shift
    def awake(model, epoch):
        model.layer1[3].__dict__.pop("train", None)
        model.layer1[3].training = True

    cached = both(TinyCNN, images, *LAST, before_epoch=awake)
    assert "cut at layer1.2" in cached.text
    assert "draws random numbers" in cached.text


def test_a_frozen_batchnorm_in_train_mode_moves_the_cut() -> None:
    def awake(model, epoch):
        model.layer1[1].__dict__.pop("train", None)
        model.layer1[1].training = True

    cached = both(TinyCNN, images, *LAST, before_epoch=awake)
    assert "cut at layer1.0" in cached.text
    assert "changes a buffer 'layer1.1.num_batches_tracked'" in cached.text


def test_nested_validation_and_other_calls_of_the_model() -> None:
    # validation in the middle of an epoch, and calls with tensors of the user's own, get true results
    data = images()

    def step(model, batch):
        x, y = batch
        with torch.no_grad():
            penalty = model(data.inputs[:3]).sum() * 0.1
        return nn.functional.cross_entropy(model(x), y) + penalty

    both(TinyCNN, images, *LAST, step=step)


def test_copies_and_pickles_of_the_model_made_inside_the_loop_are_plain() -> None:
    # an EMA copy or a saved model must not hold on to the cache
    model = TinyCNN()
    model.stem.requires_grad_(False).eval()
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 4), batch_size=4)
    cache = layerwise.PrefixCache(model, loader, storage="memory")
    probe = torch.randn(2, 3, 8, 8)
    for _ in range(2):
        for x, _y in cache.batches():
            model(x).sum().backward()
            twin = copy.deepcopy(model)
            buffer = io.BytesIO()
            torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    model.eval()
    assert torch.equal(twin.eval()(probe), model(probe))
    assert torch.equal(loaded.eval()(probe), model(probe))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert all("_call_impl" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_what_holds_a_cache_can_be_copied(again) -> None:
    # a LightningModule with its cache, which a callback copies to average its weights
    def run(cached: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = TinyCNN()
        freeze_prefix(model, *LAST)
        loader = DataLoader(images(), 4, shuffle=True)
        batches: Any = layerwise.PrefixCache(model, loader, storage="memory") if cached else loader
        holder, seen = {"batches": batches, "model": model}, []
        for held in (holder, again(holder), holder):
            batches = held["batches"]
            for x, _ in batches.as_loader() if cached else batches:
                seen.append(held["model"](x).detach())
            if cached:
                told = "a copy of a cache" if held is not holder else "cut at layer1"
                assert told in batches.describe()
        return seen

    assert all(torch.equal(*pair) for pair in zip(run(False), run(True), strict=True))


def test_a_loop_that_stops_or_raises_leaves_the_model_as_it_was() -> None:
    model = TinyCNN()
    model.stem.requires_grad_(False).eval()
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 8, 8), torch.arange(12) % 4), batch_size=4)
    cache = layerwise.PrefixCache(model, loader, storage="memory")
    for x, _ in cache.batches():
        model(x)
    for x, _ in cache.batches():
        model(x)
        break

    def interrupted() -> None:
        for x, _ in cache.batches():
            model(x)
            raise ZeroDivisionError

    def broken() -> None:
        for x, _ in cache.batches():
            model.fc = nn.Linear(99, 2)
            model(x)

    with pytest.raises(ZeroDivisionError):
        interrupted()
    with pytest.raises(RuntimeError, match="shape"):  # an error inside the replayed forward
        broken()
    assert not model._forward_hooks
    assert all("_call_impl" not in vars(m) for m in model.modules())


# -- not exact, and told so -----------------------------------------------------------------------


def test_views_of_a_random_augmentation() -> None:
    # two draws of each sample are stored and taken in turn
    base = images()
    data = Counted(base.inputs, base.labels, lambda x: x + torch.rand(()) * 0.1)
    cached = train(TinyCNN, data, *LAST, cached=True, views=2, epochs=4)
    assert "cut at layer1" in cached.text
    assert cached.loads[2:] == [0, 0]
    assert cached.loads[1] >= 22
    ((feed,),) = (s.feeds for s in cached.cache._supplies)
    (stored,) = feed.sites.values()
    rows = stored.column.get(torch.arange(44))
    assert bool(stored.column.filled.all())
    assert not torch.equal(rows[:22], rows[22:])


def test_half_precision_storage() -> None:
    plain = train(TinyCNN, images(), *LAST, cached=False)
    cached = train(TinyCNN, images(), *LAST, cached=True, dtype=torch.bfloat16, exact=False)
    assert "not exact" in cached.text
    assert plain.losses != cached.losses
    assert np.allclose(plain.losses, cached.losses, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_has_16_bits_is_stored_as_it_is(dtype) -> None:
    # another type of 16 bits would save nothing, and round it or be too narrow for it
    def make():
        model = TinyCNN()
        nn.init.constant_(model.layer1[1].weight, 1e6)
        return model

    def step(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])

    cached = both(make, images, *LAST, step=step, exact=False, dtype=dtype)
    assert "cut at layer1" in cached.text
    assert "not exact" not in cached.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_storing_rounds_off_is_no_other_value(dtype) -> None:
    # in eval mode the same values are computed anew, and compared with those that were stored
    cached = train(
        TinyCNN, images(), *LAST, cached=True, epochs=4, dtype=dtype, exact=False,
        before_epoch=lambda model, epoch: model.train(epoch % 2 == 0),
    )  # fmt: skip
    assert "off" not in cached.text
    assert cached.loads[2:] == [0, 0]


# -- sharing --------------------------------------------------------------------------------------


def test_a_later_run_finds_the_files(tmp_path, monkeypatch) -> None:
    first = train(TinyCNN, images(), *LAST, cached=True, storage="disk", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the value and the labels
    written = []
    monkeypatch.setattr(Column, "put", lambda column, rows, values: written.append(rows))
    again = train(TinyCNN, images(), *LAST, cached=True, storage="disk", folder=tmp_path)
    assert_same(first, again)
    assert again.loads[0] < 22 + 22 * 2  # the fingerprint and one batch, and no epoch of loading
    ((feed,),) = (s.feeds for s in again.cache._supplies)
    assert all(bool(stored.column.filled.all()) for stored in feed.sites.values())
    assert not written  # it would take memory of this process's own


def test_other_weights_data_or_transform_do_not_find_them(tmp_path) -> None:
    def keys():
        return {p.name for p in tmp_path.iterdir()}

    def run(make=TinyCNN, data=None):
        train(make, data or images(), *LAST, cached=True, storage="disk", folder=tmp_path, epochs=2)

    run()
    first = keys()
    run()
    assert keys() == first

    def other_weights():
        model = TinyCNN()
        with torch.no_grad():
            model.stem[0].weight[0, 0, 0, 0] += 1e-6
        return model

    run(other_weights)
    second = keys() - first
    assert len(second) == 1  # the labels are the same
    base = images()
    run(data=Counted(base.inputs, base.labels, lambda x: x * 1.0001))
    assert len(keys() - first - second) == 2


def test_a_pool_serves_the_trials_of_a_search() -> None:
    # a second model with the same frozen weights takes the values that the first one stored
    pool = layerwise.CachePool()
    first = train(TinyCNN, images(), *LAST, cached=True, pool=pool)
    again = train(TinyCNN, images(), *LAST, cached=True, pool=pool)
    assert_same(first, again)
    ((feed,),) = (s.feeds for s in again.cache._supplies)
    assert {id(s.column) for s in feed.sites.values()} <= {id(c) for c in pool.columns.values()}


def test_fill_prepares_everything() -> None:
    # one pass over the data; the first epoch then loads nothing but the batch that is checked
    model = TinyCNN()
    model.stem.requires_grad_(False).eval()
    data = images()
    cache = layerwise.PrefixCache(model, DataLoader(data, batch_size=4, shuffle=True), storage="memory")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    cache.fill()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    loads = data.loads
    for x, y in cache.batches():
        assert isinstance(x, Ghost)
        nn.functional.cross_entropy(model(x), y).backward()
    assert data.loads == loads
    assert model.fc.weight.grad is not None


def test_a_cache_that_is_switched_off_is_the_loader() -> None:
    # nothing is loaded to look at it, and the model is not run
    calls = []
    model, data = TinyCNN(), images()
    model.register_forward_hook(lambda *_: calls.append(1))
    cache = layerwise.PrefixCache(model, DataLoader(data, 4), storage="off")
    for x, _ in cache.batches():
        model(x)
    assert (data.loads, len(calls)) == (22, 6)
    assert cache.describe() == "prefix cache: off: switched off"


def test_the_decision_is_known_after_the_first_batch() -> None:
    model = TinyCNN()
    freeze_prefix(model, *LAST)
    cache = layerwise.PrefixCache(model, DataLoader(images(), 4), storage="memory")
    assert cache.decision is None
    batches = iter(cache.batches())
    x, _ = next(batches)
    assert cache.decision is None
    model(x)
    assert cache.decision is not None
    assert cache.decision.storage == "memory"


@pytest.mark.parametrize("use", ["batches", "as_loader", "fill"])
def test_a_cache_without_a_loader_needs_one(use) -> None:
    with pytest.raises(CacheError, match="there is no loader to read"):
        getattr(layerwise.PrefixCache(TinyCNN()), use)()


def test_close_gives_everything_back(tmp_path) -> None:
    model = TinyCNN()
    model.stem.requires_grad_(False).eval()
    with layerwise.PrefixCache(model, DataLoader(images(), 4), storage="disk") as cache:
        for x, _ in cache.batches():
            model(x)
        folder = cache.stock.shelf.root
        assert folder.is_dir()
    assert not folder.exists()
    for x, _ in cache.batches():
        assert not isinstance(x, Ghost)


def test_batches_of_a_hugging_face_collator_keep_their_type() -> None:
    # a loop calls methods of the batch: batch.to(device)
    from transformers import BatchEncoding

    generator = torch.Generator().manual_seed(0)
    samples = [{"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 2)} for i in range(12)]

    def collate(items):
        return BatchEncoding({name: torch.stack([item[name] for item in items]) for name in items[0]})

    def step(model, batch):
        batch = batch.to("cpu")
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.body(x))

    cached = both(Net, lambda: samples, "head", step=step, loader_options={"collate_fn": collate})
    assert "cut at body" in cached.text


def test_nothing_is_left_on_the_model_where_nothing_can_be_cached() -> None:
    # then batches() is the loader: no hook, no ghost, no cost
    model = TinyCNN()
    loader = DataLoader(images(), batch_size=4)
    cache = layerwise.PrefixCache(model, loader)
    for x, _ in cache.batches():
        model(x)
    for x, _ in cache.batches():
        assert not isinstance(x, Ghost)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        model(x)


def test_nothing_is_left_after_a_loop_that_asks_ahead_either() -> None:
    model = TinyCNN()
    ahead = []
    for x, _ in layerwise.PrefixCache(model, DataLoader(images(), batch_size=4)).batches():
        ahead.append(x)
        if len(ahead) > 1:
            model(ahead.pop(0))
    assert not model._forward_pre_hooks
    model(ahead.pop())


def test_of_several_batches_that_the_loop_has_got_the_one_that_comes_is_looked_at() -> None:
    model = TinyCNN()
    freeze_prefix(model, "fc")
    cache = layerwise.PrefixCache(model, DataLoader(images(), batch_size=4), storage="memory")
    batches = iter(cache.batches())
    (x, _), _ = next(batches), next(batches)
    model(x)
    assert "cut at" in cache.describe()


@pytest.mark.parametrize("is_early", [True, False])
def test_a_hook_of_the_users_before_each_call(is_early) -> None:
    # one that comes while the loop runs is seen at the next call, and ours comes after it from then on
    model, calls = TinyCNN(), []
    freeze_prefix(model, "fc")

    def before(module: nn.Module, args: Any) -> None:
        calls.append(module)

    if is_early:
        model.register_forward_pre_hook(before)
    cache = layerwise.PrefixCache(model, DataLoader(images(), batch_size=4), storage="memory")
    for epoch in range(2):
        for number, (x, _) in enumerate(cache.batches()):
            if epoch == number == 0 and not is_early:
                model.register_forward_pre_hook(before)
            model(x)
        assert "cut at" in cache.describe()
    (supply,) = cache._supplies
    assert supply.replays == 6


def test_numpy_between_modules() -> None:
    # the pooling goes through numpy, so no operation of torch reads the frozen output
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x):
            pooled = torch.from_numpy(self.body(x).detach().numpy().mean((2, 3)))
            return self.head(pooled)

    assert "cut at body (" in both(Net, images, "head").text


def test_a_dataset_that_works_in_workers_only() -> None:
    class Shy(Counted):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info() is None:
                raise ValueError("not in the main process")
            return super().__getitem__(index)

    def data():
        base = images()
        return Shy(base.inputs, base.labels)

    text = off(TinyCNN, data, *LAST, loader_options={"num_workers": 1})
    assert "could not be loaded in this process: ValueError: not in the main process" in text


def test_a_frozen_module_that_computes_by_numpy() -> None:
    # its output comes from no operation of torch; stored once it would be stale for the next batch
    class ByNumpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return torch.from_numpy(self.conv(x).detach().numpy().mean((2, 3)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = ByNumpy(), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.body(x))

    assert "cut at body.conv (the operation 'numpy' in body hands Python" in both(Net, images, "head").text


def test_a_number_read_from_the_data() -> None:
    # a frozen module hands on a Python number that item() read: the module has to run
    class Peak(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return x, float(x.abs().max().item())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Peak(), nn.Linear(4, 4)

        def forward(self, x):
            x, peak = self.body(x)
            return self.head(x.mean((2, 3))) / peak

    assert "cut at body.conv" in both(Net, images, "head").text


@pytest.mark.parametrize(
    "form", [lambda n: int(n), lambda n: (0.5, float(n)), lambda n: {"all": bool(n > 6)}]
)
def test_a_number_read_from_tokens(form) -> None:
    # decides nothing that a recording cannot see, but is another in batches to come: the module has to run
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, ids):
            return self.linear(self.table(ids)).mean(1), form(ids.max())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Counting(), nn.Linear(6, 4)

        def forward(self, ids):
            x, told = self.body(ids)
            number = told["all"] if isinstance(told, dict) else told[1] if isinstance(told, tuple) else told
            return self.head(x) * (1 + number)

    def tokens() -> Counted:
        ids = torch.arange(16 * 6).reshape(16, 6) % 9  # in each batch of the first half there is an 8
        ids[8:] %= 5
        return Counted(ids, torch.arange(16) % 4)

    found = both(Net, tokens, "head", loader_options={"shuffle": False})
    assert "cut at input of head" in found.text
