"""What a pass on fake tensors computes, and what it decides without computing."""

import torch
from torch import nn

from layer_nets import SmallResNet, image
from layerwise.layers.recording import record


def test_fake_pass_computes_nothing() -> None:
    # a layer whose product would need terabytes is recorded
    recording = record(nn.Linear(4, 4), (torch.empty(2**38, 4, device="meta"),))
    assert recording.how == "fake"
    assert recording.ops[0].flops == 2 * 2**38 * 4 * 4


def test_meta_model_with_real_buffer_is_recorded() -> None:
    # a model on meta may hold buffers with values; half of it being real is no device error
    net = SmallResNet()
    net.to("meta")
    net.register_buffer("scale", torch.ones(3, 1, 1))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x * self.net.scale + torch.arange(3, device=x.device).view(3, 1, 1))

    recording = record(Scaled(), (image(),), mode="eval")
    assert recording.unread == ()


def test_known_mask_indexes_fake_features() -> None:
    # BART's x[eos_mask] has as many rows as the mask has true elements, known from real ids
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.embed(ids)[ids.eq(2), :].view(len(ids), -1, 4)[:, -1])

    with torch.device("meta"):
        net = Picks()
    recording = record(net, (torch.tensor([[1, 2], [3, 2]]),))
    assert recording.how == "fake"
    assert tuple(recording.output.shape) == (2, 2)
