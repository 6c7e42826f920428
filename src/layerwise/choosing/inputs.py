"""What can be measured on raw image tensors, one number an image: which property of the input moved.

Brightness and contrast are in the units of the tensors the model gets (normalised pixels); the other four
have no unit and do not change with brightness and contrast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.choosing.distances import Array
from layerwise.errors import DataError

_LAPLACE = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]
_IMMERKAER = [[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]


def brightness(images: Tensor) -> Tensor:
    """Return the mean of all pixels of each image, float[N]."""
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    """Return the standard deviation of luminance (the mean over channels) over pixels, float[N]."""
    return images.mean(1).flatten(1).std(1, correction=0)


def colour(images: Tensor) -> Tensor:
    """Return the mean standard deviation between channels as a share of the contrast, float[N]; 0 is grey.

    0 for an image of one colour too: it has no contrast to compare with.
    """
    spread, whole = images.std(1, correction=0).flatten(1).mean(1), contrast(images)
    return torch.where(whole > 1e-6, spread / whole.clamp(min=1e-6), 0.0)


def sharpness(images: Tensor) -> Tensor:
    """Return the Laplacian's standard deviation as a share of the contrast, float[N]; blur lowers it.

    Noise raises it, so read it together with `noise`. 0 for an image of one colour.
    """
    luminance = images.mean(1, keepdim=True)
    edges = _filter(luminance, _LAPLACE).flatten(1).std(1, correction=0)
    return edges / contrast(images).clamp(min=1e-6)


def resolution(images: Tensor) -> Tensor:
    """Return up to which frequency an image has detail, float[N], as a share of the highest possible.

    The frequency below which 90 % of the gradient's spectral energy lies, of luminance. (Energy itself
    falls with the square of the frequency in natural images, which the gradient evens out.) An image that
    was enlarged k times has about 1/k of the figure of a sharp one. 0 for an image of one colour.
    """
    luminance = images.mean(1)
    luminance = luminance - luminance.mean(dim=(1, 2), keepdim=True)
    height, width = luminance.shape[1:]
    window = torch.hann_window(height, periodic=False, device=images.device)[:, None] * torch.hann_window(
        width, periodic=False, device=images.device
    )  # without it the jump from one border to the opposite one looks like detail
    power = torch.fft.rfft2(luminance * window).abs() ** 2
    rows = torch.fft.fftfreq(height, device=images.device)[:, None] * 2
    columns = torch.fft.rfftfreq(width, device=images.device)[None] * 2
    radius = (rows**2 + columns**2).sqrt()
    order = radius.flatten().argsort()
    energy = (power * radius**2).flatten(1)[:, order].cumsum(1)
    total = energy[:, -1:]
    reached = (energy < 0.9 * total).sum(1).clamp(max=len(order) - 1)
    found: Tensor = radius.flatten()[order][reached].clamp(max=1) * (total[:, 0] > 1e-9)
    return found


def noise(images: Tensor) -> Tensor:
    """Return an estimate of the standard deviation of white noise as a share of the contrast, float[N].

    ``sqrt(pi / 2) / 6`` times the mean absolute response of a filter that removes constant and linear
    structure; strong fine texture reads as noise.

    Source: Immerkaer 1996 (Fast noise variance estimation).
    """
    response = _filter(images.mean(1, keepdim=True), _IMMERKAER).abs().flatten(1).mean(1)
    return response.mul((torch.pi / 2) ** 0.5 / 6) / contrast(images).clamp(min=1e-6)


def _filter(images: Tensor, kernel: list[list[float]]) -> Tensor:
    return F.conv2d(images, images.new_tensor(kernel)[None, None])


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "colour": colour,
    "sharpness": sharpness,
    "resolution": resolution,
    "noise": noise,
}
"""Name of an input dimension -> function of float[N, C, H, W] that returns float[N]."""


def measure_images(images: Tensor) -> dict[str, Array]:
    """Return every figure of `MEASURES` for a batch of images, float64[N] each.

    Args:
        images: float[N, C, H, W], height and width at least 3.

    Raises:
        DataError: another shape.
    """
    if images.ndim != 4 or min(images.shape[2:]) < 3:
        raise DataError(
            f"images have the shape {tuple(images.shape)}; expected (N, channels, height, width) with sides "
            "of at least 3."
        )
    values = images.detach().float()
    return {name: figure(values).cpu().double().numpy() for name, figure in MEASURES.items()}
