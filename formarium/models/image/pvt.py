"""Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv 2102.12122).

Four stages of tokens at strides 4, 8, 16, 32. Keys and values are first shrunk by a strided convolution (spatial reduction,
eq. 2-3), so attention costs N * N / r^2 instead of N * N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import PatchConv
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier

Grid = tuple[int, int]


class SpatialReductionAttention(nn.Module):
    """Queries at full resolution, keys and values at 1/r of it (eq. 2-3).

    x: float [batch, tokens, dim], row-major over `grid` = (height, width). Returns the same shape.
    """

    def __init__(self, dim: int, heads: int, reduction: int, qkv_bias: bool = True):
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        if reduction > 1:
            self.shrink = PatchConv(dim, dim, reduction)
            self.shrink_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (q,) = split_heads(self.q(x), self.heads)
        k, v = split_heads(self.kv(self.reduce(x, grid)), self.heads, 2)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        """The tokens that become keys and values: [batch, tokens / r^2, dim]."""
        if self.reduction == 1:
            return x
        shrunk = self.shrink(x.transpose(1, 2).unflatten(2, grid))
        return self.shrink_norm(shrunk.flatten(2).transpose(1, 2))


class Block(nn.Module):
    """Pre-norm: x + SRA(LN x), then x + MLP(LN x). x: float [batch, prefix + h w, dim]."""

    def __init__(self, c: PVT.Config, stage: int, drop_path: float, prefix: int):
        super().__init__()
        dim = c.dims[stage]
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attention = SpatialReductionAttention(dim, c.heads[stage], c.reductions[stage], c.qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = MLP(dim, int(dim * c.mlp_ratios[stage]))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=prefix)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), grid))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x, grid=grid)


class Stage(nn.Module):
    """Patch embedding (a convolution whose kernel is its stride), a learned position table, blocks.

    forward: a map [batch, in_dim, height, width] to tokens [batch, prefix + h w, dim] and their grid (h, w).
    """

    def __init__(self, in_dim: int, dim: int, patch: int, grid: Grid, table_prefix: int, prefix: int, blocks: list[Block], first: bool):
        super().__init__()
        self.grid, self.table_prefix, self.first = grid, table_prefix, first
        self.embed = PatchConv(in_dim, dim, patch)
        self.embed_norm = nn.LayerNorm(dim)
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, table_prefix + grid[0] * grid[1], dim), std=0.02))
        self.tokens = Tap(prefix=prefix)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cls_token: Tensor | None = None) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = self.embed_norm(x.flatten(2).transpose(1, 2))  # b (h w) c
        table = self.positions[:, self.table_prefix :]
        fits = self.first and isinstance(x.shape[1], int) and x.shape[1] == table.shape[1]  # as released, whatever the grid's shape
        x = x + (table if fits else resize_table(table, self.grid, grid))
        if cls_token is not None:  # its own entry of the table is never resized
            x = torch.cat([(cls_token + self.positions[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.tokens(x, grid=grid)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class PVT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 320, 512)
        depths: tuple[int, ...] = (2, 2, 2, 2)
        heads: tuple[int, ...] = (1, 2, 5, 8)
        reductions: tuple[int, ...] = (8, 4, 2, 1)
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
        patch_sizes: tuple[int, ...] = (4, 2, 2, 2)
        qkv_bias: bool = True
        norm_eps: float = 1e-6
        image_size: int | tuple[int, int] = 224  # of the position tables; they are resized for other sizes
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # no class token, norm or head: forward gives the pyramid

    def __init__(self, config: Config):
        super().__init__(config)
        c, last = config, len(config.dims) - 1
        rates = drop_path_rates(c.drop_path, c.depths)
        height, width = self.image_size
        stages = []
        for i, dim in enumerate(c.dims):
            height, width = height // c.patch_sizes[i], width // c.patch_sizes[i]
            prefix = int(i == last and not c.dense)
            blocks = [Block(c, i, rate, prefix) for rate in rates[i]]
            in_dim = c.dims[i - 1] if i else c.in_channels
            # the dense backbone, too, has the class token's entry in its last table: unused there, but in the released weights
            stages.append(Stage(in_dim, dim, c.patch_sizes[i], (height, width), int(i == last), prefix, blocks, i == 0))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.dims[-1]), std=0.02))
            self.norm = nn.LayerNorm(c.dims[-1], eps=c.norm_eps)
            self.features = Tap(prefix=1)
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width], sides multiples of 32, to logits [batch, classes] (or the pyramid)."""
        if self.config.dense:
            return self.pyramid(image)
        tokens, grid = self._run(image)[-1]
        return self.head(self.features(self.norm(tokens), grid=grid)[:, 0])

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Four maps [batch, dims[i], height / stride, width / stride] at strides 4, 8, 16, 32."""
        return tuple(to_map(tokens, grid) for tokens, grid in self._run(image))

    def _run(self, image: Tensor) -> list[tuple[Tensor, Grid]]:
        out, x = [], image
        for stage in self.stages:
            cls_token = None if self.config.dense or stage is not self.stages[-1] else self.cls_token
            out.append(stage(x, cls_token))
            x = to_map(*out[-1])
        return out

    @property
    def dynamic_size(self) -> int:
        """An exported graph takes sides that are multiples of this."""
        return math.prod(self.config.patch_sizes)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def check_size(self, height: int, width: int) -> None:
        stride = math.prod(self.config.patch_sizes)
        reduced = max(stride, *(math.prod(self.config.patch_sizes[: i + 1]) * r for i, r in enumerate(self.config.reductions)))
        if height < reduced or width < reduced:
            raise BadInput("image size", expected=f"at least {reduced}x{reduced}", got=f"{height}x{width}", fix="resize the image")


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """The grid tokens (the last h * w ones) as a map [batch, dim, h, w]."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
