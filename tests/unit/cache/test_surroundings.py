"""Whatever a loop, a model or a data set does, cached training ends as the plain one does."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, default_collate

import layerwise
from cache_loops import assert_same, freeze_prefix, train
from layerwise.cache.stock import CachePool

SIZE, COUNT, WHOLE = 16, 22, 20


class Items(Dataset[Any]):
    """Vectors and labels that a test may change."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(COUNT, SIZE, generator=generator), torch.arange(COUNT) % 4
        self.rng, self._epoch = np.random.default_rng(3), 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index].clone(), self.y[index]


class Whole(Items):
    """As many as make whole batches: a smaller last one may have other last bits, by the processor."""

    def __len__(self) -> int:
        return WHOLE


class Net(nn.Module):
    """A frozen `body`; a `tail` and a `head` that learn."""

    def __init__(self, body: nn.Module | None = None, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))
        self.tail, self.head = tail or nn.Dropout(0.2), nn.Linear(SIZE, 4)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.head(self.tail(self.body(x, *more)))


class Layer(nn.Module):
    """A linear layer, and what `act(module, result)` makes of its result; keeps `state`."""

    def __init__(self, act: Callable[..., Tensor], **state: Any) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(SIZE, SIZE), act
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.act(self, self.linear(x), *more)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Case:
    """One way of training.

    Attributes:
        make: the model.
        says: regular expression found in what the cache tells.
        step: the loss of a batch.
        before: called with model, data and epoch before each epoch.
        data: the data set.
        options: of the loader.
    """

    make: Callable[[], nn.Module] = Net
    says: str = "memory, cut at "
    step: Callable[[nn.Module, Any], Tensor] = loss
    before: Callable[[Any, Any, int], Any] = lambda model, data, epoch: None
    data: Callable[[], Items] = Items
    options: Any = None


def body(act: Callable[..., Tensor], **state: Any) -> Callable[[], nn.Module]:
    """Return what makes a net whose frozen body is a `Layer`; mutable state is made anew each time."""
    return lambda: Net(Layer(act, **{k: v() if callable(v) else v for k, v in state.items()}))


def tail(act: Callable[..., Tensor], **state: Any) -> Callable[[], nn.Module]:
    """The same with a tail that learns."""
    return lambda: Net(tail=Layer(act, **{k: v() if callable(v) else v for k, v in state.items()}))


def at(epoch: int, change: Callable[[Any, Any], Any]) -> Callable[[Any, Any, int], Any]:
    return lambda model, data, now: change(model, data) if now == epoch else None


# -- state of the model ---------------------------------------------------------------------------


def keep_features(module: Any, h: Tensor) -> Tensor:
    module.features = h
    return h.relu()


def mix_with_queue(module: Any, h: Tensor) -> Tensor:
    out = h - torch.stack(list(module.queue)[-3:]).mean(0) if len(module.queue) >= 3 else h
    module.queue.append(h.detach().mean(0))
    return out


def add_previous(module: Any, h: Tensor) -> Tensor:
    out = h if module.prev is None else h + 0.1 * module.prev
    module.prev = h.detach().mean(0)
    return out


def count_in_object(module: Any, h: Tensor) -> Tensor:
    module.state.n += 1
    return h if module.state.n < 8 else h * 1.5


def track_centre(module: Any, h: Tensor) -> Tensor:
    module.centre.lerp_(h.detach().mean(0), 0.1)
    return h - module.centre


def track_scale(module: Any, h: Tensor) -> Tensor:
    module.scale.lerp_(h.detach().abs().mean(0), 0.1)
    return h / module.scale


def shrink_weight(module: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        module.linear.weight.mul_(0.99)
    return h


def replace_weight(module: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        module.linear.weight.data = module.linear.weight.data * 0.99
    return h


def drop_rarely(module: Any, h: Tensor) -> Tensor:
    return h if random.random() > 0.05 else h * 0


def own_noise(module: Any, h: Tensor) -> Tensor:
    return h * torch.empty_like(h).bernoulli_(0.8, generator=module.generator)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def hooked_features() -> nn.Module:
    model = Net()
    model.seen = {}
    model.body[0].register_forward_hook(lambda m, args, out: model.seen.update(f=out.detach()))
    return model


STATE = {
    "features that the loss reads": Case(
        body(keep_features), "cut at body.linear ",
        lambda m, b: loss(m, b) + m.head(m.body.features).pow(2).mean(),
    ),
    "features that a hook collects": Case(
        hooked_features, "cut at|off: .*a module with a hook",
        lambda m, b: loss(m, b) + m.head(m.seen["f"]).pow(2).mean(),
    ),
    "queue that begins empty": Case(body(mix_with_queue, queue=list), "off: .*'queue'"),
    "ring in the trained part": Case(tail(mix_with_queue, queue=lambda: deque(maxlen=4))),
    "state that begins as none": Case(body(add_previous, prev=None), "off: .*'prev'"),
    "state of the trained part": Case(tail(add_previous, prev=None)),
    "counter in an object": Case(body(count_in_object, state=lambda: SimpleNamespace(n=0)), "off: .*'state'"),
    "plain tensor of the trained part": Case(tail(track_centre, centre=lambda: torch.zeros(SIZE))),
    "forward writes a weight": Case(tail(shrink_weight), "off: the forward .* changes .*tail.linear"),
    "forward replaces a weight": Case(tail(replace_weight), "off: the forward .* changes .*tail.linear"),
    "Python's random numbers": Case(body(drop_rarely), "off: .*Python's or numpy's"),
    "generator of the trained part": Case(tail(own_noise, generator=seeded)),
}  # fmt: skip


# -- what changes while it runs ---------------------------------------------------------------------


def scaled(module: Any, h: Tensor) -> Tensor:
    return h / module.scale


def picked(module: Any, h: Tensor) -> Tensor:
    return h * module.scales[module.domain]


def choose_domain(model: Any, batch: Any) -> Tensor:
    model.body.domain = int(batch[1][0]) % 3
    return loss(model, batch)


def perturbed(model: Any, batch: Any) -> Tensor:
    generator = torch.Generator().manual_seed(int(batch[1][0]))
    weights = {n: p + 0.01 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (batch[0],)), batch[1])


class Constant(nn.Module):
    """Returns a value of the input, and one of a weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.position = nn.Linear(SIZE, SIZE), nn.Parameter(torch.randn(SIZE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.position * 2


class AddConstant(Net):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        features, position = self.body(x)
        return self.head(self.tail(features + position))


class Momentum(Net):
    """A target that follows the online layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.head(self.tail(x) + self.body(x))


def follow(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        for target, online in zip(model.body.parameters(), model.tail.parameters()):
            target.data.mul_(0.9).add_(online.data, alpha=0.1)
    return loss(model, batch)


def exchange_rows(layer: nn.Linear) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def pruned(layers: nn.Module) -> None:
    prune.l1_unstructured(layers[0], "weight", 0.5)
    layers.requires_grad_(False)


def scale_within(model: Any, batch: Any) -> Tensor:
    model.body.scale = 2.0
    value = loss(model, batch)
    model.body.scale = 1.0
    return value


def set_in_place(layer: nn.Module, value: float) -> None:
    layer.scale.fill_(value)


def set_unnoticed(layer: nn.Module, value: float) -> None:
    layer.scale.data.fill_(value)


def set_anew(layer: nn.Module, value: float) -> None:
    layer.scale = torch.full((1,), value)


def with_buffer(act: Callable[..., Tensor], buffer: Callable[[], Tensor], *, part: str = "body") -> Any:
    """Return what makes a net one of whose parts is a `Layer` with a buffer `scale`."""

    def make() -> nn.Module:
        layer = Layer(act)
        layer.register_buffer("scale", buffer())
        return Net(**{part: layer})

    return make


def at_batches(change: Callable[[nn.Module, float], None], values: Sequence[float]) -> Any:
    """Return a step that sets the body's scale before each batch, when the first epoch is over."""
    count = iter(range(10**6))

    def step(model: Any, batch: Any) -> Tensor:
        number = next(count)
        if number > 8:
            change(model.body, values[number % len(values)])
        return loss(model, batch)

    return step


def buffer_changes(change: Callable[[nn.Module, float], None], values: Sequence[float]) -> Callable[[], Case]:
    make = with_buffer(scaled, lambda: torch.ones(1))
    return lambda: Case(make, ".", at_batches(change, values))


BUFFERS: dict[str, Callable[[], Case]] = {
    "buffer set in place": buffer_changes(set_in_place, [1.0, 2.0, 3.0]),
    "buffer set through data": buffer_changes(set_unnoticed, [1.0, 2.0, 3.0]),
    "buffer set anew": buffer_changes(set_anew, [1.0, 2.0, 3.0]),
    "buffer that is never the same": buffer_changes(set_in_place, [1 + n / 64 for n in range(64)]),
    "large buffer": lambda: Case(
        with_buffer(lambda module, h: h / module.scale.mean(), lambda: torch.ones(40)), ".",
        at_batches(set_in_place, [1.0, 2.0]),
    ),
    "buffer of the trained part": lambda: Case(
        with_buffer(track_scale, lambda: torch.ones(SIZE), part="tail")
    ),
}  # fmt: skip

CONTEXT = SimpleNamespace(scale=1.0)
CHANGES = {
    "number that follows a schedule": Case(
        body(scaled, scale=1.0), before=lambda m, d, e: setattr(m.body, "scale", 1 + e)
    ),
    "plain tensor": Case(
        body(scaled, scale=lambda: torch.ones(1)), before=lambda m, d, e: m.body.scale.mul_(1.5)
    ),
    "number of the trained part": Case(
        tail(scaled, scale=1.0), before=lambda m, d, e: setattr(m.tail, "scale", 1 + e)
    ),
    "domain before each batch": Case(
        body(picked, scales=lambda: torch.tensor([1.0, 2.0, 3.0]), domain=0), step=choose_domain
    ),
    "number for the call alone": Case(body(scaled, scale=1.0), ".", scale_within),
    "other activation": Case(before=at(1, lambda m, d: m.body.__setitem__(1, nn.Tanh()))),
    "new hook": Case(before=at(1, lambda m, d: m.body[1].register_forward_hook(lambda m, a, out: out * 2))),
    "exchanged rows": Case(before=at(1, lambda m, d: exchange_rows(m.body[0]))),
    "weight behind a constant": Case(
        lambda: AddConstant(Constant()), before=lambda m, d, e: m.body.position.data.mul_(0.5)
    ),
    "target that moves": Case(Momentum, "off: the frozen weights change", step=follow),
    "perturbed weights": Case(step=perturbed, says="off: the attributes"),
    "pruned": Case(before=at(1, lambda m, d: pruned(m.body))),
    "to and fro": Case(before=lambda m, d, e: m.body[2].requires_grad_(e % 2 == 1)),
    "mutable argument": Case(
        body(lambda m, h, context: h * context.scale), "off: an argument of the model is an object",
        lambda m, b: nn.functional.cross_entropy(m(b[0], CONTEXT), b[1]),
        lambda m, d, e: setattr(CONTEXT, "scale", 1.0 + e),
    ),
}  # fmt: skip


# -- what the loop does with a batch ----------------------------------------------------------------


def often(times: int) -> Callable[[], bool]:
    """Return what is True for each of so many calls, from the third on."""
    count = iter(range(10**6))
    return lambda: next(count) % times == 2


def on_inputs(change: Callable[[Tensor], Tensor], times: int = 5) -> Callable[[nn.Module, Any], Tensor]:
    """Return a step that changes some batches' inputs before the model gets them."""
    now = often(times)
    return lambda m, b: nn.functional.cross_entropy(m(change(b[0]) if now() else b[0]), b[1])


def erase(x: Tensor) -> Tensor:
    x[:, 2:5] = 0.5
    return x


def input_gradient(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_(True)
    plain = nn.functional.cross_entropy(model(x), batch[1])
    return plain + torch.autograd.grad(plain, x, create_graph=True)[0].pow(2).sum()


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0]
    if not x.requires_grad:
        x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), batch[1]), x)
    return nn.functional.cross_entropy(model(x.detach() + 0.1 * gradient.sign()), batch[1])


LOOPS: dict[str, Callable[[], Case]] = {
    "now and then another cast": lambda: Case(step=on_inputs(lambda x: x.bfloat16().float())),
    "now and then flipped": lambda: Case(step=on_inputs(lambda x: x.flip(1))),
    "now and then written to": lambda: Case(step=on_inputs(lambda x: x.clamp_(-1, 1))),
    "now and then erased": lambda: Case(step=on_inputs(erase)),
    "always written to": lambda: Case(step=on_inputs(lambda x: x.nan_to_num_(), 1), says="."),
    "gradient of the input": lambda: Case(step=input_gradient, says="off: an argument .* requires gradients"),
    "adversarial": lambda: Case(step=adversarial, says="off: "),
    "reconstruction": lambda: Case(
        step=lambda m, b: loss(m, b) + (m.body(b[0]) - b[0]).pow(2).mean(), says="."
    ),
    "checkpointed": lambda: Case(
        step=lambda m, b: nn.functional.cross_entropy(checkpoint(m, b[0], use_reentrant=False), b[1])
    ),
}


# -- data -------------------------------------------------------------------------------------------


class Augmented(Items):
    """Noise from a generator of the data set's own, rarely."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return (-x if self.rng.random() < 0.06 else x), y


class ByEpoch(Items):
    """Noise that depends on an epoch number of an unusual name."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 * self._epoch + index)), y


class Named(Net):
    def forward(self, x: Tensor, *more: Any) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"a": logits, "b": -logits}


def named(samples: list[Any]) -> dict[str, Any]:
    xs, ys = zip(*samples)
    return {"x": torch.stack(xs), "y": torch.stack(ys), "task": "a" if int(ys[0]) < 2 else "b"}


DATA = {
    "labels that change": Case(before=at(1, lambda m, d: d.y.__setitem__(slice(None, None, 2), 3))),
    "inputs that change": Case(before=at(2, lambda m, d: d.x.mul_(0.5))),
    "other inputs": Case(before=at(1, lambda m, d: setattr(d, "x", d.x * 0.5))),
    "epoch of another name": Case(
        data=ByEpoch, before=lambda m, d, e: setattr(d, "_epoch", e), says=r"from epoch to epoch \(_epoch"
    ),
    "epoch that nobody uses": Case(before=lambda m, d, e: setattr(d, "_epoch", e)),
    "generator of its own": Case(data=Augmented, says="off: loading a sample draws random numbers"),
    "texts that differ by batch": Case(
        Named, step=lambda m, b: nn.functional.cross_entropy(m(b["x"])[b["task"]], b["y"]),
        options={"collate_fn": named},
    ),
}  # fmt: skip

CASES = {name: (lambda case=case: case) for name, case in (STATE | CHANGES | DATA).items()} | BUFFERS | LOOPS


@pytest.mark.filterwarnings("ignore::layerwise.errors.LayerwiseWarning")
@pytest.mark.parametrize("name", CASES)
def test_cached_is_plain(name: str) -> None:
    # weights, losses and random numbers, over four epochs
    def run(cached: bool) -> Any:
        case = CASES[name]()
        data = case.data()
        random.seed(0)
        return train(
            case.make, data, "tail", "head", cached=cached, step=case.step, epochs=4,
            before_epoch=lambda model, epoch: case.before(model, data, epoch), loader_options=case.options,
        )  # fmt: skip

    plain, cached = run(False), run(True)
    assert_same(plain, cached)
    assert re.search(CASES[name]().says, cached.text), cached.text


def test_a_schedule_of_the_trained_part_never_ends_the_cache() -> None:
    # a number that changes each epoch: the first batch is looked at again, and no sample is computed anew
    def step_up(model: Any, epoch: int) -> None:
        model.tail.scale = 1.0 + epoch

    cached = train(
        tail(scaled, scale=1.0), Items(), "tail", "head", cached=True, epochs=12, before_epoch=step_up
    )
    assert cached.text.count("off") == 0
    plain = train(
        tail(scaled, scale=1.0), Items(), "tail", "head", cached=False, epochs=12, before_epoch=step_up
    )
    assert_same(plain, cached)


def test_ordinary_training_loads_nothing_again() -> None:
    # what is watched costs no loading: neither of a data set that counts, nor where an epoch is set
    class Counting(Whole):
        loads = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.loads += 1
            return super().__getitem__(index)

    cached = train(Net, Counting(), "head", cached=True, epochs=3, validate=True)
    assert cached.loads[1:] == [0, 0]


# -- tensors that learn and are no parameters ---------------------------------------------------------


def weighted(module: Any, h: Tensor) -> Tensor:
    return h * module.alpha.softmax(0)


@pytest.mark.parametrize("by_hook", [False, True])
def test_tensors_that_learn_and_are_no_parameters(by_hook) -> None:
    # DARTS's alphas; an adapter that a hook attaches
    def run(cached: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Net(Layer(weighted, alpha=torch.zeros(SIZE, requires_grad=True)))
        learning = [model.body.alpha]
        if by_hook:
            model, adapter = Net(), nn.Linear(SIZE, SIZE)
            model.body[0].register_forward_hook(lambda m, args, out: out + adapter(out))
            learning = list(adapter.parameters())
        freeze_prefix(model, "tail", "head")
        loader = DataLoader(Items(), 4)
        optimizer = torch.optim.AdamW([*model.parameters(), *learning], lr=1e-2)
        start = [tensor.detach().clone() for tensor in learning]
        with layerwise.PrefixCache(model, loader, storage="memory") as cache:
            for _ in range(3):
                for batch in cache.batches() if cached else loader:
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
        assert all(not torch.equal(one, tensor) for one, tensor in zip(start, learning))
        return [tensor.detach().clone() for tensor in (*learning, *model.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(False), run(True)))


def test_a_layer_map_leaves_replaced_weights_alone() -> None:
    # MoCo's own line in the forward: the recording must not leave tensors without data behind
    model = tail(replace_weight)()
    before = model.tail.linear.weight.detach().clone()
    layerwise.layer_map(model, torch.zeros(2, SIZE))
    assert model.tail.linear.weight.device.type == "cpu"
    assert torch.equal(model.tail.linear.weight, before)


# -- values that are shared -----------------------------------------------------------------------------


def outputs(model: nn.Module, data: Any, *, collate: Any = None, **options: Any) -> list[Tensor]:
    """Return what the model gives for each batch of the second epoch."""
    loader: DataLoader[Any] = DataLoader(data, 4, collate_fn=collate)
    with layerwise.PrefixCache(model, loader, **{"storage": "memory", **options}) as cache:
        for batch in cache.batches():
            model(batch[0])
        return [model(batch[0]).detach() + batch[1].unsqueeze(1) for batch in cache.batches()]


@pytest.mark.parametrize("kind", ["pool", "folder"])
@pytest.mark.parametrize("changed", ["input", "label"])
def test_one_changed_sample_is_other_data(kind, changed, tmp_path) -> None:
    model = Net()
    freeze_prefix(model, "head")
    model.eval()
    options = {"pool": CachePool()} if kind == "pool" else {"folder": tmp_path, "storage": "disk"}
    outputs(model, Items(), **options)
    data = Items()
    (data.x if changed == "input" else data.y)[10] += 1
    plain = [model(x).detach() + y.unsqueeze(1) for x, y in DataLoader(data, 4)]
    assert all(torch.equal(one, other) for one, other in zip(plain, outputs(model, data, **options)))


def with_fewer_labels(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = default_collate(samples)
    return x, y.clamp(max=0)


@pytest.mark.parametrize("kind", ["pool", "folder"])
def test_batches_that_are_made_otherwise_are_other_data(kind, tmp_path) -> None:
    model, data = Net(), Items()
    freeze_prefix(model, "head")
    model.eval()
    options = {"pool": CachePool()} if kind == "pool" else {"folder": tmp_path, "storage": "disk"}
    outputs(model, data, **options)
    plain = [model(x).detach() + y.unsqueeze(1) for x, y in DataLoader(data, 4, collate_fn=with_fewer_labels)]
    found = outputs(model, data, collate=with_fewer_labels, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain, found))


def test_labels_that_change_have_another_name(tmp_path) -> None:
    # what was published under the old name is not found again in the middle of the run
    def run(**options: Any) -> Any:
        data = Items()
        change = at(1, lambda m, d: d.y.__setitem__(slice(None, None, 2), 3))
        return train(
            Net, data, "tail", "head", before_epoch=lambda m, e: change(m, data, e), **options
        )  # fmt: skip

    assert_same(run(cached=False), run(cached=True, folder=tmp_path, storage="disk"))


def test_numbers_of_the_frozen_part_are_part_of_the_name(tmp_path) -> None:
    # the same weights behind another limit: a lasting folder holds values of the first one
    torch.manual_seed(0)
    model = Net(Layer(lambda m, h: h.clamp(max=m.limit), limit=0.1))
    freeze_prefix(model, "head")
    model.eval()
    outputs(model, Items(), folder=tmp_path, storage="disk")
    model.body.limit = 0.2
    plain = [model(x).detach() + y.unsqueeze(1) for x, y in DataLoader(Items(), 4)]
    again = outputs(model, Items(), folder=tmp_path, storage="disk")
    assert all(torch.equal(one, other) for one, other in zip(plain, again))


@pytest.mark.filterwarnings("ignore::layerwise.errors.LayerwiseWarning")
def test_values_that_cannot_be_computed_between_two_batches_are_told() -> None:
    # the model of the call is never there when samples are to be computed, so nothing is gained
    cached = train(body(scaled, scale=1.0), Whole(), "tail", "head", cached=True, step=scale_within, epochs=3)
    assert f"of {WHOLE} samples stored so far" in cached.text
    assert "stored so far" not in train(Net, Whole(), "tail", "head", cached=True, epochs=2).text
