"""Blocks of the plain vision transformers that dense backbones are built around: ViT's, with global or windowed attention, and BEiT's.

All work on tokens [batch, h w, dim], row-major over a grid (h, w), without class tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.nn.attention import SelfAttention, biased_attention, merge_heads, split_heads
from formarium.nn.drop import DropPath
from formarium.nn.maps import LayerNorm2d, map_to_tokens, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.ops.activations import gelu
from formarium.nn.windows import from_groups, relative_offsets, to_groups

Grid = tuple[int, int]


class GridAttention(SelfAttention):
    """Self-attention among all tokens of a grid (window 0), or within windows of window x window tokens (Li et al., "Exploring Plain
    Vision Transformer Backbones for Object Detection", ECCV 2022).

    Where a side is no multiple of the window's, zeros are put beside the queries, keys and values; they are attended to like any other.
    x: float [batch, h w, dim]. Returns the same shape.
    """

    def __init__(self, dim: int, heads: int, window: int = 0, qkv_bias: bool = True):
        super().__init__(dim, heads, qkv_bias)
        self.window = window

    def forward(self, x: Tensor, grid: Grid) -> Tensor:  # type: ignore[override]
        if not self.window:
            return super().forward(x)
        qkv, full = padded(self.qkv(x), grid, self.window)
        q, k, v = split_heads(to_groups(qkv, self.window), self.heads, 3)
        y = from_groups(merge_heads(F.scaled_dot_product_attention(q, k, v)), self.window, *full)
        return self.out(y[:, : grid[0], : grid[1]].flatten(1, 2))


class BEiTAttention(nn.Module):
    """Self-attention in windows with a bias for each relative place (BEiT, Bao et al., ICLR 2022); keys have no bias.

    Zeros are put beside the tokens, before the projection. A window as large as the grid is global attention.
    x: float [batch, h w, dim]. Returns the same shape.
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, qkv_bias: bool = True):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if qkv_bias else None for _ in range(2))
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_offsets(window)[1], persistent=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x, full = padded(x, grid, self.window)
        biases = None
        if self.q_bias is not None and self.v_bias is not None:
            biases = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        q, k, v = split_heads(F.linear(to_groups(x, self.window), self.qkv.weight, biases), self.heads, 3)
        bias = self.bias_table[self.index].permute(2, 0, 1)[None].to(q.dtype)  # 1 heads n n
        y = from_groups(merge_heads(biased_attention(q, k, v, bias)), self.window, *full)
        return self.out(y[:, : grid[0], : grid[1]].flatten(1, 2))


def padded(x: Tensor, grid: Grid, window: int) -> tuple[Tensor, Grid]:
    """Tokens [batch, h w, dim] as a map [batch, height, width, dim] whose sides the window divides, zeros at its right and bottom."""
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -grid[1] % window, 0, -grid[0] % window))
    return x, (x.shape[1], x.shape[2])


class Bottleneck(nn.Module):
    """x + (1x1, 3x3, 1x1 convolutions to half the width and back, each followed by LayerNorm, GELU between): tokens in, tokens out."""

    def __init__(self, dim: int):
        super().__init__()
        widths = (dim, dim // 2, dim // 2, dim)
        kernels = (1, 3, 1)
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], k, padding=k // 2, bias=False) for i, k in enumerate(kernels))
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in widths[1:])
        nn.init.zeros_(self.norms[2].weight)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        y = tokens_to_map(x, grid)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y)) if i == 2 else gelu(norm(conv(y)))
        return x + map_to_tokens(y)


class TrunkBlock(nn.Module):
    """Pre-norm: x + s1 * attention(LN x), then x + s2 * MLP(LN x), with a scale per channel where `scale` gives its initial value; and
    a convolutional bottleneck after them where asked for. x: float [batch, h w, dim]. Returns the same shape."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: float, drop_path: float, scale: float | None = None, bottleneck: bool = False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), scale)) if scale is not None else None for _ in range(2))
        self.bottleneck = Bottleneck(dim) if bottleneck else None
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.add(x, self.attention(self.norm1(x), grid), self.scale1)
        x = self.add(x, self.mlp(self.norm2(x)), self.scale2)
        if self.bottleneck is not None:
            x = self.bottleneck(x, grid)
        return self.tap(x, grid=grid)

    def add(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        return x + self.drop(y) if scale is None else torch.addcmul(x, self.drop(y), scale)
