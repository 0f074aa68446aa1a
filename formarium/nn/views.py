"""Random views of image batches, as self-supervised pre-training wants them: crops, colours, blurs, made of whole batches at once.

All take and give float images [batch, channels, height, width] in [0, 1]; what differs between samples is drawn from a torch generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def _uniform(n: int, low: float, high: float, image: Tensor, g: Generator | None) -> Tensor:
    return torch.empty(n, device=image.device).uniform_(low, high, generator=g)


def _often(n: int, probability: float, image: Tensor, g: Generator | None) -> Tensor:
    """bool [n, 1, 1, 1]"""
    return (torch.rand(n, device=image.device, generator=g) < probability).view(-1, 1, 1, 1)


def random_resized_crop(
    image: Tensor,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    generator: Generator | None = None,
) -> Tensor:
    """A crop of each image whose share of the area and aspect ratio are drawn from ranges, resized to the image's size, mirrored with
    probability `flip` (Szegedy et al. 2015). Bilinear."""
    n, _, h, w = image.shape
    area = _uniform(n, scale[0], scale[1], image, generator)
    aspect = _uniform(n, math.log(ratio[0]), math.log(ratio[1]), image, generator).exp() * h / w
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # shares of the sides
    left, top = ((1 - side) * _uniform(n, -1, 1, image, generator) for side in (width, height))
    mirror = torch.where(torch.rand(n, device=image.device, generator=generator) < flip, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=image.device)
    theta[:, 0, 0], theta[:, 0, 2], theta[:, 1, 1], theta[:, 1, 2] = width * mirror, left, height, top
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def grey(image: Tensor) -> Tensor:
    """Luma, [batch, 1, h, w]."""
    if image.shape[1] != 3:
        return image.mean(1, keepdim=True)
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def colour_jitter(image: Tensor, strength: Sequence[float], probability: float, generator: Generator | None = None) -> Tensor:
    """Brightness, contrast and saturation times factors from 1 - strength to 1 + strength, hue turned by up to that share of the circle,
    in this order, for a share of the images. strength: of brightness, contrast, saturation, hue."""
    n, channels = image.shape[:2]
    factors = [_uniform(n, max(0.0, 1 - s), 1 + s, image, generator).view(-1, 1, 1, 1) for s in strength[:3]]
    x = (image * factors[0]).clamp(0, 1)
    x = torch.lerp(grey(x).mean((2, 3), keepdim=True), x, factors[1]).clamp(0, 1)
    x = torch.lerp(grey(x), x, factors[2]).clamp(0, 1)
    if strength[3] and channels == 3:
        x = turn_hue(x, _uniform(n, -strength[3], strength[3], image, generator)).clamp(0, 1)
    return torch.where(_often(n, probability, image, generator), x, image)


def turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """RGB images whose chroma is rotated about the luma axis (YIQ) by `turn` [batch] shares of the circle."""
    to = image.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin = (turn * 2 * math.pi).cos(), (turn * 2 * math.pi).sin()
    rotation = torch.zeros(len(turn), 3, 3, device=image.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1], rotation[:, 1, 2], rotation[:, 2, 1], rotation[:, 2, 2] = cos, -sin, sin, cos
    return torch.einsum("bij,bjhw->bihw", torch.linalg.inv(to) @ rotation @ to, image)


def gaussian_blur(image: Tensor, sigma: Sequence[float], probability: float, generator: Generator | None = None) -> Tensor:
    """Blurred by a deviation drawn from a range, in pixels, for a share of the images."""
    n, c, h, w = image.shape
    if probability == 0:
        return image
    reach = min(max(1, math.ceil(2.5 * sigma[1])), h - 1, w - 1)
    deviation = _uniform(n, sigma[0], sigma[1], image, generator)
    at = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-0.5 * (at / deviation[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (n c) k
    x = F.pad(image, (reach,) * 4, mode="reflect").view(1, n * c, h + 2 * reach, w + 2 * reach)
    x = F.conv2d(F.conv2d(x, kernel[:, None, None], groups=n * c), kernel[:, None, :, None], groups=n * c).view(image.shape)
    return torch.where(_often(n, probability, image, generator), x, image)


def solarise(image: Tensor, probability: float, generator: Generator | None = None) -> Tensor:
    """Values of a half and more turned over, for a share of the images."""
    return torch.where(_often(len(image), probability, image, generator), torch.where(image >= 0.5, 1 - image, image), image)


@dataclass(frozen=True)
class View:
    """One view's augmentations, in this order; `blur_sigma` in pixels of a 224-pixel image."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    hflip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float = 0.0

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        x = random_resized_crop(image, self.crop_scale, flip=self.hflip, generator=generator)
        if self.jitter_probability:
            x = colour_jitter(x, self.jitter, self.jitter_probability, generator)
        if self.grey_probability:
            x = torch.where(_often(len(x), self.grey_probability, x, generator), grey(x).expand_as(x), x)
        size = min(image.shape[2:]) / 224
        x = gaussian_blur(x, [max(1e-2, s * size) for s in self.blur_sigma], self.blur_probability, generator)
        return solarise(x, self.solarise_probability, generator) if self.solarise_probability else x
