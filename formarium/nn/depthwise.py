"""Depthwise convolutions of channels-last grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise 3x3 of x (with bias), as one convolution: the identity is added to the kernel's middle.

    x: float [b, height, width, dim]. Returns the same shape.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.register_buffer("identity", F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.identity
        return F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, 1, 1, 1, self.groups).permute(0, 2, 3, 1)
