"""The decoder layer of Deformable DETR: queries look at one another, then at a few points of each map, then a feed-forward network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.nn.ops.deformable_attention import DeformableAttention, Shapes


class QueryAttention(nn.Module):
    """Self-attention whose queries and keys, not its values, carry positions. x, positions: float [batch, queries, dim]."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        dim = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q, k = split_heads(F.linear(x + positions, weight[: 2 * dim], bias[: 2 * dim]), self.heads, 2)
        (v,) = split_heads(F.linear(x, weight[2 * dim :], bias[2 * dim :]), self.heads)
        drop = self.dropout if self.training else 0.0
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=drop)))


class DeformableDecoderLayer(nn.Module):
    """Post-norm. queries, positions: float [batch, queries, dim]; reference, memory, shapes, padding: see DeformableAttention."""

    def __init__(self, dim: int, hidden: int, heads: int, levels: int, points: int, dropout: float = 0.1):
        super().__init__()
        self.self_attention = QueryAttention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        self.drop = Dropout(dropout)
        self.tap = Tap()

    def forward(self, x: Tensor, positions: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor | None) -> Tensor:
        x = self.self_norm(x + self.drop(self.self_attention(x, positions)))
        x = self.cross_norm(x + self.drop(self.cross_attention(x + positions, reference, memory, shapes, padding)))
        x = self.norm(x + self.drop(self.fc2(self.drop(F.relu(self.fc1(x))))))
        return self.tap(x)


class Head(nn.Module):
    """Three linear layers with ReLUs between. x: float [..., dim]. Returns [..., out]."""

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))
