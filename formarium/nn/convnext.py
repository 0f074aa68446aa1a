"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022): depthwise 7x7, LayerNorm, a feed-forward network of four times the width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.nn.maps import LayerNorm2d
from formarium.nn.mlp import MLP


class ConvNeXtBlock(nn.Module):
    """x + gamma * MLP(LN(depthwise 7x7 of x)). x: float [batch, h, w, dim]. Returns the same shape."""

    def __init__(self, dim: int, layer_scale: float):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.tap = Tap()

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tapped(self.tap, torch.addcmul(x, self.mlp(self.norm(y)), self.gamma), views)


class ConvNeXtStage(nn.Module):
    """LayerNorm and a 2x2 convolution of stride 2 (not in the first stage), then blocks: [batch, h, w, dim] to [batch, h/2, w/2, out]."""

    def __init__(self, dim: int, out: int, depth: int, layer_scale: float, first: bool):
        super().__init__()
        self.down = None if first else nn.Sequential(LayerNorm2d(dim, eps=1e-6), nn.Conv2d(dim, out, 2, 2))
        self.blocks = nn.ModuleList(ConvNeXtBlock(out, layer_scale) for _ in range(depth))

    def forward(self, x: Tensor, views: int = 1) -> Tensor:
        if self.down is not None:
            x = self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, views)
        return x


class ConvNeXt(nn.Module):
    """Image [batch * views, channels, h, w] to logits [batch * views, classes]; `views` images in a row belong to one sample.

    `extra`, float [batch * views, dims[-1]], is added to the pooled features before the last norm.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        classes: int,
        in_channels: int = 3,
        layer_scale: float = 1e-6,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, dims[0], 4, 4), LayerNorm2d(dims[0], eps=1e-6))
        self.tokens = Tap()
        inputs = (dims[0], *dims[:-1])
        self.stages = nn.ModuleList(
            ConvNeXtStage(before, dim, depth, layer_scale, i == 0)
            for i, (before, dim, depth) in enumerate(zip(inputs, dims, depths, strict=True))
        )
        self.features = Tap()
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, views: int = 1, extra: Tensor | None = None) -> Tensor:
        x = self.stem(image.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = tapped(self.tokens, x, views)
        for stage in self.stages:
            x = stage(x, views)
        pooled = tapped(self.features, x, views).mean((1, 2))
        return self.head(self.norm(pooled if extra is None else pooled + extra))


def tapped(tap: Tap, x: Tensor, views: int) -> Tensor:
    """A map [batch * views, h, w, dim] shown to a tap as the tokens of one sample's views."""
    if tap.watch is None:
        return x
    grid = (x.shape[1], x.shape[2])
    return tap(x.flatten(1, 2), grid=grid if views == 1 else (views, *grid), batch=x.shape[0] // views).view_as(x)


def interleave(*views: Tensor) -> Tensor:
    """Images of one size [batch, ...] each, as [batch * views, ...] with a sample's side by side."""
    return torch.stack(views, 1).flatten(0, 1)


def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, with antialiasing where it shrinks."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
