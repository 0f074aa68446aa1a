"""Sums, maxima and softmax over the edges that point at a node, and the attention built on them."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_sum(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Rows of `values` [rows, ...] added up by `index` (int64 [rows], 0 .. size - 1): [size, ...]. Where nothing points: 0."""
    return values.new_zeros(size, *values.shape[1:]).index_add_(0, index, values)


def scatter_max(values: Tensor, index: Tensor, size: int) -> Tensor:
    """The largest of the rows of `values` [rows, ...] with the same `index`: [size, ...]. Where nothing points: -inf."""
    spread = index.view(-1, *(1,) * (values.ndim - 1)).expand_as(values)
    return values.new_full((size, *values.shape[1:]), -torch.inf).scatter_reduce(0, spread, values, "amax")


def scatter_softmax(scores: Tensor, index: Tensor, size: int) -> Tensor:
    """Softmax of `scores` [rows, ...] among the rows with the same `index`: [rows, ...]."""
    top = scatter_max(scores.detach(), index, size)
    weights = (scores - top.index_select(0, index)).exp()
    return weights / scatter_sum(weights, index, size).index_select(0, index)


def neighbour_attention(weights: Tensor, values: Tensor, source: Tensor, target: Tensor, eps: float = 0.0) -> Tensor:
    """What each node gets from the sources of the edges that point at it, averaged by unnormalised weights.

    weights: [edges, heads], not negative. values: [nodes, heads, channels]. source, target: int64 [edges].
    Returns [nodes, heads, channels]: sum_j w_ij v_j / (sum_j w_ij + eps), and 0 for a node that no edge (of weight above 0) points at.
    """
    size = values.shape[0]
    messages = values.index_select(0, source) * weights[..., None]  # e h c
    total = scatter_sum(weights, target, size)  # n h
    if eps == 0:
        total = total + (total == 0)  # 0 / 0 is nothing
    return scatter_sum(messages, target, size) / (total + eps)[..., None]
