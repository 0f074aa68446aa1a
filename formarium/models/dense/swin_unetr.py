"""Swin UNETR (Hatamizadeh et al., BrainLes 2021, arXiv 2201.01266): a Swin encoder on voxels, a residual U-Net decoder.

Tokens are patches of 2 voxels a side; four stages of shifted-window attention halve the grid and double the width. The patch embedding and
each stage's output, normalised, go through residual convolutions as skips at 1/2 .. 1/32; the raw volume is the skip at full resolution.
Each voxel gets one logit a region (overlapping regions, sigmoid) or a class (softmax), trained by the soft Dice loss

    L = 1 - 2 sum(p g) / (sum p^2 + sum g^2),   the mean over channels                       (section 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import WindowAttention, offsets
from formarium.tasks.medical_segmentation.model import VolumeSegmenter

STRIDE = 32  # of the deepest map
# starts of the eight interleaved sub-grids, in the order that each flavour of merging concatenates them
OCTANTS = {
    "merging": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)],
    "mergingv2": offsets(3),
    "merging_before_2025": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)],
}
QUADRANTS = [(0, 0), (1, 0), (0, 1), (1, 1)]


def convolution(c: SwinUNETR.Config) -> type[nn.Module]:
    return nn.Conv3d if c.spatial_dims == 3 else nn.Conv2d


def norm_of(c: SwinUNETR.Config, channels: int, kind: str = "") -> nn.Module:
    """The normalisation of a convolution's output."""
    dims = c.spatial_dims
    match kind or c.norm:
        case "instance":
            return (nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d)(channels, affine=c.norm_affine and not kind)
        case "batch":
            return (nn.BatchNorm3d if dims == 3 else nn.BatchNorm2d)(channels, affine=c.norm_affine)
        case "group":
            return nn.GroupNorm(c.norm_groups, channels, affine=c.norm_affine)
    raise BadInput("norm", expected="instance, batch or group", got=repr(c.norm))


class ResidualConvs(nn.Module):
    """Two 3-convolutions with a shortcut (a 1-convolution where the width changes). x: float [batch, in, *grid] -> [batch, out, *grid]."""

    def __init__(self, c: SwinUNETR.Config, in_channels: int, out: int, kind: str = ""):
        super().__init__()
        conv = convolution(c)
        self.conv1 = conv(in_channels, out, 3, padding=1, bias=False)
        self.conv2 = conv(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = norm_of(c, out, kind), norm_of(c, out, kind)
        self.shortcut = in_channels != out
        if self.shortcut:
            self.conv3 = conv(in_channels, out, 1, bias=False)
            self.norm3 = norm_of(c, out, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        y = self.norm2(self.conv2(y))
        return F.leaky_relu(y + (self.norm3(self.conv3(x)) if self.shortcut else x), 0.01)


class UpBlock(nn.Module):
    """The deeper map enlarged twice, beside the skip, through residual convolutions."""

    def __init__(self, c: SwinUNETR.Config, in_channels: int, out: int):
        super().__init__()
        self.up = (nn.ConvTranspose3d if c.spatial_dims == 3 else nn.ConvTranspose2d)(in_channels, out, 2, stride=2, bias=False)
        self.convs = ResidualConvs(c, 2 * out, out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([self.up(x), skip], 1))


class Block(nn.Module):
    """x + WMSA(LN x), x + MLP(LN x). x: float [batch, *grid, dim].

    Where the grid is no larger than the window along an axis, the window is the grid there and isn't shifted; elsewhere zeros pad the grid
    (after the norm) to whole windows, and take part in attention.
    """

    def __init__(self, c: SwinUNETR.Config, dim: int, heads: int, shifted: bool, drop_path: float):
        super().__init__()
        self.window = window_of(c)
        self.shift = tuple(w // 2 if shifted else 0 for w in self.window)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, self.window, heads, c.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:-1])
        window = tuple(min(w, g) for w, g in zip(self.window, grid, strict=True))
        shift = tuple(0 if g <= w else s for s, w, g in zip(self.shift, self.window, grid, strict=True))
        y, pads = self.norm1(x), [-g % w for g, w in zip(grid, window, strict=True)]
        if any(pads):
            y = F.pad(y, [0, 0, *(side for p in reversed(pads) for side in (0, p))])
        y = self.attention(y, window, shift)
        if any(pads):
            y = y[(slice(None), *(slice(g) for g in grid))]
        x = x + self.drop(y)
        return self.tap(x + self.drop(self.mlp(self.norm2(x))))


class Merging(nn.Module):
    """Neighbours (2 a side) become one token of twice the width. x: float [batch, *grid, dim] -> [batch, *(grid / 2), 2 dim]."""

    def __init__(self, c: SwinUNETR.Config, dim: int):
        super().__init__()
        self.starts: list[tuple[int, ...]] = OCTANTS[c.merging] if c.spatial_dims == 3 else QUADRANTS  # type: ignore[assignment]
        width = dim * 2**c.spatial_dims
        self.norm = nn.LayerNorm(width)
        self.reduction = nn.Linear(width, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        odd = [g % 2 for g in x.shape[1:-1]]
        if any(odd):
            x = F.pad(x, [0, 0, *(side for p in reversed(odd) for side in (0, p))])
        x = torch.cat([x[(slice(None), *(slice(s, None, 2) for s in start))] for start in self.starts], -1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """(v2: residual convolutions,) blocks without and with shift in turn, merging. [batch, *grid, dim] -> [batch, *(grid / 2), 2 dim]."""

    def __init__(self, c: SwinUNETR.Config, number: int, rates: list[float]):
        super().__init__()
        dim = c.feature_size * 2**number
        self.convs = ResidualConvs(c, dim, dim, "instance") if c.v2 else None
        self.blocks = nn.ModuleList([Block(c, dim, c.heads[number], i % 2 == 1, rate) for i, rate in enumerate(rates)])
        self.merge = Merging(c, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.convs is not None:
            x = self.convs(x.movedim(-1, 1).contiguous()).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.merge(x)


class SwinUNETR(VolumeSegmenter):
    @dataclass(frozen=True)
    class Config:
        in_channels: int = 4
        out_channels: int = 3
        regions: tuple[tuple[int, ...], ...] = ()  # labels that make each output channel's region; empty: one class a channel, softmax
        spatial_dims: int = 3
        feature_size: int = 48
        depths: tuple[int, ...] = (2, 2, 2, 2)
        heads: tuple[int, ...] = (3, 6, 12, 24)
        window: int | tuple[int, ...] = 7
        mlp_ratio: float = 4.0
        qkv_bias: bool = True
        norm: str = "instance"  # of the convolutions: instance, batch, group
        norm_affine: bool = False
        norm_groups: int = 8
        normalise: bool = True  # a LayerNorm without parameters on what leaves the encoder
        embed_norm: bool = False
        merging: str = "merging"  # or mergingv2, merging_before_2025 (what released BraTS weights were trained with)
        v2: bool = False  # residual convolutions in front of each stage
        drop_path: float = 0.0
        cross_entropy: float = 0.0  # weight of a cross entropy beside the Dice loss

    def __init__(self, config: Config):
        c = config
        if c.spatial_dims not in (2, 3):
            raise BadInput("spatial_dims", expected="2 or 3", got=str(c.spatial_dims))
        if c.merging not in OCTANTS:
            raise BadInput("merging", expected=", ".join(OCTANTS), got=repr(c.merging))
        if len(c.depths) != 4 or len(c.heads) != 4:
            raise BadInput("depths and heads", expected="four stages", got=f"{len(c.depths)} and {len(c.heads)}")
        super().__init__(c)
        f = c.feature_size
        self.embed = convolution(c)(c.in_channels, f, 2, stride=2)
        self.embed_norm = nn.LayerNorm(f) if c.embed_norm else nn.Identity()
        self.tokens = Tap("grid")
        self.stages = nn.ModuleList([Stage(c, i, rates) for i, rates in enumerate(drop_path_rates(c.drop_path, c.depths))])
        widths = (c.in_channels, f, 2 * f, 4 * f, 16 * f)
        self.encoders = nn.ModuleList([ResidualConvs(c, w, f if i == 0 else w) for i, w in enumerate(widths)])
        ups = ((16, 8), (8, 4), (4, 2), (2, 1), (1, 1))
        self.decoders = nn.ModuleList([UpBlock(c, a * f, b * f) for a, b in ups])
        self.features = Tap("map")
        self.head = convolution(c)(f, c.out_channels, 1)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Five maps [batch, f * 2^i, *(spatial / 2^(i + 1))] for i = 0 .. 4, normalised over channels."""
        x = self.tokens(self.embed_norm(self.embed(image).movedim(1, -1)))
        out = [self._leaving(x)]
        for stage in self.stages:
            x = stage(x)
            out.append(self._leaving(x))
        return out

    def _leaving(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]) if self.config.normalise else x
        return x.movedim(-1, 1).contiguous()

    def forward(self, image: Tensor) -> Tensor:
        """float [batch, channels, *spatial], sides multiples of 32, to logits [batch, out_channels, *spatial]."""
        x0, x1, x2, x3, x4 = self.encode(image)
        raw, first, second, third, deepest = self.encoders
        skips = (x3, third(x2), second(x1), first(x0), raw(image))
        y = deepest(x4)
        for decoder, skip in zip(self.decoders, skips, strict=True):
            y = decoder(y, skip)
        return self.head(self.features(y))

    def no_weight_decay(self) -> set[str]:
        return {"*.table"}

    def check_size(self, *sides: int) -> None:
        if any(s % STRIDE for s in sides):
            raise BadInput("image size", expected=f"sides that are multiples of {STRIDE}", got="x".join(map(str, sides)), fix="predict")
        if max(sides) < 2 * STRIDE:  # the deepest map would be one voxel, which has no deviation to divide by
            raise BadInput("image size", expected=f"a side of at least {2 * STRIDE}", got="x".join(map(str, sides)))


def window_of(c: Any) -> tuple[int, ...]:
    return (c.window,) * c.spatial_dims if isinstance(c.window, int) else tuple(c.window)
