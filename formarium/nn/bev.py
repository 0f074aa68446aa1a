"""A residual convolutional network over a map seen from above, as detectors put behind their voxel backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def bev_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class BEVBlock(nn.Module):
    """conv3-BN-ReLU-conv3-BN plus a shortcut (a strided 1x1 convolution with BN where `project`), ReLU. x: float [b, c, h, w]."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, project: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = bev_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = bev_norm(channels)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), bev_norm(channels)) if project else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(inner)) + self.shortcut(x)).relu()


class ResidualBEV(nn.Module):
    """Levels of blocks, each strided once; all levels brought to one size and joined.

    forward: float [b, in_channels, h, w] to [b, sum(up_channels), h', w'], with h' = h / strides[0] * up_strides[0]. An up stride below 1
    is a strided convolution. Sizes that the strides don't divide are cut to the smallest level's.
    """

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int],
        strides: Sequence[int],
        channels: Sequence[int],
        up_strides: Sequence[float],
        up_channels: Sequence[int],
    ):
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(channels):
            first = BEVBlock(channels[i - 1] if i else in_channels, width, strides[i], project=True)
            self.blocks.append(nn.Sequential(first, *(BEVBlock(width, width) for _ in range(layers[i]))))
            up = up_strides[i]
            if up >= 1:
                conv: nn.Module = nn.ConvTranspose2d(width, up_channels[i], int(up), int(up), bias=False)
            else:
                conv = nn.Conv2d(width, up_channels[i], round(1 / up), round(1 / up), bias=False)
            self.deblocks.append(nn.Sequential(conv, bev_norm(up_channels[i]), nn.ReLU()))
        self.out_channels = sum(up_channels)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            x = block(x)
            levels.append(deblock(x))
        h, w = (min(level.shape[d] for level in levels) for d in (2, 3))
        return torch.cat([level[:, :, :h, :w] for level in levels], 1)
