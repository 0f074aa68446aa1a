"""Groups of tokens on a grid: adjacent ones (windows) or ones at a fixed interval (dilated windows)."""

from __future__ import annotations

import torch
from torch import Tensor


def to_groups(x: Tensor, size: int, interval: int = 1) -> Tensor:
    """[batch, height, width, dim] -> [batch * groups, size * size, dim]; height and width are multiples of size * interval.

    With interval 1 a group is a window of size x size neighbours. With interval I it holds every I-th token of a
    (size * I) x (size * I) window, in both directions, and there are I * I groups a window.
    """
    b, h, w, c = x.shape
    span = size * interval
    x = x.reshape(b, h // span, size, interval, w // span, size, interval, c)
    return x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, size * size, c)


def from_groups(x: Tensor, size: int, height: int, width: int, interval: int = 1) -> Tensor:
    """The inverse of `to_groups`: [batch * groups, size * size, dim] -> [batch, height, width, dim]."""
    span = size * interval
    x = x.reshape(-1, height // span, width // span, interval, interval, size, size, x.shape[-1])
    return x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(-1, height, width, x.shape[-1])


def relative_offsets(size: int) -> tuple[Tensor, Tensor]:
    """The (2 size - 1)^2 offsets [offsets, 2] (dy, dx) between tokens of a window, and which of them each pair has: int64 [size^2,
    size^2]."""
    steps = torch.arange(1 - size, size)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(-1, 2)
    place = torch.arange(size)
    y, x = (t.reshape(-1) for t in torch.meshgrid(place, place, indexing="ij"))
    index = (y[:, None] - y[None] + size - 1) * (2 * size - 1) + (x[:, None] - x[None] + size - 1)
    return offsets.float(), index
