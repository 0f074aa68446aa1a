"""Dropout, and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU what stays is drawn from uniform numbers, in a third of the time that drawing it takes there otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        keep = 1 - self.p
        return x * torch.rand(x.shape).lt_(keep).div_(keep).to(x.dtype)


class DropPath(nn.Module):
    """Zero a residual branch for whole samples with probability `rate` in training, scaling the rest by 1 / (1 - rate)
    (Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates that rise linearly from 0 to `rate` over all blocks, grouped by stage."""
    total, at, out = sum(depths), 0, []
    for depth in depths:
        out.append([rate * (at + j) / max(1, total - 1) for j in range(depth)])
        at += depth
    return out
