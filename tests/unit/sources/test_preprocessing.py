"""Preprocessing is plain data, and gives the very pixels that the model's own library gives."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import models

from layerwise.errors import DataError, ModelError
from layerwise.sources.preprocessing import (
    AUGMENTS,
    Preprocessing,
    from_image_processor,
    from_timm,
    from_torchvision,
)


def picture(width=330, height=250, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "convnext_atto"]
)
@pytest.mark.parametrize("size", [None, 128])
def test_pixels_equal_timms(name, size):
    model = timm.create_model(name)
    options = {} if size is None else {"input_size": (3, size, size)}
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(options, model=model))
    assert torch.equal(from_timm(model, size).transform()(picture()), theirs(picture()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_b_16", "efficientnet_b0", "inception_v3"])
def test_pixels_equal_torchvisions(name):
    entry = models.get_model_weights(name).DEFAULT
    ours = from_torchvision(entry)
    assert torch.equal(ours.transform()(picture()), entry.transforms()(picture()))


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "ConvNextImageProcessor", "CLIPImageProcessor"])
def test_pixels_agree_with_an_image_processor(kind):
    transformers = pytest.importorskip("transformers")
    options = {} if kind == "ViTImageProcessor" else {"size": {"shortest_edge": 224}}
    processor = getattr(transformers, kind)(**options)
    ours = from_image_processor(processor.to_dict())
    image = picture(320, 256)  # of a shape from which an even number of pixels is cropped
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    got = ours.transform()(image)
    assert got.shape == theirs.shape
    # They resize 8-bit tensors, we Pillow images: each of two passes may round one step of 255 differently.
    steps = (got - theirs).abs() * 255 * torch.tensor(ours.std)[:, None, None]
    assert steps.max() < 2.01
    assert (steps > 0.5).float().mean() < 0.01


def test_old_image_processor_files_are_read():
    square = from_image_processor({"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert (square.crop, square.resize, square.mean) == ((224, 224), (224, 224), (0.5, 0.5, 0.5))
    cropped = from_image_processor({"size": 256, "do_center_crop": True, "crop_size": 224})
    assert (cropped.crop, cropped.resize) == ((224, 224), 256)


def test_an_unclear_image_processor_is_an_error():
    with pytest.raises(ModelError, match="expected 'height' and 'width', or 'shortest_edge'"):
        from_image_processor({"size": {"longest_edge": 512}})


def test_json_round_trip():
    for settings in (
        Preprocessing(crop=(224, 200), resize=256, interpolation="bicubic"),
        Preprocessing(crop=(64, 64), resize=(70, 80), mean=(0.5,), std=(0.25,)),
        Preprocessing(crop=(64, 64), resize=None),
    ):
        assert Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_unknown_keys_and_values_are_reported_together():
    with pytest.raises(DataError, match="keys"):
        Preprocessing.from_dict({"crop": [2, 2]})
    with pytest.raises(DataError) as caught:
        Preprocessing(crop=(0, 4), resize=4, mean=(0.5, 0.5), std=(0.0, 1.0), interpolation="cubic")
    for part in ("mean has 2", "std is (0.0, 1.0)", "crop is (0, 4)", "interpolation is 'cubic'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_every_augmentation_gives_inputs_and_pickles(augment):
    settings = Preprocessing(crop=(32, 48), resize=50)
    transform = pickle.loads(pickle.dumps(settings.transform(augment)))
    torch.manual_seed(0)
    first = transform(picture())
    assert first.shape == settings.input_size
    assert first.dtype == torch.float32
    draws = [transform(picture()) for _ in range(8)]
    assert all(torch.equal(first, draw) for draw in draws) == (augment == "none")
    torch.manual_seed(0)
    assert torch.equal(transform(picture()), first)  # all randomness is torch's


def test_unknown_augmentation():
    with pytest.raises(DataError, match="Did you mean 'randaugment'"):
        Preprocessing(crop=(32, 32), resize=32).transform("randaug")
