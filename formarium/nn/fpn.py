"""What dense predictors put on a backbone's pyramid of maps: FPN's neck, Semantic FPN's and UPerNet's heads.

All take any number of maps, fine to coarse, of any strides (each about twice the one before) and channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Sequence[Tensor]


def resized(x: Tensor, like: Tensor, mode: str = "bilinear") -> Tensor:
    """A map [batch, channels, h, w] at another's height and width."""
    size = like.shape[2:]
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=False if mode == "bilinear" else None)


def group_norm(dim: int) -> nn.GroupNorm:
    """Of 32 groups, or as many as leave each two channels."""
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if dim % g == 0 and dim > g), dim)


class ConvNormAct(nn.Sequential):
    """Convolution without bias, norm, ReLU. norm: "batch" or "group"."""

    def __init__(self, dim: int, out: int, kernel: int = 3, norm: str = "batch"):
        made = (
            nn.BatchNorm2d(out) if norm == "batch" else nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if out % g == 0 and out > g), out)
        )
        super().__init__(nn.Conv2d(dim, out, kernel, padding=kernel // 2, bias=False), made, nn.ReLU())


class FPN(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017): each map to `dim` channels by a 1x1 convolution, plus the coarser one's sum
    enlarged; a 3x3 convolution smooths each. extra: coarser maps more, each a 3x3 convolution of stride 2 on the last (RetinaNet's P6, P7).
    forward: maps -> len(channels) + extra maps of `dim` channels, fine to coarse."""

    def __init__(self, channels: Sequence[int], dim: int = 256, extra: int = 0):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.coarser = nn.ModuleList(nn.Conv2d(dim, dim, 3, stride=2, padding=1) for _ in range(extra))

    def forward(self, maps: Maps) -> list[Tensor]:
        sums = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resized(sums[i], sums[i - 1], "nearest")
        out = [smooth(x) for smooth, x in zip(self.smooth, sums, strict=True)]
        for i, down in enumerate(self.coarser):
            out.append(down(out[-1] if i == 0 else out[-1].relu()))
        return out


class SemanticFPNHead(nn.Module):
    """Semantic FPN's decoder (Kirillov et al., CVPR 2019, section 3): each level is convolved (3x3, group norm, ReLU) and doubled until it
    has the finest one's size; their sum is classified. forward: FPN's maps -> logits [batch, classes, h, w] at the finest map's size."""

    def __init__(self, levels: int, dim: int, hidden: int, classes: int, dropout: float = 0.1, norm: str = "group"):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvNormAct(dim if j == 0 else hidden, hidden, norm=norm) for j in range(max(1, i))) for i in range(levels)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(hidden, classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        return self.classify(self.dropout(self.fuse(maps)))

    def fuse(self, maps: Maps) -> Tensor:
        total = torch.zeros((), device=maps[0].device)
        for i, (convs, x) in enumerate(zip(self.levels, maps, strict=True)):
            for j, conv in enumerate(convs):
                x = conv(x)
                if i:  # to the next finer map's size
                    x = resized(x, maps[i - 1 - j])
            total = total + x
        return total


class PyramidPooling(nn.Module):
    """PSPNet's module (Zhao et al., CVPR 2017): means over grids of 1x1, 2x2, 3x3 and 6x6 cells, each to `dim` channels and enlarged,
    beside
    the map itself, fused by a 3x3 convolution."""

    def __init__(self, channels: int, dim: int, grids: Sequence[int] = (1, 2, 3, 6), norm: str = "batch"):
        super().__init__()
        self.grids = tuple(grids)
        self.reduce = nn.ModuleList(ConvNormAct(channels, dim, 1, norm) for _ in grids)
        self.fuse = ConvNormAct(channels + len(self.grids) * dim, dim, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [resized(reduce(F.adaptive_avg_pool2d(x, g)), x) for g, reduce in zip(self.grids, self.reduce, strict=True)]
        return self.fuse(torch.cat([x, *pooled], 1))


class UPerHead(nn.Module):
    """UPerNet's decoder (Xiao et al., ECCV 2018): pyramid pooling on the coarsest map, a top-down pyramid, all levels joined at the finest.
    forward: a backbone's maps -> logits [batch, classes, h, w] at the finest map's size."""

    def __init__(self, channels: Sequence[int], dim: int, classes: int, dropout: float = 0.1, norm: str = "batch"):
        super().__init__()
        self.lateral = nn.ModuleList(ConvNormAct(c, dim, 1, norm) for c in channels[:-1])
        self.pool = PyramidPooling(channels[-1], dim, norm=norm)
        self.smooth = nn.ModuleList(ConvNormAct(dim, dim, norm=norm) for _ in channels[:-1])
        self.fuse_all = ConvNormAct(len(channels) * dim, dim, norm=norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(dim, classes, 1)

    def forward(self, maps: Maps) -> Tensor:
        return self.classify(self.dropout(self.fuse(maps)))

    def fuse(self, maps: Maps) -> Tensor:
        sums = [*(lateral(x) for lateral, x in zip(self.lateral, maps, strict=False)), self.pool(maps[-1])]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resized(sums[i], sums[i - 1])
        out = [*(smooth(x) for smooth, x in zip(self.smooth, sums, strict=False)), sums[-1]]
        return self.fuse_all(torch.cat([resized(x, out[0]) for x in out], 1))
