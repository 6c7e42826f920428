"""`fit` and a bare PyTorch loop, written out here, end in the same bits on a CPU."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from layerwise.training.fit import fit
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

LR, DECAY, SEED, SIZE = 1e-2, 0.05, 3, 8


def bare_loop(model: Tiny, *, accumulate: int = 1, clip_norm: float | None = None) -> None:
    """Head for two epochs; then body at half the rate as well, for two more; the stem stays frozen."""
    data = tiny_data()
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.head.weight], "weight_decay": DECAY, "base": LR},
            {"params": [model.head.bias], "weight_decay": 0.0, "base": LR},
        ],
        lr=LR,
        fused=True,  # what fit chooses for an optimiser by name
    )
    model.stem.requires_grad_(False)
    model.body.requires_grad_(False)
    steps_per_epoch = math.ceil(math.ceil(len(data) / SIZE) / accumulate)
    phase_step = 0
    for epoch in range(4):
        model.train()
        model.stem.eval()  # frozen: no drifting statistics, no dropout
        if epoch < 2:
            model.body.eval()
        if epoch == 2:  # the body joins; the head keeps its moments
            model.body.requires_grad_(True)
            linear, norm = model.body[0], model.body[1]
            optimizer.add_param_group(
                {"params": [linear.weight], "weight_decay": DECAY, "base": LR * 0.5, "joins": True}
            )
            optimizer.add_param_group(
                {
                    "params": [linear.bias, norm.weight, norm.bias],
                    "weight_decay": 0.0,
                    "base": LR * 0.5,
                    "joins": True,
                }
            )
            phase_step = 0
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
        order = torch.randperm(len(data), generator=generator).tolist()
        batches = [order[i : i + SIZE] for i in range(0, len(order), SIZE)]
        for begin in range(0, len(batches), accumulate):
            window = batches[begin : begin + accumulate]
            for indices in window:
                x, y = data[indices]
                share = len(window) * len(window[0]) / len(indices)  # their number, where all are alike
                (F.cross_entropy(model(x), y) / share).backward()
            samples = sum(map(len, window))
            if samples != len(window) * len(window[0]):
                for parameter in (p for p in model.parameters() if p.grad is not None):
                    parameter.grad *= len(window) * len(window[0]) / samples
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["base"]
                if epoch >= 2:
                    group["lr"] *= cosine(phase_step, 2 * steps_per_epoch)
                if group.get("joins"):
                    group["lr"] *= min(1.0, (phase_step + 1) / 5)
            optimizer.step()
            optimizer.zero_grad()
            phase_step += 1


def cosine(step: int, total: int, warmup: int = 3) -> float:
    """Three steps of linear warm-up, then half a cosine wave down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 3}, {"clip_norm": 0.05}],
    ids=["plain", "accumulate", "clip"],
)
def test_fit_is_the_bare_loop_bit_for_bit(options: dict, tmp_path: Path) -> None:
    # Two phases, a joining group with warm-up, frozen batch-norm, dropout, decay on matrices only.
    bare = Tiny()
    start = copy.deepcopy(bare.state_dict())
    bare_loop(bare, **options)
    model = Tiny()
    fit(
        model,
        tiny_data(),
        plan=tiny_plan(),
        layers=tiny_layers(model),
        lr=LR,
        weight_decay=DECAY,
        batch_size=SIZE,
        seed=SEED,
        cache="off",
        progress=False,
        out=tmp_path / "run",
        **options,
    )
    expected, found = bare.state_dict(), model.state_dict()
    differ = [name for name in expected if not torch.equal(expected[name], found[name])]
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], found[name])}
    assert differ == []
    assert moved == {"body", "head"}


def test_another_seed_or_rate_is_seen() -> None:
    # The comparison above can fail: a slightly different run ends in other bits.
    def weights(**changes: object) -> torch.Tensor:
        model = Tiny()
        options: dict = {"lr": LR, "seed": SEED, "weight_decay": DECAY, "batch_size": SIZE, **changes}
        fit(model, tiny_data(), plan=tiny_plan(), layers=tiny_layers(model), progress=False, **options)
        return model.head.weight

    first = weights()
    assert torch.equal(first, weights())
    for change in ({"lr": LR * 1.0001}, {"seed": SEED + 1}, {"weight_decay": 0.0}, {"batch_size": 9}):
        assert not torch.equal(first, weights(**change)), change


def test_a_loader_with_our_order_is_the_same_run() -> None:
    # A shuffling DataLoader gives its data, batch size and workers; the run is that of the data set.
    def weights(train: object) -> torch.Tensor:
        model = Tiny()
        fit(
            model,
            train,
            plan=tiny_plan(),
            layers=tiny_layers(model),
            lr=LR,
            seed=SEED,
            batch_size=SIZE,
            progress=False,
        )
        return model.head.weight

    loader = DataLoader(tiny_data(), batch_size=SIZE, shuffle=True)
    assert torch.equal(weights(tiny_data()), weights(loader))
