"""Preprocessing is plain data, and gives the very pixels that the model's own library gives."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import models

from layerwise.errors import DataError, ModelError
from layerwise.sources.image_processors import check_pixels, from_image_processor
from layerwise.sources.preprocessing import (
    AUGMENTS,
    Preprocessing,
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


@pytest.mark.parametrize("size", [(96, 160), (200, 120)])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_oblong_pixels_equal_timms(name, size):
    # timm keeps the ratio of the sides for oblongs too, and so does a preprocessing brought to another size.
    model = timm.create_model(name)
    config = timm.data.resolve_data_config({"input_size": (3, *size)}, model=model)
    theirs = timm.data.create_transform(**config)
    if theirs.transforms[0].interpolation.value != config["interpolation"]:
        pytest.skip("this timm resizes oblongs by another filter than it names")
    for image in (picture(), picture(250, 330), picture(501, 380)):
        got = from_timm(model, size).transform()(image)
        assert torch.equal(got, theirs(image))
        assert not torch.equal(got, picture_squashed(from_timm(model, size))(image))  # the test can fail
    assert from_timm(model).at(size).keep_ratio
    assert pickle.loads(pickle.dumps(from_timm(model, size).transform()))(picture()).shape == (3, *size)


def picture_squashed(settings):
    return dataclasses.replace(settings, keep_ratio=False).transform()


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FILES = {
    "plain": {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}},
    "sparse": {"image_processor_type": "ViTImageProcessor"},
    "old with crop_pct": {
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "crop_pct": 0.875,
        "size": 224,
        "resample": 3,
        **HALF,
    },
    "large ConvNeXt": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
    "crop": {"image_processor_type": "CLIPImageProcessor"},
    "crop only": {"image_processor_type": "CLIPImageProcessor", "do_resize": False},
    "twice by std": {
        "image_processor_type": "EfficientNetImageProcessor",
        "include_top": True,
        "image_std": [0.4, 0.5, 0.6],
        "size": {"height": 224, "width": 224},
    },
    "offset": {
        "image_processor_type": "EfficientNetImageProcessor",
        "include_top": False,
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
        "do_normalize": False,
        "size": {"height": 224, "width": 224},
    },
    "not rescaled": {
        "image_processor_type": "ViTImageProcessor",
        "do_rescale": False,
        "do_normalize": False,
    },
    "other factor": {"image_processor_type": "ViTImageProcessor", "rescale_factor": 1 / 127.5, **HALF},
}


def processor_of(folder, file):
    transformers = pytest.importorskip("transformers")
    (folder / "preprocessor_config.json").write_text(json.dumps(file))
    return transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_pixels_agree_with_an_image_processor(tmp_path, file):
    processor = processor_of(tmp_path, file)
    ours = from_image_processor(processor.to_dict())
    image = picture(320, 256)  # of a shape from which an even number of pixels is cropped
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    got = ours.transform()(image)
    assert got.shape == theirs.shape
    # They resize 8-bit tensors, we Pillow images: each of two passes may round one step of 255 differently.
    steps = (got - theirs).abs() * 255 * torch.tensor(ours.std)[:, None, None]
    assert steps.max() < 2.01
    assert (steps > 0.5).float().mean() < 0.01
    check_pixels(processor, ours)


REFUSED = {
    "MobileViTImageProcessor": ({}, "do_flip_channel_order is True"),
    "PoolFormerImageProcessor": ({}, "crop_pct and do_center_crop"),
    "LevitImageProcessor": ({}, "LevitImageProcessor"),
    "PerceiverImageProcessor": ({}, "PerceiverImageProcessor"),
    "PPLCNetImageProcessor": ({}, "resize_short"),
    "TextNetImageProcessor": ({}, "size_divisor"),
    "DonutImageProcessor": ({}, "do_pad is True"),
    "ViTImageProcessor": ({"size": {"shortest_edge": 224}}, "it does not crop"),
    "CLIPImageProcessor": ({"do_resize": False, "do_center_crop": False}, "neither resizes nor crops"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_processor_does_beyond_is_refused_by_name(tmp_path, kind):
    settings, message = REFUSED[kind]
    if not hasattr(pytest.importorskip("transformers"), kind):
        pytest.skip(f"this transformers has no {kind}")
    processor = processor_of(tmp_path, {"image_processor_type": kind, **settings})
    with pytest.raises(ModelError, match=message) as caught:
        from_image_processor(processor.to_dict())
    assert "Pass preprocessing=" in str(caught.value)


def test_a_processor_with_a_rule_of_its_own_is_found_by_its_pixels(tmp_path):
    # Settings that look plain, from a class that does something else with them.
    for kind in ("LevitImageProcessor", "MobileViTImageProcessor"):
        processor = processor_of(tmp_path, {"image_processor_type": kind})
        plain = {**processor.to_dict(), "image_processor_type": "New", "do_flip_channel_order": False}
        with pytest.raises(ModelError, match="follows a rule of its own"):
            check_pixels(processor, from_image_processor(plain))


def test_a_processor_that_fails_or_makes_another_size_is_refused(tmp_path):
    # its own words are told, or both shapes
    processor = processor_of(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 64})
    settings = from_image_processor(processor.to_dict())
    with pytest.raises(ModelError, match=r"images of shape \(3, 64, 64\) instead of \(3, 32, 32\)"):
        check_pixels(processor, settings.at(32))

    def failing(**options):
        raise ValueError("no such channel")

    with pytest.raises(ModelError, match=r"a picture with 3 channels \(ValueError: no such channel\)"):
        check_pixels(failing, settings)


def test_images_that_are_not_resized_are_cropped_to_any_size():
    # at another size too the pixels are those of the file
    settings = Preprocessing(crop=(64, 64), resize=None, mean=(0.0,) * 3, std=(1.0,) * 3).at(8)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels[1:9, 1:9]).permute(2, 0, 1) / 255
    assert torch.equal(settings.transform()(Image.fromarray(pixels)), expected)


def test_nearest_and_grey_settings_are_kept():
    nearest = from_image_processor({"size": 224, "resample": 0})
    assert nearest.interpolation == "nearest"
    assert from_image_processor({"size": 28, "do_normalize": False}, channels=1).channels == 1
    assert from_image_processor({"size": 28, "do_normalize": False, "image_mean": [0.5]}).channels == 1


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
    for crop, resize in ((224, 256), (224, None), ((3, 224, 224), None), ((8.0, 8.0), 8)):
        with pytest.raises(DataError, match=r"crop is .* resize .*; expected a height and a width"):
            Preprocessing.from_dict({"crop": crop, "resize": resize})
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
