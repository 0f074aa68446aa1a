"""What Swin's shifted windows and DETR's padded maps need: the mask after a cyclic shift, sine positions within the unpadded part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from formarium.nn import nd_windows
from formarium.nn.kept import kept


@kept(64)
def shift_mask(grid: tuple[int, int], size: int, shift: int, device: torch.device) -> Tensor:
    """float [windows, size^2, size^2]: -100 between tokens that only the cyclic shift made neighbours."""
    return nd_windows.shift_mask(grid, (size, size), (shift, shift)).to(device)


def sine_positions(padding: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the places in the unpadded part, scaled to 2 pi: padding bool [batch, h, w] to float [batch, h w, dim]."""
    inside, half = ~padding, dim // 2
    y, x = inside.cumsum(1, dtype=torch.float32), inside.cumsum(2, dtype=torch.float32)
    y, x = (2 * math.pi * a / (last + 1e-6) for a, last in ((y, y[:, -1:]), (x, x[:, :, -1:])))
    index = torch.arange(half, device=padding.device)
    scale = 10000.0 ** (2 * (index // 2).float() / half)

    def waves(a: Tensor) -> Tensor:
        a = a[..., None] / scale
        return torch.stack([a[..., 0::2].sin(), a[..., 1::2].cos()], -1).flatten(-2)

    return torch.cat([waves(y), waves(x)], -1).flatten(1, 2)
