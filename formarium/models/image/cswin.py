"""CSWin Transformer: Cross-Shaped Windows (Dong et al., CVPR 2022, arXiv 2107.00652).

Half of the heads attend inside horizontal stripes of the image, the other half inside vertical ones: together a cross-shaped window
that reaches from
edge to edge, at a cost that the stripe's width sets, narrow in early stages and wide in late ones (eq. 1-3). Position comes from a
depthwise convolution of the values inside each stripe, added to what attention gives (locally-enhanced positional encoding, LePE, eq. 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.tasks.image_classification.model import ImageClassifier


class StripeAttention(nn.Module):
    """Attention inside horizontal stripes of `width` rows (None: the whole image), plus LePE.

    qkv: float [batch, rows, columns, 3, dim]. Returns [batch, rows, columns, dim]. Rows that no stripe fills are padded with zeros on
    both sides,
    which take part in the softmax, as in the reference. Vertical stripes are horizontal ones of the transposed image: inside a stripe
    attention doesn't ask for an order, and LePE's kernel is read transposed.
    """

    def __init__(self, dim: int, heads: int, width: int | None, vertical: bool = False):
        super().__init__()
        self.heads, self.width, self.vertical = heads, width, vertical
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Tensor) -> Tensor:
        if self.vertical:
            return self._horizontal(qkv.transpose(1, 2), self.lepe.weight.transpose(2, 3)).transpose(1, 2)
        return self._horizontal(qkv, self.lepe.weight)

    def _horizontal(self, qkv: Tensor, kernel: Tensor) -> Tensor:
        b, rows, columns, _, dim = qkv.shape
        width = self.width or rows
        lack = -rows % width
        if lack:
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, lack // 2, lack - lack // 2))
        q, k, v = (
            qkv.reshape(-1, width * columns, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )  # stripes heads tokens d
        values = v.transpose(1, 2).reshape(-1, width, columns, dim).permute(0, 3, 1, 2)  # stripes dim width columns, channels-last
        near = F.conv2d(values, kernel, self.lepe.bias, padding=1, groups=dim).permute(0, 2, 3, 1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(near.shape) + near
        return out.reshape(b, -1, columns, dim)[:, lack // 2 : lack // 2 + rows]


class Block(nn.Module):
    """x + cross-shaped attention(LN x), then x + MLP(LN x). x: float [batch, height, width, dim]."""

    def __init__(self, dim: int, heads: int, stripe: int | None, mlp_ratio: float, qkv_bias: bool, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if stripe is None:  # one group of heads that sees everything
            self.attention = nn.ModuleList([StripeAttention(dim, heads, None)])
        else:
            self.attention = nn.ModuleList(StripeAttention(dim // 2, heads // 2, stripe, vertical) for vertical in (True, False))
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1))  # b h w 3 c
        groups = qkv.chunk(len(self.attention), dim=-1)
        seen = [attention(group) for attention, group in zip(self.attention, groups, strict=True)]
        x = x + self.drop(self.out(torch.cat(seen, dim=-1) if len(seen) > 1 else seen[0]))
        return self.tap(x + self.drop(self.mlp(self.norm2(x))))


class Stage(nn.Module):
    """An overlapping convolution that makes (or halves) the tokens, LayerNorm, blocks. x: a map [batch, in_dim, h, w]; returns [batch,
    h', w', dim]."""

    def __init__(self, embed: nn.Conv2d, blocks: list[Block]):
        super().__init__()
        self.embed = embed
        self.embed_norm = nn.LayerNorm(embed.out_channels)
        self.tokens = Tap("grid")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.embed_norm(self.embed(x).permute(0, 2, 3, 1)))
        for block in self.blocks:
            x = block(x)
        return x


class CSWin(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 256, 512)
        depths: tuple[int, ...] = (1, 2, 21, 1)
        heads: tuple[int, ...] = (2, 4, 8, 16)
        stripes: tuple[int, ...] = (1, 2, 7, 7)  # a stripe's width in tokens, by stage; the last stage sees the whole image
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        patch_kernel: int = 7
        patch_stride: int = 4
        image_size: int = 224  # a stage whose grid at this size is one stripe wide sees the whole image with one group of heads
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, stages, last = config, [], len(config.dims) - 1
        rates = drop_path_rates(c.drop_path, c.depths)
        for i, dim in enumerate(c.dims):
            if i:
                embed = nn.Conv2d(c.dims[i - 1], dim, 3, 2, 1)
            else:
                embed = nn.Conv2d(c.in_channels, dim, c.patch_kernel, c.patch_stride, (c.patch_kernel - c.patch_stride + 1) // 2)
            grid = c.image_size // (c.patch_stride * 2**i)
            whole = i == last or (grid == c.stripes[i] and not c.dense)
            stripe = None if whole else c.stripes[i]
            stages.append(Stage(embed, [Block(dim, c.heads[i], stripe, c.mlp_ratio, c.qkv_bias, rate) for rate in rates[i]]))
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in (c.dims if c.dense else c.dims[-1:]))
        if not c.dense:
            self.features = Tap("grid")
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        return self.head(self.features(self.norms[-1](self._run(image)[-1])).mean((1, 2)))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dims[i], h, w] at strides 4, 8, 16, 32: each normalised where dense, only the last in a classifier."""
        grids = self._run(image)
        plain = len(grids) - len(self.norms)
        normed = [*grids[:plain], *(norm(x) for norm, x in zip(self.norms, grids[plain:], strict=True))]
        return tuple(x.permute(0, 3, 1, 2) for x in normed)

    def _run(self, image: Tensor) -> list[Tensor]:
        out, x = [], image
        for stage in self.stages:
            out.append(stage(x))
            x = out[-1].permute(0, 3, 1, 2)
        return out

    def check_size(self, height: int, width: int) -> None:
        least = self.config.patch_kernel
        if min(height, width) < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="resize the image")
