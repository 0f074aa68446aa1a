"""Sine and cosine positions, sines at even channels and cosines at odd ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(dim: int, temperature: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """float [dim / 2], 1 falling to 1 / temperature geometrically."""
    return temperature ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def waves(place: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """The code of positions float [...]: float [..., dim], even dim."""
    angle = place[..., None] * frequencies(dim, temperature, place.device)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def sinusoid_table(length: int, dim: int, temperature: float = 10000.0) -> Tensor:
    """float [length, dim] for positions 0, 1, ... (Vaswani et al. 2017)."""
    return waves(torch.arange(length, dtype=torch.float32), dim, temperature)


def image_waves(padding: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Codes of an image's places, x in the first half of the channels and y in the second, both from 0 to 2 pi over what isn't padding.

    padding: bool [batch, height, width]. Returns float [batch, height, width, dim].
    """
    inside = (~padding).float()
    y, x = inside.cumsum(1), inside.cumsum(2)
    y = y / (y[:, -1:] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([waves(x, dim // 2, temperature), waves(y, dim // 2, temperature)], -1)
