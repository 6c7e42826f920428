"""A network and data of a few numbers, with a layer map written by hand, for tests of the loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.plans.plan import Plan


class Tiny(nn.Module):
    """Two blocks with batch-norm and dropout, and a head."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def tiny_layers(model: nn.Module) -> LayerMap:
    """Return the map of `Tiny`: stem, body, head."""
    groups = []
    roles = {"stem": "stem", "body": "trunk", "head": "head"}
    for name, role in roles.items():
        parameters = [f"{name}.{own}" for own, _ in model.get_submodule(name).named_parameters()]
        sizes = [model.get_parameter(parameter).numel() for parameter in parameters]
        groups.append(
            LayerGroup(
                name=name,
                role=role,  # type: ignore[arg-type]
                modules=(name,),
                parameters=tuple(parameters),
                numel=sum(sizes),
            )
        )
    return LayerMap(groups=tuple(groups), granularity="blocks", model_class="Tiny", outputs=("head",))


def tiny_data(count: int = 50, *, seed: int = 1, classes: int = 3) -> TensorDataset:
    """Return samples whose class can be learned."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long() * (classes > 2))


def tiny_plan(**changes: object) -> Plan:
    """Return two phases: the head for two epochs, then body and head with warm-up for two."""
    return Plan.model_validate(
        {
            "granularity": "blocks",
            "groups": ["stem", "body", "head"],
            "phases": [
                {"name": "head", "rates": {"head": 1.0}, "epochs": 2},
                {
                    "name": "more",
                    "rates": {"body": 0.5, "head": 1.0},
                    "epochs": 2,
                    "schedule": {"shape": "cosine", "warmup_steps": 3},
                    "join_steps": 4,
                },
            ],
            **changes,
        }
    )
