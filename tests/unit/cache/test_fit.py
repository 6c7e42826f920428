"""`fit` and the Tuner's plans end in the same bits with the cache and without."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler

import layerwise
from cache_loops import images
from helpers import TinyCNN
from layerwise.cache.replay.ghost import Ghost

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

PLANS = {
    "top_k": lambda layers: layerwise.top_k(layers, k=2, epochs=3),
    "gradual_unfreezing": lambda layers: layerwise.gradual_unfreezing(
        layers, epochs_per_group=2, last_epochs=2
    ),
    "gradual_unfreezing by steps": lambda layers: layerwise.gradual_unfreezing(
        layers, steps_per_group=8, last_steps=8
    ),
    "lp_ft": lambda layers: layerwise.lp_ft(layers, epochs=4),
}


def parts(make_plan):
    torch.manual_seed(0)
    model = TinyCNN()
    layers = layerwise.layer_map(model, torch.zeros(2, 3, 8, 8), granularity="stages")
    return model, layers, make_plan(layers)


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in PLANS), ("lp_ft", {"precision": "bf16", "accumulate": 2, "clip_norm": 1.0})],
)
def test_fit_is_bit_equal(name, settings) -> None:
    # in bf16 with accumulated and clipped gradients too
    results = {}
    for cache in ("off", "memory"):
        model, layers, plan = parts(PLANS[name])
        start = {key: value.clone() for key, value in model.state_dict().items()}
        data = images(42)  # more than are loaded once to look at their shapes
        result = layerwise.fit(
            model, data, images(10), plan=plan, layers=layers, batch_size=4, lr=1e-2,
            cache=cache, keep="last", progress=False, device="cpu", **settings,
        )  # fmt: skip
        assert any(not torch.equal(start[key], value) for key, value in model.state_dict().items())
        results[cache] = (model.state_dict(), result, data.loads)
    for key, value in results["off"][0].items():
        assert torch.equal(value, results["memory"][0][key]), key
    assert [e["train_loss"] for e in results["off"][1].history] == [
        e["train_loss"] for e in results["memory"][1].history
    ]
    assert results["memory"][2] < results["off"][2]  # the cache was at work


def losses(data, cache: str, workers: int) -> list[float]:
    model, layers, plan = parts(PLANS["top_k"])
    result = layerwise.fit(
        model, data, images(10), plan=plan, layers=layers, batch_size=4, lr=1e-2, cache=cache,
        keep="last", progress=False, device="cpu", workers=workers,
    )  # fmt: skip
    return [epoch["train_loss"] for epoch in result.history]


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmentation_that_few_samples_show(workers) -> None:
    # what a sample draws is drawn anew in each epoch, though fit leaves no trace of it
    def fitted(cache: str):
        data = images(42)
        data.transform = lambda x: x * 0 if torch.rand(()) < 0.05 else x
        return losses(data, cache, workers)

    assert fitted("memory") == fitted("off")


@pytest.mark.filterwarnings("ignore:The prefix cache is off")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_draws_from_a_generator_of_the_data_set(share, workers) -> None:
    # what looks at samples puts it back, also within what `fit` puts around the data set
    def fitted(cache: str):
        data = images(42)
        data.own, few = torch.Generator().manual_seed(3), data.inputs[: int(42 * share), 0, 0, 0]
        data.transform = lambda x: x * torch.rand((), generator=data.own) if x[0, 0, 0] in few else x
        return losses(data, cache, workers)

    assert fitted("memory") == fitted("off")


class Drawn(Sampler[int]):
    """An order of one's own, drawn from the global generator."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        yield from torch.randperm(self.count).tolist()

    def __len__(self) -> int:
        return self.count


def test_a_sampler_of_ones_own_is_cached_and_resumed(tmp_path, monkeypatch) -> None:
    # the order that the plain loader would have drawn; also from the middle of an epoch on
    def fitted(cache: str, **options):
        model, layers, plan = parts(PLANS["top_k"])
        data = images(42)
        loader = DataLoader(data, batch_size=4, sampler=Drawn(42))
        given = {"plan": plan, "layers": layers, "cache": cache, "keep": "last", "progress": False, **options}
        layerwise.fit(model, loader, images(10), **given)
        return model.state_dict(), data.loads

    class KilledError(Exception):
        pass

    plain, loads = fitted("off")
    cached, fewer = fitted("memory")
    assert fewer < loads
    steps = []
    real_step = layerwise.Tuner.step

    def step(tuner):
        real_step(tuner)
        steps.append(tuner.step_count)
        if len(steps) == 17:  # in the middle of the second epoch
            raise KilledError

    monkeypatch.setattr(layerwise.Tuner, "step", step)
    options = {"out": tmp_path / "run", "checkpoint_every_steps": 4}
    with pytest.raises(KilledError):
        fitted("memory", **options)
    monkeypatch.setattr(layerwise.Tuner, "step", real_step)
    resumed, _ = fitted("memory", **options, resume=True)
    for key, value in plain.items():
        assert torch.equal(value, cached[key]), key
        assert torch.equal(value, resumed[key]), key


@pytest.mark.parametrize("name", ["gradual_unfreezing", "lp_ft"])
def test_one_pass_fills_the_caches_of_later_phases(name) -> None:
    # with tuner= a phase change loads the one batch that is checked, and no more
    model, layers, plan = parts(PLANS[name])
    data = images()
    loader = DataLoader(data, batch_size=4, shuffle=True)
    tuner = layerwise.Tuner(
        model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(loader), layers=layers
    )
    cache = layerwise.PrefixCache(model, loader, storage="memory", tuner=tuner)
    loads, prefix_runs = [], []
    plain_forward = model.stem[0].forward

    def counted(x):  # no hook: a module with a hook is never skipped
        prefix_runs.append(isinstance(x, Ghost))
        return plain_forward(x)

    model.stem[0].forward = counted
    for _ in tuner.epochs():
        model.train()
        before, phase = data.loads, tuner.phase_index
        prefix_runs.clear()
        for x, y in cache.batches():
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
        loads.append((phase, data.loads - before, len(prefix_runs)))
    frozen = [entry for entry in loads if entry[0] < len(plan.phases) - 1]
    assert frozen[0][1] >= 22
    for (earlier, _, _), (phase, count, runs) in itertools.pairwise(frozen):
        assert count == (0 if phase == earlier else 4)
        assert runs <= (0 if phase == earlier else 2)  # the plain batch, and its recording
    assert "off: no part of the forward pass" in cache.describe()  # the last phase trains everything


def test_a_phase_without_a_column_of_its_own_is_still_exact() -> None:
    # without tuner= each phase fills its own cache, by and by
    outcomes = []
    for cached in (False, True):
        model, layers, plan = parts(PLANS["gradual_unfreezing"])
        torch.manual_seed(1)
        loader = DataLoader(images(), batch_size=4, shuffle=True)
        tuner = layerwise.Tuner(
            model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=len(loader), layers=layers
        )
        cache = layerwise.PrefixCache(model, loader, storage="memory")
        for _ in tuner.epochs():
            model.train()
            for x, y in cache.batches() if cached else loader:
                nn.functional.cross_entropy(model(x), y).backward()
                tuner.step()
        outcomes.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(outcomes[0][key], outcomes[1][key]) for key in outcomes[0])


def test_groups_that_are_drawn_anew_every_few_steps() -> None:
    # LISA: no prefix is frozen for long; the cache stays away and costs no recordings
    model, layers, plan = parts(lambda layers: layerwise.lisa(layers, epochs=2, groups=1, every_steps=2))
    loader = DataLoader(images(), batch_size=4)
    tuner = layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=len(loader), layers=layers)
    cache = layerwise.PrefixCache(model, loader, storage="memory", tuner=tuner)
    for _ in tuner.epochs():
        for x, y in cache.batches():
            nn.functional.cross_entropy(model(x), y).backward()
            tuner.step()
    assert "draws anew" in cache.describe()
    assert "cut at" not in cache.describe()
