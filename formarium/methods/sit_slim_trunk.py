"""LV-ViT (Jiang et al., NeurIPS 2021), the network that SiT slims: a ViT with a convolutional stem and damped residual branches.

    x + attention(LN x) / lambda,  x + MLP(LN x) / lambda      lambda 2 or 3

Of its token labelling only the second head is left, frozen and unread, which the released weights have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier

Grid = tuple[int, int]
# (share of the width, stride) of each 3x3 convolution of the stem
STEMS = {"4c": ((8, 2), (4, 2), (2, 2), (1, 2)), "6c": ((8, 2), (8, 1), (8, 1), (4, 2), (2, 2), (1, 2))}


class Stem(nn.Module):
    """3x3 convolutions without bias, BatchNorm, GELU between them. image [batch, channels, h, w] -> [batch, dim, h / 16, w / 16]."""

    def __init__(self, in_channels: int, dim: int, layers: tuple[tuple[int, int], ...]):
        super().__init__()
        widths = [in_channels, *(dim // share for share, _ in layers)]
        self.convs = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False) for i, (_, stride) in enumerate(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(F.gelu(x) if i else x))
        return x


class Attention(nn.Module):
    """Multi-head self-attention whose logits may be scaled by another factor. x: float [batch, tokens, dim]; answers to the first
    `asked` tokens, or to all."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, scale: float | None):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, asked: int | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.out(merge_heads(F.scaled_dot_product_attention(q[:, :, :asked], k, v, scale=self.scale)))


class Block(nn.Module):
    """x: float [batch, 1 + patches, dim]. With `asked`, only the first tokens come out, unless somebody reads the others."""

    def __init__(self, c: LVViT.Config, drop_path: float):
        super().__init__()
        self.damping = 1 / c.skip_lam
        self.norm1 = nn.LayerNorm(c.dim)
        self.attention = Attention(c.dim, c.heads, c.qkv_bias, c.qk_scale)
        self.norm2 = nn.LayerNorm(c.dim)
        self.mlp = MLP(c.dim, int(c.dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=1)

    def forward(self, x: Tensor, grid: Grid | None, asked: int | None = None) -> Tensor:
        if self.tap.watch is not None:
            asked = None
        x = torch.add(x[:, :asked], self.drop(self.attention(self.norm1(x), asked)), alpha=self.damping)
        return self.tap(torch.add(x, self.drop(self.mlp(self.norm2(x))), alpha=self.damping), grid=grid)


class LVViT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        image_size: int | tuple[int, int] = 224
        patch_size: int = 16
        dim: int = 384
        depth: int = 16
        heads: int = 6
        mlp_ratio: float = 3.0
        stem: str = "4c"  # "4c" or "6c" convolutions, or "patch": one whose kernel is its stride
        skip_lam: float = 2.0  # what residual branches are divided by
        qkv_bias: bool = False
        qk_scale: float | None = None  # of the logits; None: 1 / sqrt(width of a head)
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, (height, width) = config, self.image_size
        if c.stem in STEMS and c.patch_size != 16:
            raise BadInput("patch_size", expected=f"16, the stride of the {c.stem} stem", got=str(c.patch_size), fix='stem="patch"')
        self.grid = (height // c.patch_size, width // c.patch_size)
        naive = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.embed = Stem(c.in_channels, c.dim, STEMS[c.stem]) if c.stem in STEMS else naive
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.dim), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + self.grid[0] * self.grid[1], c.dim), std=0.02))
        self.tokens = Tap(prefix=1)
        self.blocks = nn.ModuleList(Block(c, rate) for rate in drop_path_rates(c.drop_path, (c.depth,))[0])
        self.norm = nn.LayerNorm(c.dim)
        self.features = Tap(prefix=1)
        if not c.dense:
            self.head = nn.Linear(c.dim, c.num_classes)
            self.aux_head = nn.Linear(c.dim, c.num_classes).requires_grad_(False)  # nothing reads it
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (the map if dense)."""
        if self.config.dense:
            return self.pyramid(image)
        x, grid = self._run(image, None if self.features.watch is not None else 1)
        return self.head(self.features(self.norm(x), grid=grid)[:, 0])

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """The one map there is, [batch, dim, height / patch, width / patch], after the last norm."""
        x, grid = self._run(image, None)
        return (self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid),)

    def _run(self, image: Tensor, asked: int | None) -> tuple[Tensor, Grid]:
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        table = torch.cat([self.positions[:, :1], resize_table(self.positions[:, 1:], self.grid, grid, "bicubic")], 1)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = self.tokens(x + table, grid=grid)
        for i, block in enumerate(self.blocks):
            x = block(x, grid, asked if i == len(self.blocks) - 1 else None)
        return x, grid

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "positions"}

    def check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise BadInput("image size", expected=f"multiples of {patch}", got=f"{height}x{width}", fix="pad or resize the image")
