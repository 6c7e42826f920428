"""A small pretrained-like network, its layer map written by hand, and images to feed it."""

import copy
import functools

import torch
from torch import nn

from layerwise.layers.layermap import LayerGroup, LayerMap


class Net(nn.Module):
    """Four conv-bn stages, average pooling, dropout, linear output."""

    def __init__(self, classes=4, widths=(8, 12, 16, 24), norm=True):
        super().__init__()
        before = 3
        for i, width in enumerate(widths):
            parts = [nn.Conv2d(before, width, 3, stride=1 + (i > 0), padding=1, bias=not norm)]
            parts += [nn.BatchNorm2d(width)] if norm else []
            self.add_module(f"stage{i}", nn.Sequential(*parts, nn.ReLU()))
            before = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        for i in range(4):
            x = getattr(self, f"stage{i}")(x)
        return self.fc(self.dropout(self.pool(x)))


def map_of(model):
    """The layer map of a `Net`, written by hand."""
    groups = [
        *((f"stage{i}", "stem" if i == 0 else "trunk", (f"stage{i}",)) for i in range(4)),
        ("fc", "head", ("pool", "dropout", "fc")),
    ]
    return LayerMap(
        groups=tuple(
            LayerGroup(
                name,
                role,
                modules,
                tuple(n for n, _ in model.named_parameters() if n.split(".")[0] == name),
                sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] == name),
            )
            for name, role, modules in groups
        ),
        granularity="stages",
        model_class="Net",
        outputs=("fc",),
    )


def images(n, seed=0, size=24, classes=4):
    """Smooth coloured blobs whose place depends on the label: float[n, 3, size, size], int[n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    coarse = torch.randn(n, 3, 5, 5, generator=generator) * 0.7
    for i, label in enumerate(labels.tolist()):
        coarse[i, label % 3, 1 + label % 3, 1 + label // 2] += 3
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic"), labels


def pretrained(norm=True, seed=0, widths=(8, 12, 16, 24)):
    """A `Net` trained for some steps on `images`, so that its running statistics describe them.

    It is trained once, and copied; torch's random numbers go on as after the training.
    """
    model, random_state = _trained(norm, seed, widths)
    torch.set_rng_state(random_state)
    return copy.deepcopy(model)


@functools.cache
def _trained(norm, seed, widths):
    torch.manual_seed(seed)
    model = Net(norm=norm, widths=widths)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    x, y = images(256, seed=100)
    model.train()
    for step in range(60):
        part = torch.arange(step * 32, step * 32 + 32) % 256
        loss = nn.functional.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if norm:  # the exact statistics of the final weights
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None
        with torch.no_grad():
            for part in x.split(64):
                model(part)
        for module in norms:
            module.momentum = 0.1
    return model.eval(), torch.get_rng_state()
