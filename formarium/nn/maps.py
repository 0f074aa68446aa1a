"""Tokens and maps: the same memory seen two ways.

Tokens [batch, h * w, dim] are a channels-last map [batch, dim, h, w] without moving a value; convolutions take and give that layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


def tokens_to_map(x: Tensor, grid: Grid) -> Tensor:
    """[batch, h * w, dim] -> [batch, dim, h, w], a channels-last view."""
    return x.unflatten(1, grid).permute(0, 3, 1, 2)


def map_to_tokens(x: Tensor) -> Tensor:
    """[batch, dim, h, w] -> [batch, h * w, dim]; a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def run_stages(stages: Iterable[nn.Module], image: Tensor) -> list[tuple[Tensor, Grid]]:
    """What each of a pyramid's stages (map -> tokens and their grid) gives, one after the other, from a channels-last image on."""
    out, x = [], image.contiguous(memory_format=torch.channels_last)
    for stage in stages:
        out.append(stage(x))
        x = tokens_to_map(*out[-1])
    return out


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map [batch, dim, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_convs(model: nn.Module) -> None:
    """Convolution weights normal with variance 2 / fan-out (a group's), biases 0, as the PVT family's successors do."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = math.prod(m.kernel_size) * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution of a channels-last grid [batch, h, w, dim] -> [batch, h, w, out], as one matrix product."""

    def __init__(self, dim: int, out: int, bias: bool = True):
        super().__init__(dim, out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.flatten(1), self.bias)


class PatchConv(nn.Conv2d):
    """A convolution whose kernel is its stride, over a map [batch, dim, h, w]. On the way to gradients on the CPU it is one matrix product
    over patches, whose backward pass takes half the time of the convolution's; it then gives a channels-last map."""

    def __init__(self, dim: int, out: int, patch: int):
        super().__init__(dim, out, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        (b, c, h, w), p = x.shape, self.stride[0]
        x = x[:, :, : h // p * p, : w // p * p].permute(0, 2, 3, 1)  # a remainder is left out
        patches = x.reshape(b, h // p, p, w // p, p, c).transpose(2, 3).flatten(3)  # b h/p w/p p*p*c
        return nn.functional.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
