"""Position tables: resizing them to another grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """A learned table [1, old h * old w, channels] on another grid: [1, new h * new w, channels] (align_corners False, no antialiasing)."""
    if all(isinstance(n, int) for n in new) and old == new:  # a graph of open size has no branch: its resize to the same grid is exact
        return table
    grid = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=new, mode=mode, align_corners=False).flatten(2).transpose(1, 2)
