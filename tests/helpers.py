"""Small models with hand-made layer maps, for tests that need no recording."""

from __future__ import annotations

import torch
from torch import nn

from layerwise.layers.layermap import LayerGroup, LayerMap


def map_by_children(model: nn.Module, *, granularity: str = "stages", root: str = "") -> LayerMap:
    """Return a map with one group per child of `model` that has parameters; stem first, head last.

    A shared parameter stands at its first use, its other names are aliases.
    """
    prefix = f"{root}." if root else ""
    seen: dict[int, str] = {}
    aliases: dict[str, str] = {}
    groups: list[LayerGroup] = []
    children = list(model.named_children())
    weighted = [name for name, child in children if any(True for _ in child.parameters())]
    pending: list[str] = []
    for name, child in children:
        pending.append(prefix + name)
        if name not in weighted:
            continue
        own: dict[str, nn.Parameter] = {}
        for local, parameter in child.named_parameters(prefix=prefix + name, remove_duplicate=False):
            if id(parameter) in seen:
                aliases[local] = seen[id(parameter)]
            else:
                seen[id(parameter)] = local
                own[local] = parameter
        role = "head" if name == weighted[-1] else "stem" if name == weighted[0] else "trunk"
        groups.append(
            LayerGroup(
                name=prefix + name,
                role=role,  # type: ignore[arg-type]
                modules=tuple(pending),
                parameters=tuple(own),
                numel=sum(parameter.numel() for parameter in own.values()),
                sizes=tuple(parameter.numel() for parameter in own.values()),
            )
        )
        pending = []
    return LayerMap(
        groups=tuple(groups),
        granularity=granularity,  # type: ignore[arg-type]
        model_class=f"{type(model).__module__}.{type(model).__qualname__}",
        aliases=aliases,
        outputs=(groups[-1].name,),
    )


def named_map(*names: str, granularity: str = "stages", numel: int = 10) -> LayerMap:
    """Return a map of groups `names` with a weight and a bias each, of no model at all."""
    last = len(names) - 1
    return LayerMap(
        groups=tuple(
            LayerGroup(
                name=name,
                role="head" if index == last else "stem" if index == 0 else "trunk",
                modules=(name,),
                parameters=(f"{name}.weight", f"{name}.bias"),
                numel=numel * (index + 1),
            )
            for index, name in enumerate(names)
        ),
        granularity=granularity,  # type: ignore[arg-type]
        outputs=(names[-1],),
    )


def resnet_map() -> LayerMap:
    """Return a map with the group names of a ResNet's stages."""
    return named_map("stem", "layer1", "layer2", "layer3", "layer4", "fc")


def tiny_mlp(*, width: int = 6, blocks: int = 3, classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Return Linear-ReLU blocks ``b0 .. b{n-1}`` and a linear ``head``, for input of `width` numbers."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for index in range(blocks):
        model.add_module(f"b{index}", nn.Sequential(nn.Linear(width, width), nn.ReLU()))
    model.add_module("head", nn.Linear(width, classes))
    return model


class TinyCNN(nn.Module):
    """Stem, two blocks with batch-norm and dropout, a linear head; input (batch, 3, 8, 8)."""

    def __init__(self, classes: int = 4, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2)
        )
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.layer2(self.layer1(self.stem(images)))  # (batch, width, 8, 8)
        logits: torch.Tensor = self.fc(self.flatten(self.pool(features)))
        return logits


def tiny_cnn(seed: int = 0) -> TinyCNN:
    torch.manual_seed(seed)
    return TinyCNN()


def batches(
    count: int, shape: tuple[int, ...], *, classes: int, size: int = 8, seed: int = 1
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `count` random batches ``(inputs (size, *shape), labels (size,))``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters and buffers of `module`."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Return the names whose tensors are not bit for bit equal."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
