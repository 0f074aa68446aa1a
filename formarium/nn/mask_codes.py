"""Instance masks as short vectors: the lowest coefficients of a discrete cosine transform of the mask in its box (DCT-Mask, CVPR 2021)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.kept import kept


@lru_cache(maxsize=8)
def zigzag(size: int, keep: int) -> tuple[tuple[int, int], ...]:
    """The first `keep` places (row, column) of a size x size matrix in zigzag order from its upper left corner."""
    out: list[tuple[int, int]] = []
    for s in range(2 * size - 1):
        rows = [r for r in range(s + 1) if r < size and s - r < size]
        out += [(r, s - r) for r in (reversed(rows) if s % 2 == 0 else rows)]
        if len(out) >= keep:
            break
    return tuple(out[:keep])


@kept(8)
def cosines(size: int, rows: int) -> Tensor:
    """The first rows of the orthonormal DCT-II matrix, float32 [rows, size]."""
    k, n = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    table = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    table[0] /= math.sqrt(2)
    return table.float()


def encode_masks(masks: Tensor, keep: int) -> Tensor:
    """Square masks [n, size, size] in [0, 1] to their codes, float32 [n, keep]."""
    places = zigzag(masks.shape[-1], keep)
    rows = 1 + max(max(p) for p in places)
    c = cosines(masks.shape[-1], rows).to(masks.device)
    r, s = (torch.tensor([p[i] for p in places], device=masks.device) for i in (0, 1))
    return (c @ masks.float() @ c.T)[:, r, s]


def decode_masks(codes: Tensor, size: int) -> Tensor:
    """Codes [..., keep] to masks bool [..., size, size]: the inverse transform, cut half way between its least and its largest value."""
    places = zigzag(size, codes.shape[-1])
    rows = 1 + max(max(p) for p in places)
    c = cosines(size, rows).to(codes.device)
    r, s = (torch.tensor([p[i] for p in places], device=codes.device) for i in (0, 1))
    table = codes.new_zeros(*codes.shape[:-1], rows, rows, dtype=torch.float32)
    table[..., r, s] = codes.float()
    soft = c.T @ table @ c
    return soft > (soft.amax((-2, -1), keepdim=True) + soft.amin((-2, -1), keepdim=True)) / 2


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Masks [n, height, width] cut to their boxes [n, 4] (left, top, right, bottom, in pixels) and resized: bool [n, size, size].

    As RoIAlign does: each of the size x size bins is the mean of bilinear samples, about one a pixel; above a half counts as inside.
    """
    n, height, width = masks.shape
    if not n:
        return masks.new_zeros(0, size, size, dtype=torch.bool)
    extent = (boxes[:, 2:] - boxes[:, :2]).max().item()
    per_bin = max(1, min(8, math.ceil(extent / size)))
    step = (torch.arange(size * per_bin, device=masks.device) + 0.5) / (size * per_bin)
    x = boxes[:, None, 0] + step * (boxes[:, 2] - boxes[:, 0])[:, None]
    y = boxes[:, None, 1] + step * (boxes[:, 3] - boxes[:, 1])[:, None]
    grid = torch.stack(
        [(2 * x / width - 1)[:, None].expand(-1, len(step), -1), (2 * y / height - 1)[:, :, None].expand(-1, -1, len(step))], -1
    )
    sampled = F.grid_sample(masks[:, None].float(), grid.float(), padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, per_bin)[:, 0] >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks [n, size, size] into their boxes [n, 4] (left, top, right, bottom, in pixels) of an image: bool [n, height, width]."""
    if not len(masks):
        return masks.new_zeros(0, height, width, dtype=torch.bool)
    left, top, right, bottom = boxes.float().unbind(1)
    x = (torch.arange(width, device=boxes.device) + 0.5 - left[:, None]) / (right - left).clamp_min(1e-6)[:, None] * 2 - 1
    y = (torch.arange(height, device=boxes.device) + 0.5 - top[:, None]) / (bottom - top).clamp_min(1e-6)[:, None] * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0] >= 0.5
