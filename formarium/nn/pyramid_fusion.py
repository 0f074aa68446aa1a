"""Maps of several strides brought to one width, and fused from the coarsest down (EPFF of ViDT+, after DPT and FPN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Sequential):
    """1x1 convolution and group norm to the neck's width: [batch, dim, h, w] -> [batch, hidden, h, w]."""

    def __init__(self, dim: int, hidden: int, groups: int):
        super().__init__(nn.Conv2d(dim, hidden, 1), nn.GroupNorm(groups, hidden))
        nn.init.xavier_uniform_(self[0].weight)
        nn.init.zeros_(self[0].bias)


class ResidualUnit(nn.Module):
    """x + a bottleneck of three convolutions, each after a ReLU. x: float [batch, dim, h, w]."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, inner, 3, padding=1), nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(F.relu(x))))))


class Fusion(nn.Module):
    """EPFF: from the coarsest map down, the last result, enlarged and smoothed, is added to the next map. Gives the maps coarse to fine."""

    def __init__(self, channels: Sequence[int], hidden: int, groups: int, inner: int):
        super().__init__()
        self.project = nn.ModuleList([Projection(dim, hidden, groups) for dim in channels])
        self.smooth = nn.ModuleList([nn.Conv2d(hidden, hidden, 1) for _ in channels])
        self.before = nn.ModuleList([ResidualUnit(hidden, inner) for _ in channels])
        self.after = nn.ModuleList([ResidualUnit(hidden, inner) for _ in channels])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [project(m) for project, m in zip(self.project, maps, strict=True)]
        out = [self.after[-1](maps[-1])]
        for i in range(len(maps) - 2, -1, -1):
            larger = F.interpolate(out[-1], size=maps[i].shape[2:], mode="bilinear", align_corners=True)
            out.append(self.after[i](self.smooth[i](larger) + self.before[i](maps[i])))
        return out
