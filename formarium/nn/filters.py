"""Filtering images: one kernel over a mirrored border, OpenCV's Gaussian, and unsharp masking as Real-ESRGAN sharpens its clean images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.kept import kept
from formarium.nn.tiling import reflected

MANY = 81  # taps from which on a product of spectra is faster than a convolution


def filter2d(image: Tensor, kernel: Tensor) -> Tensor:
    """Each channel correlated with one kernel; beyond the border the image is mirrored (the edge itself isn't repeated), however small.

    image: float [batch, channels, height, width]. kernel: float [rows, columns], both odd. Returns the image's shape.
    """
    h, w = image.shape[2:]
    rows, columns = (mirrored(side, k // 2).to(image.device) for side, k in zip((h, w), kernel.shape, strict=True))
    padded = image.index_select(2, rows).index_select(3, columns)
    kernel = kernel.to(image)
    if kernel.numel() <= MANY:
        return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view(image.shape)
    sides = [-(-side // 32) * 32 for side in padded.shape[2:]]  # of small factors
    spectrum = torch.fft.rfft2(padded.float(), s=sides) * torch.fft.rfft2(kernel.flip(0, 1).float(), s=sides)
    found = torch.fft.irfft2(spectrum, s=sides)[..., kernel.shape[0] - 1 :, kernel.shape[1] - 1 :]
    return found[..., :h, :w].to(image.dtype)


@kept(256)
def mirrored(side: int, pad: int) -> Tensor:
    """Indices into 0 .. side - 1 for positions -pad .. side + pad - 1: 2 1 0 1 2 1 0 for side 3 and pad 2."""
    return reflected(side, side + pad)[torch.arange(-pad, side + pad).abs()]


@kept(16)
def gaussian_kernel(size: int, sigma: float = 0.0) -> Tensor:
    """float32 [size, size], odd, of sum 1; without a sigma the one OpenCV takes for that size, 0.15 size + 0.35."""
    sigma = sigma or 0.15 * size + 0.35
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    taps = torch.exp(-(place**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    return (taps[:, None] * taps).float()


def usm_sharpen(image: Tensor, amount: float = 0.5, size: int = 51, threshold: float = 10.0) -> Tensor:
    """Unsharp masking: `amount` of what a blur takes away is added where that is more than `threshold` (of 255); the mask is blurred too.

    image: float [batch, channels, height, width] in [0, 1]. Returns the same shape, in [0, 1].
    """
    kernel = gaussian_kernel(size)
    detail = image - filter2d(image, kernel)
    mask = filter2d((detail.abs() * 255 > threshold).to(image.dtype), kernel).clamp(0, 1)
    return torch.lerp(image, (image + amount * detail).clamp(0, 1), mask)
