"""Small networks with one difficulty each."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """A block: x + down(relu(up(norm(x))))."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Tokens(nn.Module):
    """A tiny vision transformer: class token, positions, blocks, final norm, head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)  # registered first, used last
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Texts(nn.Module):
    """Classifies the mean of token embeddings; the output layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.embed = nn.Linear(8, 3), nn.Embedding(20, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids).mean(1))


class ConvBlock(nn.Module):
    """A residual block of two convolutions with batch-norm."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class SmallResNet(nn.Module):
    """A residual network of two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(ConvBlock(4, 4), ConvBlock(4, 4))
        self.layer2 = nn.Sequential(ConvBlock(4, 8, 2), ConvBlock(8, 8))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(self.drop(x.mean((2, 3))))


def image(batch: int = 2, side: int = 16) -> torch.Tensor:
    """Return a batch of images for `Tokens` and `SmallResNet`."""
    return torch.randn(batch, 3, side, side)
