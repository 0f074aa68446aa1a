"""Views of images for self-supervision, made for a whole batch at once: random resized crops (bicubic), flips, colour, blur, solarising.

Random numbers come from torch's generator of the images' device; every image gets its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class View:
    """How one kind of view is made (DINO's augmentation). scale: share of the image's area. blur, solarise: probabilities."""

    size: int
    scale: tuple[float, float]
    blur: float = 0.0
    solarise: float = 0.0
    jitter: float = 0.8
    grey: float = 0.2
    vertical_flip: float = 0.0
    strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue


def make_view(images: Tensor, view: View) -> Tensor:
    """float [batch, 3, h, w] in [0, 1] -> [batch, 3, size, size] in [0, 1]."""
    x = random_crop(images, view.size, view.scale, vertical_flip=view.vertical_flip)
    if view.jitter and x.shape[1] == 3:
        x = torch.where(chance(x, view.jitter), colour_jitter(x, view.strength), x)
    if view.grey and x.shape[1] == 3:
        x = torch.where(chance(x, view.grey), luma(x).expand_as(x), x)
    if view.blur:
        x = torch.where(chance(x, view.blur), blur(x), x)
    if view.solarise:
        x = torch.where(chance(x, view.solarise) & (x >= 128 / 255), 1 - x, x)
    return x


def chance(x: Tensor, probability: float) -> Tensor:
    """bool [batch, 1, 1, 1]."""
    return torch.rand(len(x), 1, 1, 1, device=x.device) < probability


def between(x: Tensor, low: float, high: float) -> Tensor:
    """Uniform float [batch, 1, 1, 1]."""
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, device=x.device)


def random_crop(images: Tensor, size: int, scale: tuple[float, float], ratio: float = 4 / 3, vertical_flip: float = 0.0) -> Tensor:
    """A rectangle of a random share of the area, sides' ratio log-uniform in [1 / ratio, ratio], resized bicubically to size x size and
    mirrored half of the time. Values stay in [0, 1]."""
    b, _, h, w = images.shape
    area, aspect = between(images, *scale), between(images, -math.log(ratio), math.log(ratio)).exp()
    across = (area * aspect * h / w).sqrt().clamp(max=1).view(b)  # shares of the width and the height
    down = (area / aspect * w / h).sqrt().clamp(max=1).view(b)
    x = (torch.rand(b, device=images.device) * 2 - 1) * (1 - across)
    y = (torch.rand(b, device=images.device) * 2 - 1) * (1 - down)
    mirror = 1 - 2 * (torch.rand(b, device=images.device) < 0.5).float()
    upside = 1 - 2 * (torch.rand(b, device=images.device) < vertical_flip).float()
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([across * mirror, zero, x], 1), torch.stack([zero, down * upside, y], 1)], 1)
    grid = F.affine_grid(theta, [b, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)


def luma(x: Tensor) -> Tensor:
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def colour_jitter(x: Tensor, strength: tuple[float, float, float, float]) -> Tensor:
    """Brightness, contrast, saturation and hue, each by a random factor; hue is a turn about the grey axis in YIQ."""
    brightness, contrast, saturation, hue = strength
    x = (x * between(x, 1 - brightness, 1 + brightness)).clamp(0, 1)
    grey = luma(x).mean((2, 3), keepdim=True)
    x = (grey + (x - grey) * between(x, 1 - contrast, 1 + contrast)).clamp(0, 1)
    grey = luma(x)
    x = (grey + (x - grey) * between(x, 1 - saturation, 1 + saturation)).clamp(0, 1)
    to = x.new_tensor([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = between(x, -hue, hue).view(-1) * 2 * math.pi
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    return torch.einsum("bij,bjhw->bihw", torch.linalg.inv(to) @ turn @ to, x).clamp(0, 1)


def blur(x: Tensor, sigma: tuple[float, float] = (0.1, 2.0), radius: int = 4) -> Tensor:
    """A Gaussian of random width a sample, 9 x 9 taps (fewer on small images)."""
    radius = min(radius, x.shape[2] - 1, x.shape[3] - 1)
    at = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-(at**2) / (2 * between(x, *sigma).view(-1, 1) ** 2)).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)  # b taps
    b, c, h, w = x.shape
    kernel = kernel.repeat_interleave(c, 0)
    flat = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, b * c, h + 2 * radius, w + 2 * radius)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=b * c)
    return F.conv2d(flat, kernel[:, None, None, :], groups=b * c).view(b, c, h, w)
