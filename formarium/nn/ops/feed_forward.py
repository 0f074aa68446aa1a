"""Linear, GELU or SiLU, Linear on the CPU, a slab of rows at a time.

The hidden activations of a whole batch (rows x hidden floats) don't fit the cache, and buffers that large are mapped and faulted
in anew on every call. Slab by slab the hidden rows stay in the cache between the two products, and the same memory serves them all.
For training, only the hidden pre-activations are kept: the activation is applied again on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.ops.activations import activate, activate_backward

SLAB = 1 << 20  # floats of hidden activations at a time (4 MB), the best of 2^16 .. 2^21 on two machines with 32 MB of shared cache


def feed_forward_plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "gelu") -> Tensor:
    """The specification: x [..., dim] -> [..., out] by w1 [hidden, dim], b1, an activation (see `activate`), w2 [out, hidden], b2."""
    return F.linear(activate(F.linear(x, w1, b1), activation, own=True), w2, b2)


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "gelu") -> Tensor:
    """As `feed_forward_plain`; in slabs where that pays: eager, on the CPU, without autocast, and more than one slab (eight for training,
    whose smaller products are better left whole)."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return feed_forward_plain(x, w1, b1, w2, b2, activation)
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2))
    if x.numel() // x.shape[-1] * w1.shape[0] <= SLAB * (8 if train else 1):
        return feed_forward_plain(x, w1, b1, w2, b2, activation)
    if train:
        return _Slabs.apply(x, w1, b1, w2, b2, activation)
    return _in_slabs(x, w1, b1, w2, b2, activation)


def _in_slabs(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str, kept: list[Tensor] | None = None) -> Tensor:
    """`feed_forward_plain` slab by slab; `kept` takes each slab's hidden pre-activations, [rows, hidden], for a backward."""
    rows = x.reshape(-1, x.shape[-1])
    step = _rows(w1)
    out = x.new_empty(rows.shape[0], w2.shape[0])
    hidden = None if kept is not None else x.new_empty(min(step, rows.shape[0]), w1.shape[0])  # one buffer for all
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        if kept is None:
            active = activate(torch.addmm(b1, part, w1.t(), out=hidden[: len(part)]), activation, own=True)  # type: ignore[index]
        else:
            kept.append(torch.addmm(b1, part, w1.t()))
            active = activate(kept[-1], activation)
        torch.addmm(b2, active, w2.t(), out=out[start : start + step])
    return out.view(*x.shape[:-1], -1)


def _rows(w1: Tensor) -> int:
    """Of a slab."""
    return max(1, SLAB // w1.shape[0])


class _Slabs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
        kept: list[Tensor] = []
        out = _in_slabs(x, w1, b1, w2, b2, activation, kept)
        ctx.step, ctx.activation = _rows(w1), activation
        ctx.save_for_backward(x, w1, w2, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, *kept = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        dx, dw1, db1 = torch.empty_like(rows), torch.zeros_like(w1), w1.new_zeros(w1.shape[0])
        dw2 = torch.zeros_like(w2)
        for i, hidden in enumerate(kept):
            at = slice(i * ctx.step, i * ctx.step + hidden.shape[0])
            dw2.addmm_(grad[at].t(), activate(hidden, ctx.activation))
            dhidden = activate_backward(grad[at] @ w2, hidden, ctx.activation)
            dw1.addmm_(dhidden.t(), rows[at])
            db1 += dhidden.sum(0)
            torch.mm(dhidden, w1, out=dx[at])
        return dx.view_as(x), dw1, db1, dw2, grad.sum(0), None
