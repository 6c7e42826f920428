"""Each input figure against a picture whose value is known, and against what it must not react to."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from layerwise.choosing import inputs
from layerwise.errors import DataError


def pictures(n=20, size=64, seed=0):
    """Pictures with the spectrum of natural ones: amplitude falls with frequency; float[n, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    fall = 1 / (rows**2 + columns**2).sqrt().clamp(min=1 / size)
    white = torch.fft.rfft2(torch.randn(n, 3, size, size, generator=generator))
    found = torch.fft.irfft2(white * fall, s=(size, size))
    return found / found.std((1, 2, 3), keepdim=True)


def enlarged(x, times):
    small = nn.functional.interpolate(x, scale_factor=1 / times, mode="area")
    return nn.functional.interpolate(small, size=x.shape[2:], mode="bicubic")


def test_brightness_and_contrast_of_a_chequered_board():
    # half 1 and half 3: mean 2, standard deviation 1
    board = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2 * 2.0 + 1
    image = board.expand(1, 3, 8, 8)
    assert inputs.brightness(image).item() == pytest.approx(2)
    assert inputs.contrast(image).item() == pytest.approx(1)
    assert inputs.colour(image).item() == 0


def test_noise_is_the_standard_deviation_that_was_added():
    # on a ramp, which the filter does not see, white noise of 0.1 is found within 5 %
    ramp = torch.linspace(-1, 1, 128).expand(4, 1, 128, 128)
    noisy = ramp + 0.1 * torch.randn(4, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    found = inputs.noise(noisy) * inputs.contrast(noisy)
    np.testing.assert_allclose(found.numpy(), 0.1, rtol=0.05)
    assert inputs.noise(ramp).max() < 1e-5


def test_resolution_of_an_enlarged_picture_is_its_share():
    # enlarged twice and four times: about a half and a quarter
    x = pictures()
    sharp, twice, four = (inputs.resolution(enlarged(x, k) if k > 1 else x).mean().item() for k in (1, 2, 4))
    assert sharp > 0.8
    assert twice / sharp == pytest.approx(1 / 2, abs=0.12)
    assert four / sharp == pytest.approx(1 / 4, abs=0.08)


def test_blur_lowers_sharpness():
    # each stronger blur is less sharp, and the contrast hardly changes
    x = pictures()
    blurred = [x, nn.functional.avg_pool2d(x, 3, 1, 1), nn.functional.avg_pool2d(x, 7, 1, 3)]
    values = [inputs.sharpness(b).mean().item() for b in blurred]
    assert values[0] > 1.5 * values[1] > 2 * values[2]


@pytest.mark.parametrize("name", ["colour", "sharpness", "resolution", "noise"])
def test_figures_without_unit_ignore_brightness_and_contrast(name):
    # 0.3 x + 1 has the same figure as x
    x = pictures()
    figure = inputs.MEASURES[name]
    torch.testing.assert_close(figure(0.3 * x + 1), figure(x), rtol=2e-2, atol=1e-4)


def test_colour_of_pure_channels():
    # channels 1, 0, 0 with contrast c: the deviation between them is sqrt(2) / 3
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, :4] = 1.0
    expected = 0.5 * math.sqrt(2) / 3 / inputs.contrast(image).item()
    assert inputs.colour(image).item() == pytest.approx(expected)


def test_flat_images_give_finite_figures():
    # one colour everywhere: nothing divides by zero
    for values in inputs.measure_images(torch.full((2, 3, 16, 16), 0.7)).values():
        assert np.isfinite(values).all()
    assert inputs.measure_images(torch.full((2, 3, 16, 16), 0.7))["resolution"].tolist() == [0, 0]


def test_a_blank_image_has_no_colour_whatever_the_channels_are():
    # black is normalised to another value in each channel; one such image must not outweigh all others
    black = torch.tensor([-2.1, -2.0, -1.8])[:, None, None].expand(3, 64, 64)
    values = inputs.measure_images(torch.stack([black, pictures()[0]]))["colour"]
    assert values[0] == 0
    assert values[1] == pytest.approx(inputs.colour(pictures()[:1]).item())


def test_other_shapes_are_refused():
    # a single image without a batch axis
    with pytest.raises(DataError, match=r"\(3, 16, 16\)"):
        inputs.measure_images(torch.ones(3, 16, 16))
