"""Tokens as a signal: its mean over the tokens is the direct current (DC), the rest its high-frequency part (HC).

Softmax attention is a low-pass filter (Wang et al. 2022, arXiv 2203.05962; Zhou et al. 2025, arXiv 2410.24200):
||HC[A V]|| <= sigma_a ||HC[V]||, with sigma_a the largest singular value of HC[A].
"""

from __future__ import annotations

import torch
from torch import Tensor


def high_frequency(x: Tensor) -> Tensor:
    """x minus its mean over the tokens: float [..., tokens, channels], the same shape."""
    return x - x.mean(-2, keepdim=True)


def high_share(x: Tensor) -> Tensor:
    """||HC[x]|| / ||x||, between 0 (all tokens equal) and 1: float [..., tokens, channels] -> [...]."""
    return torch.linalg.matrix_norm(high_frequency(x)) / torch.linalg.matrix_norm(x).clamp(min=1e-12)


def filter_rate(attention: Tensor) -> Tensor:
    """sigma_a of attention probabilities, float [..., queries, keys] -> [...]: what at most is left of the high-frequency part."""
    return largest_singular(high_frequency(attention))


def passed(attention: Tensor, value: Tensor) -> Tensor:
    """||HC[A V]|| / ||HC[V]||, what is left of it on these values: [..., queries, keys] and [..., keys, width] -> [...]."""
    before = torch.linalg.matrix_norm(high_frequency(value)).clamp(min=1e-12)
    return torch.linalg.matrix_norm(high_frequency(attention @ value)) / before


def largest_singular(x: Tensor, width: int = 6, steps: int = 12) -> Tensor:
    """The largest singular value of each matrix, float [..., rows, columns] -> [...]; relative error about 1e-3 at worst.

    Small matrices are decomposed; of large ones the leading subspace is iterated, which costs tokens^2 instead of tokens^3.
    """
    x = x.float()
    if min(x.shape[-2:]) <= 8 * width:
        return torch.linalg.matrix_norm(x, 2)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(x.shape[-1], width, generator=generator).to(x.device).expand(*x.shape[:-2], -1, -1)
    for _ in range(steps):
        basis = torch.linalg.qr(x.transpose(-2, -1) @ (x @ basis)).Q
    return torch.linalg.matrix_norm(x @ basis, 2)


def entropy(attention: Tensor) -> Tensor:
    """Mean entropy of the rows in nats, float [..., queries, keys] -> [...]: log(keys) where all keys weigh the same, 0 where one has
    all."""
    return -torch.xlogy(attention, attention).sum(-1).mean(-1)
