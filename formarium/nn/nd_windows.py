"""Shifted windows on grids of any number of dimensions (Liu et al., "Swin Transformer", ICCV 2021): images, volumes, clips.

Everything here works on channels-last grids [batch, *grid, dim] whose sides are multiples of the window's.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from formarium.nn.attention import biased_attention, merge_heads, split_heads
from formarium.nn.kept import kept

Sides = tuple[int, ...]


def to_windows(x: Tensor, window: Sides) -> Tensor:
    """[batch, *grid, dim] -> [batch * windows, tokens of a window, dim]."""
    b, c, n = x.shape[0], x.shape[-1], len(window)
    cut = [side for g, w in zip(x.shape[1:-1], window, strict=True) for side in (g // w, w)]
    order = [0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), 2 * n + 1]  # windows first, then the places in them
    return x.reshape(b, *cut, c).permute(order).reshape(-1, math.prod(window), c)


def from_windows(x: Tensor, window: Sides, grid: Sides) -> Tensor:
    """The inverse of `to_windows`: [batch * windows, tokens, dim] -> [batch, *grid, dim]."""
    n = len(window)
    x = x.reshape(-1, *(g // w for g, w in zip(grid, window, strict=True)), *window, x.shape[-1])
    order = [0, *(axis for i in range(n) for axis in (1 + i, 1 + n + i)), 2 * n + 1]
    return x.permute(order).reshape(-1, *grid, x.shape[-1])


@kept(64)
def shift_mask(grid: Sides, window: Sides, shift: Sides, value: float = -100.0) -> Tensor:
    """What is added to attention scores in windows of a grid rolled by -shift: `value` between tokens that weren't neighbours before it.

    float32 [windows, tokens, tokens]. An axis with shift 0 divides nothing.
    """
    regions = torch.zeros(grid)
    for axis, (g, w, s) in enumerate(zip(grid, window, shift, strict=True)):
        if s:
            place = torch.arange(g)
            region = (place >= g - w).long() + (place >= g - s).long()
            regions = regions * 3 + region.view([-1 if i == axis else 1 for i in range(len(grid))])
    labels = to_windows(regions[None, ..., None], window)[..., 0]
    return (labels[:, :, None] != labels[:, None, :]).float() * value


def relative_index(window: Sides) -> Tensor:
    """Row of a table of prod(2 w - 1) offsets that each pair (query, key) of a window has: int64 [tokens, tokens]."""
    place = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)  # axes tokens
    index = torch.zeros(place.shape[1], place.shape[1], dtype=torch.int64)
    for axis, w in enumerate(window):
        index = index * (2 * w - 1) + place[axis][:, None] - place[axis][None] + w - 1
    return index


class WindowAttention(nn.Module):
    """Multi-head attention inside (shifted) windows, with a learned bias for each relative offset.

    x: float [batch, *grid, dim], sides multiples of `window`'s. window: of this call, by default the one it was built for; a smaller one
    takes the first entries of the offset table's index. shift: the roll before windows are cut, each 0 or below the window's side.
    Returns the same shape.
    """

    index: Tensor

    def __init__(self, dim: int, window: Sides, heads: int, qkv_bias: bool = True, scale: float | None = None):
        super().__init__()
        self.window, self.heads, self.scale = window, heads, scale
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(math.prod(2 * w - 1 for w in window), heads), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.register_buffer("index", relative_index(window), persistent=False)

    def bias(self, tokens: int) -> Tensor:
        """float [heads, tokens, tokens]"""
        return self.table[self.index[:tokens, :tokens].reshape(-1)].view(tokens, tokens, -1).permute(2, 0, 1)

    def forward(self, x: Tensor, window: Sides | None = None, shift: Sides | None = None) -> Tensor:
        window, grid, batch = window or self.window, tuple(x.shape[1:-1]), x.shape[0]
        axes = tuple(range(1, x.ndim - 1))
        shifted = shift is not None and any(shift)
        if shifted:
            x = torch.roll(x, [-s for s in shift], axes)  # type: ignore[union-attr]
        q, k, v = split_heads(self.qkv(to_windows(x, window)), self.heads, 3)  # (b windows) heads tokens width
        bias = self.bias(q.shape[2])[None].to(q.dtype)
        if shifted:
            mask = shift_mask(grid, window, shift).to(bias)  # type: ignore[arg-type]
            x = masked_attention(q, k, v, bias, mask, batch, self.scale)
        else:
            x = biased_attention(q, k, v, bias, self.scale)
        x = from_windows(self.out(merge_heads(x)), window, grid)
        return torch.roll(x, shift, axes) if shifted else x  # type: ignore[arg-type]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, batch: int, scale: float | None = None) -> Tensor:
    """Attention of [batch * windows, heads, tokens, width] with bias [1, heads, tokens, tokens] and a mask [windows, tokens, tokens]."""
    additive = bias + mask[:, None]  # windows heads tokens tokens
    if torch.compiler.is_compiling():
        additive = additive.repeat(batch, 1, 1, 1)
    elif batch > 1:
        q, k, v = (t.unflatten(0, (-1, len(mask))) for t in (q, k, v))
    y = biased_attention(q, k, v, additive, scale)
    return y.flatten(0, 1) if y.ndim == 5 else y


def offsets(sides: int) -> list[tuple[int, ...]]:
    """Starts (0 or 1 on each axis) of the 2^sides interleaved sub-grids, the last axis fastest."""
    return list(itertools.product(range(2), repeat=sides))
