"""Attention: splitting and merging heads, and the plain multi-head layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale + bias) v for q, k, v float [..., heads, tokens, width] and a bias, if any, that broadcasts to the scores.

    The fused operator has no gradient for a bias on the CPU and would fall back to slower code than the plain product.
    """
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if bias is None or not learned or torch.compiler.is_compiling() or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    return scores.add_(bias).softmax(-1) @ v


def split_heads(x: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """[batch, tokens, parts * heads * width] -> `parts` tensors [batch, heads, tokens, width], views where memory allows."""
    b, n, c = x.shape
    # parts first, then heads: backward then stacks the parts' gradients straight into place, one copy instead of two
    return tuple(part.transpose(1, 2) for part in x.view(b, n, parts, heads, c // (parts * heads)).unbind(2))


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] -> [batch, tokens, heads * width]."""
    x = x.transpose(1, 2)
    if torch.compiler.is_exporting():  # attention's memory layout there needn't be the one found while tracing
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with one fused projection for queries, keys and values.

    x: float [batch, tokens, dim]. Returns the same shape.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
