"""CrossFormer (Wang et al., ICLR 2022, arXiv 2108.00154) and CrossFormer++ (TPAMI 2024, arXiv 2303.06908).

Tokens are made of patches of several sizes around the same centre (cross-scale embedding). Blocks alternate attention among neighbours
(short distance, SDA) with attention among tokens at a fixed interval (long distance, LDA). The position bias of a pair is a small network's
function of its offset (dynamic position bias), so it holds for any group size.
CrossFormer++ lets groups grow with depth and adds an amplitude cooling layer (a depthwise convolution and LayerNorm) after every
third block of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import biased_attention, merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.nn.windows import from_groups, relative_offsets, to_groups
from formarium.tasks.image_classification.model import ImageClassifier

MASKED = -1e6  # what the reference adds to the scores of padding
WIDE = 4  # strides a kernel spans from which on it is computed over blocks of pixels


class DynamicPositionBias(nn.Module):
    """Offsets (dy, dx) [offsets, 2] to a bias a head [offsets, heads]: Linear, then three times LN, ReLU, Linear (section 3.2.2)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.project = nn.Linear(2, dim)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, out)) for out in (dim, dim, heads))

    def forward(self, offsets: Tensor) -> Tensor:
        x = self.project(offsets)
        for layer in self.layers:
            x = layer(x)
        return x


class GroupAttention(nn.Module):
    """Attention inside groups. x: float [batch * groups, size^2, dim]; padding: bool [groups, size^2] or None. Returns x's shape."""

    def __init__(self, dim: int, heads: int, size: int, qkv_bias: bool, position_bias: bool):
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.bias = DynamicPositionBias(dim // 16, heads) if position_bias else None
        if position_bias:
            offsets, index = relative_offsets(size)
            self.register_buffer("offsets", offsets, persistent=False)
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, size: int, padding: Tensor | None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        mask = None if self.bias is None else self.position_bias(size)[None]  # 1 heads n n
        if padding is not None:
            hidden = torch.zeros(padding.shape, dtype=q.dtype, device=x.device).masked_fill(padding, MASKED)[:, None, None]
            mask = (hidden if mask is None else hidden + mask).repeat(x.shape[0] // padding.shape[0], 1, 1, 1)
        return self.out(merge_heads(biased_attention(q, k, v, mask)))

    def position_bias(self, size: int) -> Tensor:
        """float [heads, size^2, size^2]."""
        assert self.bias is not None
        offsets, index = (self.offsets, self.index) if size == self.size else (t.to(self.index.device) for t in relative_offsets(size))
        return self.bias(offsets)[index.reshape(-1)].view(size * size, size * size, -1).permute(2, 0, 1)


class Cooling(nn.Module):
    """Amplitude cooling layer: depthwise 3x3 convolution, LayerNorm, no residual. x: float [batch, h, w, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """x + LSDA(LN x), x + MLP(LN x), cooling where given. x: float [batch, h, w, dim].

    long: LDA with `interval` (None: as many as the grid takes, ceil(side / group)), else SDA. A grid no larger than the group is one group.
    """

    def __init__(self, c: CrossFormer.Config, stage: int, group: int, long: bool, cool: bool, side: int, drop_path: float):
        super().__init__()
        dim = c.dim * 2**stage
        self.group, self.long, self.cyclic = group, long, c.conditional_positions
        self.interval = None if c.adaptive_interval else c.intervals[stage]
        self.mask_padding, self.centre_padding = c.mask_padding, c.centre_padding
        self.norm1 = nn.LayerNorm(dim)
        self.attention = GroupAttention(dim, c.heads[stage], min(group, side), c.qkv_bias, not c.conditional_positions)
        if c.conditional_positions:  # as released: the convolution runs over (width, channels), one kernel a row
            self.cpe = nn.Conv2d(side, side, 3, padding=1, groups=side)
            self.cpe_norm = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratios[stage]))
        self.cooling = Cooling(dim) if cool else None
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.cyclic:
            y = y + self.cpe_norm(self.cpe(y))
        x = x + self.drop(self.attend(y))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x if self.cooling is None else self.cooling(x))

    def grouping(self, h: int, w: int) -> tuple[int, int]:
        """(group size, interval) on a grid."""
        if min(h, w) <= self.group:
            return max(h, w), 1
        if not self.long:
            return self.group, 1
        return self.group, self.interval or math.ceil(max(h, w) / self.group)

    def attend(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        size, interval = self.grouping(h, w)
        pad_h, pad_w = -h % (size * interval), -w % (size * interval)
        if not (pad_h or pad_w):
            groups = self.attention(to_groups(x, size, interval), size, None)
            return from_groups(groups, size, h, w, interval)
        top, left = (pad_h // 2, pad_w // 2) if self.centre_padding else (0, 0)
        around = (left, pad_w - left, top, pad_h - top)
        padding = None
        if self.mask_padding:
            outside = F.pad(torch.zeros(1, h, w, device=x.device), around, value=1.0).bool()
            padding = to_groups(outside[..., None], size, interval)[..., 0]
        groups = self.attention(to_groups(F.pad(x, (0, 0, *around)), size, interval), size, padding)
        return from_groups(groups, size, h + pad_h, w + pad_w, interval)[:, top : top + h, left : left + w]


class CrossScaleConv(nn.Module):
    """Convolutions of several kernels and one stride, concatenated: the widths are halves of halves of `out`, the last one doubled.

    x: a map [batch, in_dim, h, w]. Returns [batch, h / stride, w / stride, out].
    """

    def __init__(self, in_dim: int, out: int, kernels: tuple[int, ...], stride: int):
        super().__init__()
        widths = [out // 2 ** min(i + 1, len(kernels) - 1) for i in range(len(kernels))]
        self.convs = nn.ModuleList(nn.Conv2d(in_dim, width, k, stride, (k - stride) // 2) for width, k in zip(widths, kernels, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.cat([convolved(conv, x) for conv in self.convs], dim=1).permute(0, 2, 3, 1)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x); where the kernel is many strides wide, the same as a convolution of stride 1 over blocks of stride x stride pixels, which
    are its channels: a processor takes a fifth of the time for it. x: a map [batch, dim, h, w], channels last."""
    if type(conv) is not nn.Conv2d:  # a method may have put another layer in its place
        return conv(x)
    (b, c, h, w), k, s, pad = x.shape, conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    if k < WIDE * s or k % s or k - s != 2 * pad:
        return conv(x)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad - w % s, pad, pad - h % s))  # no pixels that no kernel reaches
    x = x.view(b, x.shape[1] // s, s, x.shape[2] // s, s, c).transpose(2, 3).flatten(3)  # b h/s w/s s*s*c
    weight = conv.weight.view(-1, c, k // s, s, k // s, s).permute(0, 3, 5, 1, 2, 4).reshape(-1, s * s * c, k // s, k // s)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias)


class Stage(nn.Module):
    """Blocks, then (but for the last stage) LN and a cross-scale merge to half the resolution.

    Returns (its features, the next stage's input).
    """

    def __init__(self, dim: int, blocks: list[Block], merge: tuple[int, ...] | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge_norm = nn.LayerNorm(dim) if merge else None
        self.merge = CrossScaleConv(dim, 2 * dim, merge, 2) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        if self.merge is None or self.merge_norm is None:
            return x, x
        return x, self.merge(self.merge_norm(x).permute(0, 3, 1, 2))


class CrossFormer(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dim: int = 64
        depths: tuple[int, ...] = (1, 1, 8, 6)
        heads: tuple[int, ...] = (2, 4, 8, 16)
        groups: tuple[int, ...] = (7, 7, 7, 7)
        intervals: tuple[int, ...] = (8, 4, 2, 1)
        patch_sizes: tuple[int, ...] = (4, 8, 16, 32)
        merge_sizes: tuple[tuple[int, ...], ...] = ((2, 4), (2, 4), (2, 4))
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
        group_growth: str = "constant"  # constant | linear | linear_div | alter | 7_14: how groups grow with depth
        adaptive_interval: bool = False
        cooling: bool = False  # amplitude cooling layers
        qkv_bias: bool = True
        patch_norm: bool = True
        absolute_positions: bool = False
        conditional_positions: bool = False  # in place of the dynamic position bias; fixes the size
        mask_padding: bool = True
        centre_padding: bool = False
        image_size: int = 224  # what growing groups and absolute positions are made for
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, last = config, len(config.depths) - 1
        self.side = c.image_size // c.patch_sizes[0]
        rates, sizes = drop_path_rates(c.drop_path, c.depths), group_sizes(c, self.side)
        self.embed = CrossScaleConv(c.in_channels, c.dim, c.patch_sizes, c.patch_sizes[0])
        self.embed_norm = nn.LayerNorm(c.dim) if c.patch_norm else None
        if c.absolute_positions:
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.side**2, c.dim), std=0.02))
        self.tokens = Tap("grid")
        stages = []
        for i, depth in enumerate(c.depths):
            blocks = [
                Block(c, i, sizes[i][j], bool(j % 2), c.cooling and j % 3 == 2 and j < depth - 1, max(1, self.side // 2**i), rates[i][j])
                for j in range(depth)
            ]
            stages.append(Stage(c.dim * 2**i, blocks, c.merge_sizes[i] if i < last else None))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.norm = nn.LayerNorm(c.dim * 2**last)
            self.features = Tap("grid")
            self.head = nn.Linear(c.dim * 2**last, c.num_classes)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        return self.head(self.features(self.norm(self._run(image)[-1])).mean((1, 2)))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dim * 2^i, h, w] at strides 4, 8, 16, 32, as each stage leaves them."""
        return tuple(x.permute(0, 3, 1, 2) for x in self._run(image))

    def _run(self, image: Tensor) -> list[Tensor]:
        x = self.embed(image)  # b h w c
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.config.absolute_positions:
            grid = (x.shape[1], x.shape[2])
            x = x + resize_table(self.positions, (self.side, self.side), grid).view(1, *grid, -1)
        x, out = self.tokens(x), []
        for stage in self.stages:
            features, x = stage(x)
            out.append(features)
        return out

    def no_weight_decay(self) -> set[str]:
        return {"positions"}

    def check_size(self, height: int, width: int) -> None:
        c = self.config
        least = c.patch_sizes[0] * 2 ** (len(c.depths) - 1)
        if min(height, width) < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="resize the image")
        if c.conditional_positions and (height, width) != self.image_size:
            raise BadInput("image size", expected=f"{c.image_size}x{c.image_size} (conditional positions)", got=f"{height}x{width}")


def group_sizes(c: CrossFormer.Config, side: int) -> list[list[int]]:
    """The group size of every block, by stage. side: tokens a side in the first stage.

    Growing groups start at 4 tokens and reach the whole grid at the last block, linearly in the share of the grid they span.
    """
    if c.group_growth not in ("constant", "linear", "linear_div", "alter", "7_14"):
        raise BadInput("group_growth", expected="constant, linear, linear_div, alter or 7_14", got=repr(c.group_growth))
    shares = np.arange(4 / side, 1.0, (1 - 4 / side) / sum(c.depths)) if side > 4 else np.ones(sum(c.depths) + 1)
    out, n = [], 0
    for i, depth in enumerate(c.depths):
        now, sizes = side // 2**i, []
        for j in range(depth):
            if c.group_growth == "constant":
                size = c.groups[i]
            elif c.group_growth == "7_14":
                size = c.groups[i] if i != 2 or j >= 4 else c.groups[i] // 2
            else:
                wanted = now * shares[n]
                if c.group_growth == "linear_div" and wanted > now // 2:
                    wanted = now if wanted > now * 3 / 4 or i != 2 else now // 2
                if c.group_growth == "alter" and wanted > now // 2:
                    wanted = now if n % 2 or i != 2 else now // 2
                size = max(4, math.ceil(wanted))
            sizes.append(size)
            n += 1
        out.append(sizes)
    return out
