"""Inception Transformer (Si et al., NeurIPS 2022, arXiv 2205.12956).

The inception mixer splits channels among three paths: max-pooling and a depthwise convolution for high frequencies, attention over
pooled tokens for low ones. A "frequency ramp" gives attention more of the channels the deeper the block.
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
from formarium.nn.maps import Pointwise
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier


class HighMixer(nn.Module):
    """Half of the channels through 1x1 and depthwise 3x3 convolutions, half through 3x3 max-pooling and a 1x1 convolution; both widths
    double.

    x: float [batch, h, w, dim]. Returns [batch, h, w, 2 dim] (eq. 2-4).
    """

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.widen_conv = Pointwise(half, 2 * half, bias=False)
        self.depthwise = nn.Conv2d(2 * half, 2 * half, 3, padding=1, groups=2 * half, bias=False)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.widen_pool = Pointwise(half, 2 * half)

    def forward(self, x: Tensor) -> Tensor:
        half = self.widen_pool.in_channels
        convolved = self.depthwise(self.widen_conv(x[..., :half]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        pooled = self.widen_pool(self.pool(x[..., half:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return F.gelu(torch.cat([convolved, pooled], dim=-1))


class LowMixer(nn.Module):
    """Attention over tokens that `pool` x `pool` averaging left, brought back to size by repetition (eq. 5). x: float [batch, h, w,
    dim]."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, pool: int):
        super().__init__()
        self.heads, self.pool = heads, pool
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        if self.pool > 1:
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.pool).permute(0, 2, 3, 1)
        grid = x.shape[1:3]
        q, k, v = split_heads(self.qkv(x.flatten(1, 2)), self.heads, 3)
        y = merge_heads(F.scaled_dot_product_attention(q, k, v)).unflatten(1, grid)
        if self.pool > 1:
            y = F.interpolate(y.permute(0, 3, 1, 2), size=(h, w), mode="nearest").permute(0, 2, 3, 1)
        return y


class InceptionMixer(nn.Module):
    """High and low frequencies side by side, fused by y + depthwise 3x3(y) and a 1x1 convolution (eq. 6-7).

    x: float [batch, h, w, dim]. The last attention_heads * (dim / heads) channels go to attention, the first ones to the high mixer.
    """

    def __init__(self, dim: int, heads: int, attention_heads: int, qkv_bias: bool, pool: int):
        super().__init__()
        self.low = attention_heads * (dim // heads)
        self.high = dim - self.low
        fused = self.low + 2 * self.high
        self.high_mixer = HighMixer(self.high)
        self.low_mixer = LowMixer(self.low, attention_heads, qkv_bias, pool)
        self.fuse = nn.Conv2d(fused, fused, 3, padding=1, groups=fused, bias=False)
        self.out = Pointwise(fused, dim)
        self.register_buffer("identity", F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.high_mixer(x[..., : self.high]), self.low_mixer(x[..., self.high :])], dim=-1)
        kernel = self.fuse.weight + self.identity  # the residual, inside the convolution
        y = F.conv2d(y.permute(0, 3, 1, 2), kernel, padding=1, groups=self.fuse.groups)
        return self.out(y.permute(0, 2, 3, 1))


class Block(nn.Module):
    """x + mixer(LN x), x + MLP(LN x), each scaled per channel in the stages that have layer scale. x: float [batch, h, w, dim]."""

    def __init__(self, dim: int, mixer: InceptionMixer, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(self.norm1(x))
        x = x + self.drop(mixed if self.scale1 is None else self.scale1 * mixed)
        fed = self.mlp(self.norm2(x))
        return self.tap(x + self.drop(fed if self.scale2 is None else self.scale2 * fed))


class Stage(nn.Module):
    """Strided convolution(s) with BatchNorm, a position table (resized to other grids), blocks. A map in, [batch, h, w, dim] out."""

    def __init__(self, embed: nn.Module, dim: int, side: tuple[int, int], blocks: list[Block]):
        super().__init__()
        self.embed, self.side = embed, side
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *side, dim), std=0.02))
        self.tokens = Tap("grid")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        x = self.tokens(x + resize_table(self.positions.flatten(1, 2), self.side, grid).unflatten(1, grid))
        for block in self.blocks:
            x = block(x)
        return x


class IFormer(ImageClassifier):
    dynamic_size = True

    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (96, 192, 320, 384)
        depths: tuple[int, ...] = (3, 3, 9, 3)
        heads: tuple[int, ...] = (3, 6, 10, 12)
        attention_heads: tuple[int, ...] = (1,) * 3 + (3,) * 3 + (7,) * 4 + (9,) * 5 + (11,) * 3  # a block each: the frequency ramp
        pools: tuple[int, ...] = (2, 2, 1, 1)
        layer_scales: tuple[float | None, ...] = (None, None, 1e-6, 1e-6)  # as released, stages 1 and 2 have none (0 in a card)
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        stem_stride: int = 4
        image_size: int | tuple[int, int] = 224  # of the position tables
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0

    def __init__(self, config: Config):
        super().__init__(config)
        c, stages, n = config, [], 0
        if len(c.attention_heads) != sum(c.depths):
            raise BadInput("attention_heads", expected=f"{sum(c.depths)} numbers, one a block", got=str(len(c.attention_heads)))
        rates = drop_path_rates(c.drop_path, c.depths)
        sides = [size // c.stem_stride for size in self.image_size]
        for i, dim in enumerate(c.dims):
            embed = (
                nn.Sequential(nn.Conv2d(c.dims[i - 1], dim, 3, 2, 1), nn.BatchNorm2d(dim)) if i else stem(c.in_channels, dim, c.stem_stride)
            )
            blocks = []
            for j in range(c.depths[i]):
                mixer = InceptionMixer(dim, c.heads[i], c.attention_heads[n + j], c.qkv_bias, c.pools[i])
                blocks.append(Block(dim, mixer, c.mlp_ratio, rates[i][j], c.layer_scales[i] or None))
            stages.append(Stage(embed, dim, (sides[0], sides[1]), blocks))
            n += c.depths[i]
            sides = [max(1, side // 2) for side in sides]
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(c.dims[-1], eps=1e-6)
        self.features = Tap("grid")
        self.head = nn.Linear(c.dims[-1], c.num_classes)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, channels, height, width] to logits [batch, classes]."""
        x = self._run(image)[-1]
        return self.head(self.features(self.norm(x)).mean((1, 2)))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dims[i], h, w] at strides 4, 8, 16, 32, as each stage leaves them."""
        return tuple(x.permute(0, 3, 1, 2) for x in self._run(image))

    def _run(self, image: Tensor) -> list[Tensor]:
        out, x = [], image.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            out.append(stage(x))
            x = out[-1].permute(0, 3, 1, 2)
        return out

    def check_size(self, height: int, width: int) -> None:
        least = self.config.stem_stride * max(p * 2**i for i, p in enumerate(self.config.pools))
        if min(height, width) < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="resize the image")


def stem(in_channels: int, dim: int, stride: int) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm, GELU between; the second halves the resolution where the stride is 4."""
    first, second = nn.Conv2d(in_channels, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, stride // 2, 1)
    return nn.Sequential(first, nn.BatchNorm2d(dim // 2), nn.GELU(), second, nn.BatchNorm2d(dim))
