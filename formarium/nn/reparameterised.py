"""Layers that train as several and serve as one (Ding et al., "RepVGG", CVPR 2021): a sum of convolutions of different numbers of groups,
each with its own BatchNorm, is one convolution once the statistics stand still."""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainConv(nn.Conv2d):
    """Conv2d of stride 1 with a bias, for channels-last maps: a dense 1x1 kernel is a matrix product."""

    def __init__(self, dim: int, out: int, kernel: int, groups: int = 1):
        super().__init__(dim, out, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.groups)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Stride 1, half padding. x: float [batch, dim, h, w], fastest channels-last."""
    if groups == 1 and weight.shape[-1] == 1:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)


class RepConv(nn.Module):
    """Sum over g in `groups` of BN_g(Conv2d with g groups, without bias), plus BN(x) where out = dim. Stride 1.

    x: float [batch, dim, h, w], fastest channels-last. Returns [batch, out, h, w].

    `fold` gives the kernel and bias of the one convolution that computes the same in evaluation: every grouped kernel on the diagonal
    blocks of a kernel with gcd(groups) groups, the identity as a unit kernel, each times its BatchNorm's gain. A forward without
    gradient in evaluation mode uses it (and keeps it until a weight or statistic changes); `fuse` makes it a layer for good.
    """

    def __init__(self, dim: int, out: int, kernel: int, groups: tuple[int, ...]):
        super().__init__()
        self.dim, self.out, self.kernel = dim, out, kernel
        self.least = reduce(math.gcd, groups)
        self.convs = nn.ModuleList(nn.Conv2d(dim, out, kernel, padding=kernel // 2, groups=g, bias=False) for g in groups)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in groups)
        self.identity = nn.BatchNorm2d(dim) if dim == out else None
        self._key: tuple[object, ...] = ()
        self._folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return convolve(x, *self.folded(), self.least)
        if not torch.compiler.is_compiling():
            self._folded = None  # weights are about to change, and fused optimisers don't count that as a new version
        y = self.identity(x) if self.identity is not None else None
        for conv, norm in zip(self.convs, self.norms, strict=True):
            branch = norm(convolve(x, conv.weight, None, conv.groups))
            y = branch if y is None else y + branch
        return y

    def folded(self) -> tuple[Tensor, Tensor]:
        tensors = [*self.parameters(), *self.buffers()]
        key = tuple((id(t), 0 if t.is_inference() else t._version) for t in tensors)
        if self._folded is None or key != self._key:
            self._key, self._folded = key, self.fold()
        return self._folded

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor]:
        """Kernel [out, dim / gcd(groups), kernel, kernel] and bias [out]."""
        width = self.dim // self.least
        weight = bias = 0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            gain, shift = scale_and_shift(norm)
            weight, bias = weight + widen(conv.weight, conv.groups, self.least) * gain.view(-1, 1, 1, 1), bias + shift
        if self.identity is not None:
            gain, shift = scale_and_shift(self.identity)
            unit = torch.zeros_like(weight)
            place = torch.arange(self.dim, device=unit.device)
            unit[place, place % width, self.kernel // 2, self.kernel // 2] = gain
            weight, bias = weight + unit, bias + shift
        return weight, bias

    def fuse(self) -> PlainConv:
        """The one convolution, as a layer."""
        weight, bias = self.fold()
        plain = PlainConv(self.dim, self.out, self.kernel, self.least).to(weight)
        plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
        return plain

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._folded = None  # moved or cast: make it anew
        return super()._apply(fn, recurse)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds in evaluation: gamma / sqrt(var + eps), beta - mean * gamma / sqrt(var + eps)."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    return gain, norm.bias - norm.running_mean * gain  # type: ignore[operator]


def widen(weight: Tensor, groups: int, least: int) -> Tensor:
    """A kernel of `groups` groups [out, dim / groups, k, k] as one of `least` groups [out, dim / least, k, k], zero off its blocks."""
    ratio, (out, dim, *k) = groups // least, weight.shape
    blocks = weight.view(least, ratio, out // groups, dim, *k)
    wide = weight.new_zeros(least, ratio, out // groups, ratio, dim, *k)
    at = torch.arange(ratio, device=weight.device)
    wide[:, at, :, at] = blocks.transpose(0, 1)  # the two index axes come first
    return wide.reshape(out, ratio * dim, *k)
