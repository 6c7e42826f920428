"""Small networks and runs that the tests of the peers' faults share."""

from __future__ import annotations

import torch
from torch import nn

import layerwise


class BackboneNet(nn.Module):
    """What Lightning's BackboneFinetuning expects: `backbone` with batch-norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        with torch.no_grad():  # statistics of another domain than the test's images
            self.backbone[1].running_mean.fill_(3.0)
            self.backbone[1].running_var.fill_(9.0)

    def forward(self, x):
        return self.head(self.backbone(x))


def images(batch_size: int = 16) -> torch.Tensor:
    return torch.randn(batch_size, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def tuned(model: nn.Module, plan_of=layerwise.linear_probe, example=None, **options):
    """Return a Tuner that has taken over `model`, made the way the README says."""
    layers = layerwise.layer_map(model, images(2) if example is None else example)
    plan = plan_of(layers, **options)
    return layerwise.Tuner(model, plan, torch.optim.AdamW, lr=1e-2, steps_per_epoch=2, layers=layers)


def run(tuner, model: nn.Module, inputs=None) -> None:
    """Carry the plan out, calling model.train() at every step as the worst of the trainers do."""
    for _ in tuner.epochs():
        for _ in range(2):
            model.train()
            model(images() if inputs is None else inputs).square().mean().backward()
            tuner.step()


def grave(report) -> set[str]:
    """Return the codes of all findings above info."""
    return {finding.code for finding in report if finding.severity != "info"}
