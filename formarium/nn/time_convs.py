"""Depthwise convolution over the time of tokens, without turning them round."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONG = 300  # frames from which on the kernel's gradient is computed here


def depthwise_over_time(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel's own filter over time, as many frames out as in: float [b, n, c], weight [c, 1, k] -> [b, n, c].

    Zeros are put around: (k - 1) // 2 before, the rest behind. As a 2-D convolution on memory that lies channels last it takes a half
    to a fifth of the time that conv1d takes on a processor. Only the kernel's gradient is slow in that layout, over many frames: it is
    computed here then.
    """
    reach = weight.shape[-1] - 1
    around = (0, 0, reach // 2, reach - reach // 2)
    own = x.device.type == "cpu" and x.shape[1] + reach >= LONG and torch.is_grad_enabled() and weight.requires_grad
    if own and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")):
        return _Depthwise.apply(F.pad(x, around), weight, bias)
    if reach % 2 == 0:
        return convolved(x, weight, bias, reach // 2)
    return convolved(F.pad(x, around), weight, bias)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0) -> Tensor:
    """The convolution with so many zeros on either side: [b, n, c] -> [b, n + 2 padding - k + 1, c]."""
    out = F.conv2d(x.transpose(1, 2)[:, :, None], weight[:, :, None], bias, 1, (0, padding), groups=weight.shape[0])  # b c 1 n
    return out.squeeze(2).transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolved(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        reach, n = weight.shape[-1] - 1, grad.shape[1]
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = convolved(grad, weight.flip(-1), padding=reach)
        if ctx.needs_input_grad[1]:  # a tap's share: what it met, times what came back there
            met, taps = torch.empty_like(grad), grad.new_empty(reach + 1, grad.shape[2])
            for i, tap in enumerate(taps):
                torch.sum(torch.mul(grad, x[:, i : i + n], out=met), (0, 1), out=tap)
            dweight = taps.t()[:, None]
        if ctx.needs_input_grad[2]:
            dbias = grad.sum((0, 1))
        return dx, dweight, dbias
