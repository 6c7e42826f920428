"""Layer maps of random networks: what must hold for all of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layer_nets import Residual
from layerwise import layer_map
from layerwise.layers.layermap import GRANULARITIES

WIDTH = 8


class Parallel(nn.Module):
    """The sum of two branches, the second registered first."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.right, self.left = right, left

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


leaves = st.sampled_from(["linear", "norm", "relu", "dropout", "residual"]).map(
    lambda kind: {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "norm": lambda: nn.LayerNorm(WIDTH),
        "relu": nn.ReLU,
        "dropout": nn.Dropout,
        "residual": lambda: Residual(WIDTH),
    }[kind]()
)
nets = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=4).map(lambda parts: nn.Sequential(*parts))
        | st.tuples(inner, inner).map(lambda pair: Parallel(*pair))
    ),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(body=nets, with_head=st.booleans())
def test_every_parameter_stands_in_exactly_one_group(body: nn.Module, with_head: bool) -> None:
    # at every granularity, with unique group names, weight and bias together, and costs that add up
    net = nn.Sequential(nn.Linear(4, WIDTH), body, *([nn.Linear(WIDTH, 3)] if with_head else []))
    flops = set()
    for granularity in GRANULARITIES:
        layers = layer_map(net, torch.zeros(2, 4), granularity)  # type: ignore[arg-type]
        names = [name for group in layers for name in group.parameters]
        assert sorted(names) == sorted(name for name, _ in net.named_parameters())
        assert len(set(layers.names)) == len(layers)
        assert all(group.parameters for group in layers)
        assert layers.numel == sum(p.numel() for p in net.parameters())
        for path, module in net.named_modules():
            own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            assert len({layers.group_of(name) for name in own}) <= 1
        modules = [path for group in layers for path in group.modules]
        assert len(set(modules)) == len(modules)
        flops.add(sum(group.flops or 0 for group in layers))
        if with_head:
            assert layers.head is not None
            assert layers.head is layers.groups[-1]
    assert len(flops) == 1


@settings(max_examples=20, deadline=None)
@given(body=nets)
def test_coarser_groups_are_unions_of_finer_ones(body: nn.Module) -> None:
    # each block lies in one stage
    net = nn.Sequential(nn.Linear(4, WIDTH), body, nn.Linear(WIDTH, 3))
    stages, blocks = (layer_map(net, torch.zeros(2, 4), g) for g in ("stages", "blocks"))  # type: ignore[arg-type]
    for group in blocks:
        assert len({stages.group_of(name) for name in group.parameters}) == 1
