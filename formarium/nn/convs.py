"""Convolution with BatchNorm, as one layer."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBN(nn.Module):
    """Conv2d without bias, then BatchNorm2d. x: float [batch, dim, h, w], fastest channels-last. Returns [batch, out, h', w'].

    residual adds x (stride 1, out = dim). In inference the normalisation, and a depthwise convolution's residual too, are folded into
    the kernel; the folded kernel is kept until a weight or statistic changes, or a forward
    with gradients goes by. A 1x1 kernel is a matrix product.
    """

    def __init__(self, dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, residual: bool = False, gain: float = 1.0):
        super().__init__()
        self.residual = residual
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, gain)
        self._key: tuple[object, ...] = ()
        self._folded: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                self._folded = None  # weights are about to change, and fused optimisers don't count that as a new version
            y = self.norm(self._convolve(x, self.conv.weight, None))
            return x + y if self.residual else y
        y = self._convolve(x, *self.folded())
        return x + y if self.residual and self.conv.groups == 1 else y

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        c = self.conv
        if c.kernel_size == (1, 1) and c.stride == (1, 1):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, c.stride, c.padding, 1, c.groups)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias equal to convolution, normalisation and, where depthwise, residual."""
        n = self.norm
        parts = (self.conv.weight, n.weight, n.bias, n.running_mean, n.running_var)
        key = tuple((id(t), 0 if t.is_inference() else t._version) for t in parts)  # type: ignore[union-attr]
        if self._folded is None or key != self._key:
            self._key, self._folded = key, self.fold()
        return self._folded

    @torch.no_grad()
    def fold(self) -> tuple[Tensor, Tensor]:
        n = self.norm
        scale = n.weight / (n.running_var + n.eps).sqrt()  # type: ignore[operator]
        weight, bias = self.conv.weight * scale[:, None, None, None], n.bias - n.running_mean * scale  # type: ignore[operator]
        if self.residual and self.conv.groups > 1:
            middle = self.conv.kernel_size[0] // 2
            weight[:, 0, middle, middle] += 1
        return weight.detach(), bias.detach()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._folded = None  # moved or cast: make it anew
        return super()._apply(fn, recurse)


class FoldedConv(nn.Conv2d):
    """What a ConvBN becomes for good: one convolution with a bias (plus a residual that no kernel can hold)."""

    def __init__(self, source: ConvBN):
        c = source.conv
        size, stride, padding = c.kernel_size, c.stride, c.padding
        super().__init__(c.in_channels, c.out_channels, size, stride, padding, groups=c.groups)  # type: ignore[arg-type]
        self.residual = source.residual and c.groups == 1
        weight, bias = source.fold()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.residual else y


def fuse(model: nn.Module) -> nn.Module:
    """A copy of the model, in eval mode, whose ConvBN layers are plain convolutions: the same function with fewer parameters."""
    model = copy.deepcopy(model).eval()
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, ConvBN):
                setattr(parent, name, FoldedConv(child))
    return model
