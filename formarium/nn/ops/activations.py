"""GELU and SiLU, where memory makes them cheap: on contiguous floats, and in place where that is allowed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str = "none", own: bool = False) -> Tensor:
    """GELU of a tensor of any shape. own: nobody else holds x (fresh from a product, not from a module that hooks may look at).

    Of a channels-last map the contiguous view is taken, for which torch's CPU kernel is twice as fast. An own tensor is overwritten where
    no gradient needs it: fresh memory costs as much as the function.
    """
    if torch.compiler.is_compiling():
        return F.gelu(x, approximate=approximate)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return gelu(x.permute(0, 2, 3, 1), approximate, own).permute(0, 3, 1, 2)
    if not own or (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x, approximate=approximate)
    return torch.ops.aten.gelu_(x, approximate=approximate)


GELUS = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(x: Tensor, kind: str, own: bool = False) -> Tensor:
    """ "gelu", "gelu_tanh" or "silu" of x; own as in `gelu`."""
    if kind in GELUS:
        return gelu(x, GELUS[kind], own)
    if kind != "silu":
        raise ValueError(f"activation {kind!r}")
    return F.silu(x, inplace=own and not (torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)))


def activate_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient of x, of what `activate` makes of it."""
    if kind in GELUS:
        return torch.ops.aten.gelu_backward(grad, x, approximate=GELUS[kind])
    return torch.ops.aten.silu_backward(grad, x)
