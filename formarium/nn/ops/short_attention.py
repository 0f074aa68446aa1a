"""Attention over a handful of tokens, many times over (the words of a patch, the pixels of a small window).

Training on the CPU, the backward pass of `F.scaled_dot_product_attention` is made for long sequences; over 16 tokens the explicit product
takes two thirds of its time. Everywhere else the fused operator is the faster one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v for q, k, v float [batch, heads, tokens, width]; scale is 1 / sqrt(width) where None. Same shape as q."""
    if torch.compiler.is_compiling() or q.device.type != "cpu" or not (torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return (q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)).softmax(-1) @ v
