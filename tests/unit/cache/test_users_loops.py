"""Loops of unusual forms: cached, each ends as it does with the loader alone, random numbers included."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

import layerwise
from cache_loops import Counted, freeze_prefix, images

EPOCHS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.body(x)).mean((2, 3)))


@dataclass
class Run:
    """One run: what a loop needs, and what it noted."""

    cached: bool
    data: Counted = field(default_factory=images)
    losses: list[float] = field(default_factory=list)
    loader_options: dict[str, Any] = field(default_factory=dict)
    cache: layerwise.PrefixCache | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        self.take(Net())

    def take(self, model: nn.Module) -> None:
        """Train this model."""
        self.model = model
        freeze_prefix(self.model, "tail", "head")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def batches(self, loader: Any) -> Iterator[Any]:
        if not self.cached:
            return iter(loader)
        if self.cache is None:
            self.cache = layerwise.PrefixCache(self.model, storage="memory")
        return iter(self.cache.batches(loader))

    def loader(self, data: Any = None, **options: Any) -> DataLoader[Any]:
        options = {"batch_size": 4, "shuffle": True} | self.loader_options | options
        return DataLoader(self.data if data is None else data, **options)

    def step(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """One update by the sum of the losses of several batches."""
        loss = torch.stack([nn.functional.cross_entropy(self.model(x), y) for x, y in pairs]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def validated_in_inference_mode(run: Run) -> None:
    loader, held_out = run.loader(), run.loader(images(10), shuffle=False)
    for _ in range(EPOCHS):
        run.model.train()
        for batch in run.batches(loader):
            run.step(batch)
        run.model.eval()
        with torch.inference_mode():
            for x, _ in run.batches(held_out):
                run.losses.append(run.model(x).sum().item())


class Transposed(nn.Module):
    """Its own code makes a view between two frozen modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(8, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.body(x.mean(1)).transpose(1, 2)).relu().mean(2))


def views_of_ghosts_in_inference_mode(run: Run) -> None:
    run.take(Transposed())
    validated_in_inference_mode(run)


def two_loaders_zipped(run: Run) -> None:
    one, other = run.loader(), run.loader(images(22))
    for _ in range(EPOCHS):
        for pair in zip(run.batches(one), run.batches(other)):
            run.step(*pair)


def a_cache_for_each_of_two_loaders(run: Run) -> None:
    loaders = run.loader(), run.loader(images(10), shuffle=False)
    caches = [layerwise.PrefixCache(run.model, one, storage="memory") for one in loaders]
    one, other = [cache.batches for cache in caches] if run.cached else [one.__iter__ for one in loaders]
    for epoch in range(EPOCHS):
        if epoch == 1:
            for pair in zip(one(), other()):
                run.step(*pair)
            continue
        for number, batch in enumerate(one()):
            run.step(batch)
            if number % 3 == 2:  # a validation every few steps
                with torch.no_grad():
                    run.losses += [run.model(x).sum().item() for x, _ in other()]
    run.cache = caches[0]
    assert not run.cached or all(cache._supplies[0].replays for cache in caches)


def an_average_of_the_weights_is_validated_first(run: Run) -> None:
    loader, held_out = run.loader(), run.loader(images(16), shuffle=False)
    average = torch.optim.swa_utils.AveragedModel(run.model)
    for _ in range(EPOCHS):
        run.model.train()
        for batch in run.batches(loader):
            run.step(batch)
            average.update_parameters(run.model)
        run.model.eval()
        average.eval()
        for model in (average, run.model):
            with torch.no_grad():
                run.losses += [model(x).sum().item() for x, _ in run.batches(held_out)]
    assert run.cache is None or all(supply.replays for supply in run.cache._supplies)


def two_loaders_of_one_data_set_zipped(run: Run) -> None:
    one, other = run.loader(), run.loader()
    for _ in range(EPOCHS):
        for pair in zip(run.batches(one), run.batches(other)):
            run.step(*pair)


def two_loaders_of_one_data_set_by_turns(run: Run) -> None:
    one, other = (run.loader(num_workers=1, persistent_workers=True) for _ in range(2))
    for _ in range(EPOCHS):
        epochs = run.batches(one), run.batches(other)
        for batches in epochs:
            for batch in batches:
                run.step(batch)


def a_new_loader_for_each_epoch(run: Run) -> None:
    held_out = images(10)
    for _ in range(EPOCHS):
        run.model.train()
        for batch in run.batches(run.loader()):
            run.step(batch)
        run.model.eval()
        with torch.no_grad():
            for x, _ in run.batches(run.loader(held_out, shuffle=False)):
                run.losses.append(run.model(x).sum().item())


def doubled(samples: list[tuple[Tensor, Tensor]]) -> Any:
    x, y = default_collate(samples)
    return x * 2, y


def another_collate_function_of_the_loader(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        if epoch == 1:
            loader.collate_fn = doubled
        for batch in run.batches(loader):
            run.step(batch)


def draws_after_iter(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        batches = run.batches(loader)
        scale = float(torch.rand(()))
        for x, y in batches:
            run.step((x, y))
            run.losses.append(scale)


def second_loader_goes_round(run: Run) -> None:
    loader, others = run.loader(), run.loader(images(10), shuffle=False)
    endless = (batch for _ in iter(int, 1) for batch in run.batches(others))
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            run.step(batch, next(endless))


def other_samples_before_the_batch(run: Run) -> None:
    unlabelled = images(4).inputs
    loader = run.loader()
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.step((unlabelled, torch.zeros(4, dtype=torch.int64)), (x, y))


def labels_taken_out_of_the_batch(run: Run) -> None:
    loader = run.loader(collate_fn=by_name)
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            y = batch.pop("labels")
            batch["weight"] = torch.ones(len(y))
            run.step((batch["x"], y))


def by_name(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"labels": torch.stack([y for _, y in samples]), "x": torch.stack([x for x, _ in samples])}


def grows(run: Run) -> None:
    everything = images(40)
    loader = run.loader()
    for epoch in range(EPOCHS):
        run.data.inputs = everything.inputs[: 22 + 6 * epoch]
        run.data.labels = everything.labels[: 22 + 6 * epoch]
        for batch in run.batches(loader):
            run.step(batch)


def shrinks_once(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        if epoch == 1:
            run.data.inputs, run.data.labels = run.data.inputs[:14], run.data.labels[:14]
        for batch in run.batches(loader):
            run.step(batch)


def closed_inside_an_epoch(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        for number, batch in enumerate(run.batches(loader)):
            if run.cache is not None and (epoch, number) == (1, 2):
                run.cache.close()
            run.step(batch)


def cast_between_epochs(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        dtype = torch.float64 if epoch else torch.float32
        run.model.to(dtype)
        for x, y in run.batches(loader):
            run.step((x.to(dtype), y))


def function_transform(run: Run) -> None:
    run.model.eval()
    loader = run.loader()
    learning = {name: p for name, p in run.model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(run.model, parameters, (x,)), y)

    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            gradients = grad(loss)({name: p.detach() for name, p in learning.items()}, x, y)
            for name, parameter in learning.items():
                parameter.grad = gradients[name]
            run.optimizer.step()


def simple(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            run.step(batch)


def negative_indices(run: Run) -> None:
    run.loader_options = {"shuffle": False, "sampler": list(range(-1, -23, -1))}
    simple(run)


def compiled_in_part(run: Run) -> None:
    run.model.body.compile(backend="eager")
    simple(run)


def called_in_compiled_form(run: Run) -> None:
    model, compiled = run.model, torch.compile(run.model, backend="eager")
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            run.model = compiled
            run.step(batch)
            run.model = model


def compiled_in_place_on_the_way(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            if len(run.losses) == 9:
                run.model.compile(backend="eager")
            run.step(batch)


class RarelyFlipped(Counted):
    """Augments three samples, by numpy's global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (-x if index in (3, 9, 12) and np.random.rand() < 0.5 else x), y


def few_samples_augmented(run: Run) -> None:
    run.data = RarelyFlipped(run.data.inputs, run.data.labels)
    simple(run)


DICE = np.random.default_rng(0)


class FlippedByGlobalDice(Counted):
    """Draws from a generator of its Python module."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (-x if DICE.random() < 0.5 else x), y


def global_generator(run: Run) -> None:
    DICE.bit_generator.state = np.random.default_rng(0).bit_generator.state
    run.data = FlippedByGlobalDice(run.data.inputs, run.data.labels)
    simple(run)


class FlippedByLateDice(Counted):
    """Makes its generator when the first sample is loaded, as transformers' collator for masks does."""

    dice = None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.dice is None:
            self.dice = np.random.default_rng(0)
        x, y = super().__getitem__(index)
        return (-x if self.dice.random() < 0.5 else x), y


def late_generator(run: Run) -> None:
    run.data = FlippedByLateDice(run.data.inputs, run.data.labels)
    simple(run)


class Corrupt(Counted):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 7:
            raise ValueError("corrupt")
        return super().__getitem__(index)


def stepped(run: Run, batches: Iterator[Any], passed_over: type[Exception]) -> None:
    """Train on what can be loaded."""
    while True:
        try:
            run.step(next(batches))
        except StopIteration:
            return
        except passed_over:
            run.losses.append(-1.0)


def corrupt_sample_passed_over(run: Run) -> None:
    run.data = Corrupt(run.data.inputs, run.data.labels)
    loader = run.loader()
    for _ in range(EPOCHS):
        stepped(run, run.batches(loader), ValueError)


class Unreachable(Counted):
    """A file server does not answer, once."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 9 and self.loads > 50 and not hasattr(self, "failed"):
            self.failed = True
            raise OSError("stale file handle")
        return super().__getitem__(index)


def a_batch_that_cannot_be_loaded_once(run: Run) -> None:
    run.data = Unreachable(run.data.inputs, run.data.labels)
    loader = run.loader(shuffle=False)
    for _ in range(EPOCHS):
        run.data.loads = 50
        stepped(run, run.batches(loader), OSError)


class Lost(Counted):
    """The first sample is there in the first epoch only."""

    lost = False

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.lost and index == 0:
            raise OSError("no such file")
        return super().__getitem__(index)


def a_sample_is_lost_after_the_first_epoch(run: Run) -> None:
    run.data = Lost(run.data.inputs, run.data.labels)
    loader = run.loader()
    for epoch in range(EPOCHS):
        run.data.lost = epoch > 0
        stepped(run, run.batches(loader), OSError)


def a_new_loader_with_a_function_of_its_own_for_each_epoch(run: Run) -> None:
    part = list(range(20))
    for _ in range(EPOCHS):
        data = torch.utils.data.Subset(run.data, part)
        for batch in run.batches(run.loader(data, collate_fn=lambda chosen: default_collate(chosen))):
            run.step(batch)


def frozen_weights_scaled_before_each_epoch(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        with torch.no_grad():
            run.model.body[0].weight.mul_(0.99)
        for batch in run.batches(loader):
            run.step(batch)
    if run.cache is not None:
        assert len(run.cache.stock._held) == 2  # values and labels of the last epoch; what was stale is freed


def statistics_written_in_the_middle_of_an_epoch(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        for number, batch in enumerate(run.batches(loader)):
            if (epoch, number) == (1, 2):
                run.model.body[1].running_mean += 0.5
            run.step(batch)


class Configured(Net):
    """Completes its configuration in its first pass, as transformers' classifiers do (`problem_type`)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(kind=None, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.config.kind = self.config.kind or "images"
        return self.head(self.tail(self.body(x * self.config.scale)).mean((2, 3)))


def a_configuration_completed_by_the_model_and_changed_by_the_loop(run: Run) -> None:
    run.take(Configured())
    loader = run.loader()
    for epoch in range(EPOCHS):
        run.model.config.scale = 1.0 + (epoch == 2)
        for batch in run.batches(loader):
            run.step(batch)


class Lazy(Net):
    """Sets a number in its first pass."""

    scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale or 1.0
        return self.head(self.tail(self.body(x * self.scale)).mean((2, 3)))


def a_number_set_by_the_model_and_changed_by_the_loop(run: Run) -> None:
    run.take(Lazy())
    loader = run.loader()
    for epoch in range(EPOCHS):
        for batch in run.batches(loader):
            run.step(batch)
        run.model.scale = 1.0 + (epoch == 1)


def workers_live_on(run: Run) -> None:
    loader = run.loader(num_workers=1, persistent_workers=True)
    next(iter(loader))  # as for a layer map
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            run.step(batch)


def workers_live_on_and_the_loop_changes_the_batch(run: Run) -> None:
    loader = run.loader(num_workers=1, persistent_workers=True)
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.step((x * 2, y))


def other_kernels_around_the_call(run: Run) -> None:
    run.model.body[0] = nn.Conv2d(3, 8, 5, padding=2).requires_grad_(False)
    loader = run.loader()
    for epoch in range(EPOCHS):
        for batch in run.batches(loader):
            with torch.backends.mkldnn.flags(enabled=epoch != 1):
                run.step(batch)


@contextlib.contextmanager
def multiplying_as(dtype: str) -> Iterator[None]:
    """Within: torch's operations of 32-bit numbers may compute in another type (since torch 2.9)."""
    settings = [torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    try:
        for setting in settings:
            setting.fp32_precision = dtype
        yield
    finally:
        for setting in settings:
            setting.fp32_precision = "none"


def multiplied_in_another_type_later(run: Run) -> None:
    loader = run.loader(drop_last=True)
    for epoch in range(EPOCHS):
        with multiplying_as("bf16" if epoch else "none"):
            for batch in run.batches(loader):
                run.step(batch)


def multiplied_in_another_type(run: Run) -> None:
    loader = run.loader(drop_last=True)
    with multiplying_as("bf16"):
        for _ in range(EPOCHS):
            for batch in run.batches(loader):
                run.step(batch)


def tiny_numbers_flushed_later(run: Run) -> None:
    run.data.inputs *= 1e-39
    with torch.no_grad():
        run.model.body[0].weight *= 1e38
    loader = run.loader()
    for epoch in range(EPOCHS):
        torch.set_flush_denormal(epoch > 0)
        try:
            for batch in run.batches(loader):
                run.step(batch)
        finally:
            torch.set_flush_denormal(False)


def parametrizations_kept(run: Run) -> None:
    parametrize.register_parametrization(run.model.tail[0], "weight", Doubled())
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            with parametrize.cached():
                run.step(batch)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def inputs_logged_first(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.losses.append(x[0].mean().item() + float(x.numpy().max()))
            run.step((x, y))


def features_collected_by_hooks(run: Run) -> None:
    features: list[Tensor] = []
    for layer in (run.model.body, run.model.tail):
        layer.register_forward_hook(lambda module, arguments, output: features.append(output))
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            features.clear()
            run.step(batch)
            run.losses += [feature.sum().item() for feature in features]


def labels_corrected_on_the_way(run: Run) -> None:
    loader = run.loader(shuffle=False)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(run.batches(loader)):
            run.step(batch)
            if epoch == 0 and number == 2:
                run.data.labels[:6] = 0


def in_two_modes(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.model.eval()
            with torch.no_grad():
                run.losses.append(run.model(x).sum().item())
            run.model.train()
            run.step((x, y))


def under_autocast_later(run: Run) -> None:
    loader = run.loader()
    for epoch in range(EPOCHS):
        for batch in run.batches(loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=epoch > 0):
                run.step(batch)


def _ahead(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """A prefetcher: asks for so many batches before it hands one over."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def batches_asked_for_ahead(run: Run) -> None:
    loader, held_out = run.loader(), run.loader(images(12), shuffle=False)
    for _ in range(EPOCHS):
        before = run.data.loads
        for batch in _ahead(run.batches(loader), count=2):
            run.step(batch)
        run.model.eval()
        for x, _ in _ahead(run.batches(held_out), count=5):  # more than there are
            run.losses.append(run.model(x).sum().item())
        run.model.train()
    assert run.data.loads - before == (0 if run.cached else 22)
    assert not run.cached or not run.model._forward_pre_hooks


def fetched_far_ahead(run: Run) -> None:
    loader = run.loader(batch_size=1)
    for epoch in range(EPOCHS):
        before = run.data.loads
        batches = list(run.batches(loader)) if epoch < 2 else _ahead(run.batches(loader), count=12)
        for batch in batches:
            run.step(batch)
    assert run.data.loads - before == (0 if run.cached else 22)


def last_batch_not_used(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for number, batch in enumerate(run.batches(loader)):
            if number not in (1, 5):
                run.step(batch)
        assert not run.model._forward_pre_hooks


def frozen_weights_change_before_a_validation(run: Run) -> None:
    loader, held_out = run.loader(), run.loader(images(12), shuffle=False)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(run.batches(loader)):
            if (epoch, number) == (1, 2):
                with torch.no_grad():
                    run.model.body[0].weight.mul_(1.5)
                run.model.eval()
                run.losses += [run.model(x).sum().item() for x, _ in run.batches(held_out)]
                run.model.train()
            run.step(batch)


def frozen_weights_change_and_an_epoch_begins(run: Run) -> None:
    """A batch at hand was made from values that are forgotten by the time it comes."""
    loader = run.loader()
    for epoch in range(EPOCHS):
        batches = run.batches(loader)
        first = next(batches)
        if epoch == 1:
            with torch.no_grad():
                run.model.body[0].weight.mul_(1.5)
            run.step(next(iter(run.batches(loader))))
        run.step(first)
        for batch in batches:
            run.step(batch)


def train_mode_set_in_the_step(run: Run) -> None:
    """As transformers' Trainer does: an epoch begins in the eval mode of the validation before it."""
    loader, held_out = run.loader(), run.loader(images(12), shuffle=False)
    for _ in range(EPOCHS):
        before = run.data.loads
        for batch in _ahead(run.batches(loader), count=2):
            run.model.train()
            run.step(batch)
        run.model.eval()
        for x, _ in run.batches(held_out):
            run.losses.append(run.model(x).sum().item())
    assert run.data.loads - before == (0 if run.cached else 22)


def gradients_of_the_model_hooked(run: Run) -> None:
    run.model.register_full_backward_hook(lambda module, to_inputs, of_outputs: run.losses.append(1.0))
    simple(run)


def outputs_changed_by_a_hook_from_the_first_step_on(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            if not run.losses:
                run.model.register_forward_hook(lambda module, args, output: output * 0.5)
            run.step(batch)


def inputs_changed_by_a_hook_in_the_middle_of_an_epoch(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            if len(run.losses) == 8:
                handle = run.model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            if len(run.losses) == 10:
                handle.remove()
            run.step(batch)


THREADS: set[int] = set()


class NotesThreads(Transposed):
    def forward(self, x: Tensor) -> Tensor:
        THREADS.add(threading.get_ident())
        return super().forward(x)


def fetched_by_another_thread(run: Run) -> None:
    """The model may be in the middle of a step when a batch is made, so it must not run for that."""
    run.take(NotesThreads())
    loader = run.loader(images(60))
    with ThreadPoolExecutor(1) as pool:
        for _ in range(EPOCHS):
            batches = run.batches(loader)
            while (batch := pool.submit(next, batches, None).result()) is not None:
                run.step(batch)
    assert {threading.get_ident()} == THREADS
    assert run.cache is None or run.cache._supplies[0].replays == 15


class DrawnMeanwhile(Counted):
    """While some samples are loaded, something else in the program draws random numbers."""

    soon = 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.soon:
            self.soon -= 1
            other = threading.Thread(target=torch.rand, args=(1,))
            other.start()
            other.join()
        return super().__getitem__(index)


def loaded_by_another_thread_while_the_model_draws(run: Run) -> None:
    data = DrawnMeanwhile(run.data.inputs, run.data.labels)
    loader = run.loader(data)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(EPOCHS):
            batches = run.batches(loader)
            while (batch := pool.submit(next, batches, None).result()) is not None:
                run.step(batch)
                data.soon = 4 * (len(run.losses) == 2)
    assert run.cache is None or not run.cache._supplies[0].reason


class CallsItself(Net):
    """Its own output decides how it goes on, as in some recurrent models."""

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if not again:
            return self.body(x)
        return self.head(self.tail(self(x, again=False)).mean((2, 3)))


def a_model_that_calls_itself(run: Run) -> None:
    run.take(CallsItself())
    simple(run)
    assert not run.cached or run.data.loads <= 2.5 * len(run.data)  # the look at first samples counted


class ClassesInEvalMode(Net):
    """Cannot be compared in eval mode: it returns plain numbers there."""

    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output if self.training else output.argmax(1).tolist()


def validated_on_the_same_loader_first(run: Run) -> None:
    run.take(ClassesInEvalMode())
    loader = run.loader()
    for epoch in range(EPOCHS):
        run.model.eval()
        with torch.no_grad():
            for x, _ in run.batches(loader):
                run.losses += run.model(x)
        run.model.train(epoch != 0)  # or in the loop, as some trainers do
        for batch in run.batches(loader):
            run.model.train()
            run.step(batch)


def set_to_train_late_after_a_validation(run: Run) -> None:
    run.take(ClassesInEvalMode())
    loader = run.loader()
    replays = 0
    for epoch in range(EPOCHS + 1):
        run.model.train(epoch == 1)
        for batch in run.batches(loader) if epoch else ():
            run.model.train()
            run.step(batch)
        replays = run.cache._supplies[0].replays if run.cache is not None else 0
        run.model.eval()
        with torch.no_grad():
            for x, _ in run.batches(loader):
                run.losses += run.model(x)
    assert run.cache is None or replays == 5  # all but the first batch
    assert run.cache is None or "no batch of this epoch was replayed" not in run.cache.describe()


class ReturnsNothing(Net):
    def forward(self, x: Tensor) -> None:
        self.kept = [super().forward(x)]


def outputs_kept_in_an_attribute(run: Run) -> None:
    run.take(ReturnsNothing())
    loader = run.loader()
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.model(x)
            loss = nn.functional.cross_entropy(run.model.kept.pop(), y)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.losses.append(loss.item())


def a_copy_of_the_model_trained_next(run: Run) -> None:
    """It was made while an epoch ran, and that epoch goes on."""
    first, loader = run.model, run.loader()
    batches = run.batches(loader)
    run.step(next(batches))
    run.take(copy.deepcopy(first))
    cache, run.cache = run.cache, None
    simple(run)
    run.take(first)
    for batch in batches:
        run.step(batch)
    assert "_call_impl" not in vars(first)
    cache, run.cache = run.cache, cache
    simple(run)


class Doubling(TorchFunctionMode):
    """Doubles what a ReLU gives, as a mode that emulates other numbers might."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 2 if func is torch.relu else output


def under_a_mode_later(run: Run) -> None:
    """Another mode for each epoch but the first changes what functions of torch give."""
    loader = run.loader()
    for epoch in range(EPOCHS):
        with Doubling() if epoch else contextlib.nullcontext():
            for batch in run.batches(loader):
                run.step(batch)


def on_a_device_by_default(run: Run) -> None:
    """Each call of the model is made in a context of its own, which says where new tensors lie."""
    loader = run.loader()
    for _ in range(EPOCHS):
        for batch in run.batches(loader):
            with torch.device("cpu"):
                run.step(batch)


def work_of_some_batches_counted(run: Run) -> None:
    """The operations of the first call, and of one of each later epoch, are counted: not the cache's own."""
    loader = run.loader()
    for epoch in range(EPOCHS):
        for number, (x, y) in enumerate(run.batches(loader)):
            if number == 2 * min(epoch, 1):
                with FlopCounterMode(display=False) as counter:
                    run.model(x)
                run.losses.append(counter.get_total_flops())
            run.step((x, y))


def inputs_put_into_other_tensors(run: Run) -> None:
    loader = run.loader()
    for _ in range(EPOCHS):
        for x, y in run.batches(loader):
            run.losses.append(torch.empty(0).set_(x.clone()).sum().item())
            run.step((x, y))


def exported_on_the_way(run: Run) -> None:
    """The model is exported with a batch as its example."""
    loader = run.loader(drop_last=True)
    for _ in range(2):
        for number, (x, y) in enumerate(run.batches(loader)):
            if number == 1:
                run.losses.append(torch.export.export(run.model, (x,), strict=False).module()(x).sum().item())
            run.step((x, y))


def differentiated_forward(run: Run) -> None:
    """In the second epoch the derivative in a direction of the input is logged."""
    loader = run.loader()
    for epoch in range(EPOCHS):
        for x, y in run.batches(loader):
            if epoch:
                with forward_ad.dual_level():
                    output = run.model(forward_ad.make_dual(x, torch.ones_like(x)))
                    run.losses.append(forward_ad.unpack_dual(output).tangent.sum().item())
            run.step((x, y))


CACHED = "cut at body"
LOOPS: dict[Callable[[Run], None], str] = {
    validated_in_inference_mode: CACHED,
    views_of_ghosts_in_inference_mode: "cut at",
    two_loaders_zipped: CACHED,
    a_cache_for_each_of_two_loaders: CACHED,
    an_average_of_the_weights_is_validated_first: CACHED,
    two_loaders_of_one_data_set_zipped: CACHED,
    two_loaders_of_one_data_set_by_turns: CACHED,
    a_new_loader_for_each_epoch: r"\A.*loader 1.*\n.*loader 2[^\n]*\Z",
    another_collate_function_of_the_loader: CACHED,
    draws_after_iter: CACHED,
    second_loader_goes_round: CACHED,
    other_samples_before_the_batch: CACHED,
    labels_taken_out_of_the_batch: CACHED,
    grows: "cut at|changes from epoch to epoch",
    shrinks_once: CACHED,
    closed_inside_an_epoch: "closed",
    cast_between_epochs: CACHED,
    function_transform: "off: a transform of torch.func",
    negative_indices: r"off: .* gives \[-1, -2, -3\]",
    called_in_compiled_form: "off: the model is compiled",
    compiled_in_place_on_the_way: "off: the model is compiled",
    compiled_in_part: "off: the model is compiled",
    global_generator: "off: .* draws random numbers",
    late_generator: "off: .* draws random numbers",
    few_samples_augmented: "off: .* draws random numbers",
    a_batch_that_cannot_be_loaded_once: CACHED,
    a_sample_is_lost_after_the_first_epoch: "off: a sample could not be loaded",
    a_new_loader_with_a_function_of_its_own_for_each_epoch: r"\Aprefix cache: memory, cut at body[^\n]*\Z",
    frozen_weights_scaled_before_each_epoch: CACHED,
    corrupt_sample_passed_over: "off: a sample could not be loaded",
    statistics_written_in_the_middle_of_an_epoch: "off: the frozen weights change while an epoch runs",
    a_configuration_completed_by_the_model_and_changed_by_the_loop: CACHED,
    a_number_set_by_the_model_and_changed_by_the_loop: CACHED,
    workers_live_on: CACHED,
    other_kernels_around_the_call: "cut at body|other settings of torch",
    tiny_numbers_flushed_later: "no batch of this epoch was replayed",
    parametrizations_kept: CACHED,
    inputs_logged_first: CACHED,
    features_collected_by_hooks: "hook",
    labels_corrected_on_the_way: CACHED,
    batches_asked_for_ahead: CACHED,
    fetched_far_ahead: CACHED,
    last_batch_not_used: CACHED,
    frozen_weights_change_before_a_validation: "off: the frozen weights change while an epoch runs",
    frozen_weights_change_and_an_epoch_begins: "cut at body|off: the frozen weights",
    train_mode_set_in_the_step: CACHED,
    in_two_modes: CACHED,
    gradients_of_the_model_hooked: CACHED,
    outputs_changed_by_a_hook_from_the_first_step_on: CACHED,
    inputs_changed_by_a_hook_in_the_middle_of_an_epoch: CACHED,
    fetched_by_another_thread: "cut at",
    loaded_by_another_thread_while_the_model_draws: "cut at",
    a_model_that_calls_itself: CACHED,
    set_to_train_late_after_a_validation: "cut at",
    validated_on_the_same_loader_first: CACHED,
    outputs_kept_in_an_attribute: "off: ",
    a_copy_of_the_model_trained_next: CACHED,
    under_a_mode_later: "no batch of this epoch was replayed",
    on_a_device_by_default: CACHED,
    work_of_some_batches_counted: CACHED,
    inputs_put_into_other_tensors: CACHED,
    exported_on_the_way: CACHED,
    differentiated_forward: "off: a transform of torch.func, or forward",
    under_autocast_later: "no batch of this epoch was replayed",
    workers_live_on_and_the_loop_changes_the_batch: "off: ",
}
if hasattr(torch._C, "_get_fp32_precision_getter"):
    LOOPS |= {
        multiplied_in_another_type_later: "off: the model is called under other settings of torch",
        multiplied_in_another_type: CACHED,
    }


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.filterwarnings(
    "ignore:The prefix cache is off",
    "ignore:TF32",
    "ignore:Full backward hook is firing",
    "ignore:.torch.jit.script. is deprecated",  # torch uses it to differentiate forward
)
def test_ends_as_with_the_loader_alone(loop: Callable[[Run], None]) -> None:
    runs = []
    for cached in (False, True):
        run = Run(cached)
        loop(run)
        runs.append((run, torch.get_rng_state(), np.random.random()))
    (plain, state, number), (cached_run, other_state, other_number) = runs
    assert plain.losses == cached_run.losses
    others = cached_run.model.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in plain.model.state_dict().items())
    assert torch.equal(state, other_state)
    assert number == other_number
    assert cached_run.cache is not None
    assert re.search(LOOPS[loop], cached_run.cache.describe()), cached_run.cache.describe()
