"""The two plain trunks that lenses and methods of published papers were made on: ViT (with DeiT's second token) and Swin.

They are image classifiers like those of the catalogue, without a card of their own: a paper's lens or method brings its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import SelfAttention
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import WindowAttention
from formarium.tasks.image_classification.model import ImageClassifier

Grid = tuple[int, int]


# ViT, DeiT ----------------------------------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    """Pre-norm: x + attention(LN x), then x + MLP(LN x). x: float [batch, prefix + h w, dim]."""

    def __init__(self, c: ViT.Config, drop_path: float, prefix: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attention = SelfAttention(c.dim, c.heads, c.qkv_bias)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = MLP(c.dim, int(c.dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=prefix)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return self.tap(x + self.drop(self.mlp(self.norm2(x))), grid=grid)


class ViT(ImageClassifier):
    """Dosovitskiy et al., ICLR 2021; with `distilled`, DeiT's (Touvron et al., ICML 2021): a second token with a classifier of its own,
    the mean of both being the answer. With num_classes 0 it gives the class token's features, float [batch, dim]."""

    @dataclass(frozen=True)
    class Config:
        image_size: int | tuple[int, int] = 224
        patch_size: int = 16
        dim: int = 768
        depth: int = 12
        heads: int = 12
        mlp_ratio: float = 4
        qkv_bias: bool = True
        norm_eps: float = 1e-6
        distilled: bool = False
        resize_offset: float = 0.0  # added to the grid before the position table's scale is taken; DINO's code has 0.1
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # the map of the last block, no classifier

    def __init__(self, config: Config):
        super().__init__(config)
        c, prefix = config, 1 + config.distilled
        height, width = self.image_size
        self.grid = (height // c.patch_size, width // c.patch_size)
        self.embed = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, prefix, c.dim))
        self.positions = nn.Parameter(torch.zeros(1, prefix + self.grid[0] * self.grid[1], c.dim))
        self.tokens = Tap(prefix=prefix)
        self.blocks = nn.ModuleList(ViTBlock(c, rate, prefix) for rate in drop_path_rates(c.drop_path, (c.depth,))[0])
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.features = Tap(prefix=prefix)
        if c.num_classes and not c.dense:
            self.head = nn.Linear(c.dim, c.num_classes)
            if c.distilled:
                self.head_distilled = nn.Linear(c.dim, c.num_classes)
        init_transformer(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (class features without classes, maps if dense)."""
        x, grid = self.embedded(image)
        for block in self.blocks:
            x = block(x, grid)
        x = self.features(self.norm(x), grid=grid)
        if self.config.dense:
            return (x[:, self.cls_token.shape[1] :].transpose(1, 2).unflatten(2, grid),)
        if not self.config.num_classes:
            return x[:, 0]
        if self.config.distilled:
            return (self.head(x[:, 0]) + self.head_distilled(x[:, 1])) / 2
        return self.head(x[:, 0])

    def embedded(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Tokens with their positions, class tokens first; the grid of the others."""
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.tokens(x + self.positions_on(grid), grid=grid), grid

    def positions_on(self, grid: Grid) -> Tensor:
        """The position table on a grid, resized bicubically where that isn't its own: float [1, prefix + h w, dim]."""
        if grid == self.grid:
            return self.positions
        prefix, offset = self.cls_token.shape[1], self.config.resize_offset
        table = self.positions[:, prefix:].transpose(1, 2).unflatten(2, self.grid)
        if offset:
            scale = tuple((new + offset) / old for new, old in zip(grid, self.grid, strict=True))
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        else:
            table = F.interpolate(table, size=grid, mode="bicubic")
        return torch.cat([self.positions[:, :prefix], table.flatten(2).transpose(1, 2)], 1)

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """The one map there is, [batch, dim, height / patch, width / patch], after the last norm."""
        x, grid = self.embedded(image)
        for block in self.blocks:
            x = block(x, grid)
        return (self.norm(x)[:, self.cls_token.shape[1] :].transpose(1, 2).unflatten(2, grid),)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "positions"}

    def check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise BadInput("image size", expected=f"multiples of {patch}", got=f"{height}x{width}", fix="pad or resize the image")


# Swin ---------------------------------------------------------------------------------------------------------------


class SwinBlock(nn.Module):
    """Attention in windows, every other block in shifted ones. x: float [batch, h, w, dim]. Returns the same shape."""

    def __init__(self, dim: int, heads: int, window: int, shifted: bool, mlp_ratio: float, eps: float, drop_path: float):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = WindowAttention(dim, (window, window), heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        side = min(self.window, h, w)
        y = F.pad(self.norm1(x), (0, 0, 0, -w % side, 0, -h % side))
        shift = side // 2 if self.shifted and min(h, w) > self.window else 0
        y = self.attention(y, (side, side), (shift, shift))[:, :h, :w]
        x = x + self.drop(y)
        return self.tap(x + self.drop(self.mlp(self.norm2(x))))


class Merge(nn.Module):
    """2x2 neighbours side by side, LayerNorm, a projection to twice the channels: [batch, h, w, dim] -> [batch, h/2, w/2, 2 dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduce(self.norm(x))


class SwinStage(nn.Module):
    def __init__(self, blocks: list[SwinBlock], merge: Merge | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the next stage gets, and what this one gives before merging."""
        for block in self.blocks:
            x = block(x)
        return (self.merge(x) if self.merge is not None else x), x


class Swin(ImageClassifier):
    """Swin Transformer (Liu et al., ICCV 2021): four stages of window attention, the tokens' mean as the answer's features."""

    @dataclass(frozen=True)
    class Config:
        image_size: int | tuple[int, int] = 224
        patch_size: int = 4
        dim: int = 128
        depths: tuple[int, ...] = (2, 2, 18, 2)
        heads: tuple[int, ...] = (4, 8, 16, 32)
        window: int = 7
        mlp_ratio: float = 4
        norm_eps: float = 1e-5
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, rates = config, drop_path_rates(config.drop_path, config.depths)
        self.embed = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.embed_norm = nn.LayerNorm(c.dim)
        self.tokens = Tap("grid")
        stages = []
        for i, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
            dim = c.dim * 2**i
            blocks = [SwinBlock(dim, heads, c.window, j % 2 == 1, c.mlp_ratio, c.norm_eps, rates[i][j]) for j in range(depth)]
            stages.append(SwinStage(blocks, Merge(dim) if i + 1 < len(c.depths) else None))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            dim = c.dim * 2 ** (len(c.depths) - 1)
            self.norm = nn.LayerNorm(dim, eps=c.norm_eps)
            self.features = Tap("grid")
            self.head = nn.Linear(dim, c.num_classes)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (the pyramid if dense)."""
        maps = self._maps(image)
        if self.config.dense:
            return tuple(m.permute(0, 3, 1, 2) for m in maps)
        return self.head(self.features(self.norm(maps[-1])).mean((1, 2)))

    def _maps(self, image: Tensor) -> list[Tensor]:
        p = self.config.patch_size
        image = F.pad(image, (0, -image.shape[3] % p, 0, -image.shape[2] % p))
        x, out = self.tokens(self.embed_norm(self.embed(image).permute(0, 2, 3, 1))), []
        for stage in self.stages:
            x, before = stage(x)
            out.append(before)
        return out

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dim 2^i, height / stride, width / stride] of every stage, fine to coarse."""
        return tuple(m.permute(0, 3, 1, 2) for m in self._maps(image))

    def no_weight_decay(self) -> set[str]:
        return {"*.attention.table"}


TRUNKS: dict[str, type[ImageClassifier]] = {"vit": ViT, "swin": Swin}  # by the word that configs have for them
