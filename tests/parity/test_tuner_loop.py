"""A bare PyTorch loop that unfreezes by hand and the Tuner's loop end in the same bits on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from helpers import batches, changed, map_by_children, snapshot, tiny_cnn
from layerwise.plans.unfreezing import gradual_unfreezing
from layerwise.tuning.tuner import Tuner

STEPS, LR, ALPHA, DECAY = 4, 0.02, 0.5, 0.1
GROUPS = ("stem", "layer1", "layer2", "fc")


def bare_loop(optimizer_class: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Unfreeze a group an epoch, two epochs of everything, linear fall in each phase; all written out."""
    torch.manual_seed(0)
    model = tiny_cnn()
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad = False
    optimizer = None
    for epoch in range(5):
        depth = min(epoch, 3)
        phase_steps = STEPS if epoch < 3 else 2 * STEPS
        if epoch < 4:
            joining = getattr(model, GROUPS[3 - depth])
            for parameter in joining.parameters():
                parameter.requires_grad = True
            rate = LR * ALPHA**depth
            new = [
                {
                    "params": [p for p in joining.parameters() if p.ndim >= 2],
                    "weight_decay": DECAY,
                    "base": rate,
                },
                {
                    "params": [p for p in joining.parameters() if p.ndim < 2],
                    "weight_decay": 0.0,
                    "base": rate,
                },
            ]
            if optimizer is None:
                optimizer = optimizer_class(new, lr=LR, **options)
            else:
                for group in new:
                    optimizer.add_param_group(group)
        assert optimizer is not None
        model.train()
        for name in GROUPS[: 3 - depth]:
            getattr(model, name).eval()
        for index, (images, labels) in enumerate(batches(STEPS, (3, 8, 8), classes=4, seed=epoch)):
            step = index + (STEPS if epoch == 4 else 0)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * (1 - step / phase_steps)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    return snapshot(model)


def tuner_loop(optimizer_class: Any, options: dict[str, Any], *, lr: float = LR) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = tiny_cnn()
    torch.manual_seed(1)
    layers = map_by_children(model)
    plan = gradual_unfreezing(layers, decay=ALPHA, last_epochs=2, schedule="linear", join_steps=0)
    tuner = Tuner(
        model,
        plan,
        optimizer_class,
        lr=lr,
        steps_per_epoch=STEPS,
        layers=layers,
        weight_decay=DECAY,
        **options,
    )
    for epoch in tuner.epochs():
        model.train()
        for images, labels in batches(STEPS, (3, 8, 8), classes=4, seed=epoch):
            F.cross_entropy(model(images), labels).backward()
            tuner.step()
    return snapshot(model)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"fused": True})],
    ids=["adamw", "sgd", "adamw fused"],
)
def test_the_tuner_is_the_bare_loop_bit_for_bit(optimizer: Any, options: dict[str, Any]) -> None:
    """Weights and buffers are equal, dropout drawn in the same order included."""
    by_hand = bare_loop(optimizer, options)
    start = snapshot(tiny_cnn())
    still = set(start) - changed(start, by_hand)  # a bias before a batch-norm has no gradient to speak of
    assert still <= {"stem.0.bias", "layer1.0.bias", "layer2.0.bias"}, "the loop must move weights"
    assert changed(by_hand, tuner_loop(optimizer, options)) == set()


def test_the_comparison_sees_a_small_difference() -> None:
    """With a rate one part in ten thousand off the weights are not equal."""
    assert changed(bare_loop(torch.optim.AdamW, {}), tuner_loop(torch.optim.AdamW, {}, lr=LR * 1.0001))
