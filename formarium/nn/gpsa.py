"""Gated positional self-attention (ConViT, d'Ascoli et al., ICML 2021): content and position each attend, a gate a head mixes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.nn.attention import merge_heads, split_heads


class GatedPositionalAttention(nn.Module):
    """(1 - s) softmax(q k^T / sqrt(d)) v + s softmax(position) v with s = sigmoid(gate of the head).

    The position's logits are a linear function of (dx, dy, dx^2 + dy^2) between two tokens of a grid; at first each head of the largest
    square number of heads looks at one neighbour, and values pass unchanged. x: float [batch, h w, dim]. Returns the same shape.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False, locality: float = 1.0):
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.position = nn.Linear(3, heads)
        self.gate = nn.Parameter(torch.ones(heads))
        self.locality = locality
        self._offsets: dict[tuple[int, int], Tensor] = {}  # of grids seen, not part of the state

    @torch.no_grad()
    def look_at_neighbours(self) -> None:
        """The local initialisation."""
        self.v.weight.copy_(torch.eye(self.v.weight.shape[0]))
        side = int(self.heads**0.5)
        centre = (side - 1) / 2 if side % 2 == 0 else side // 2
        for head in range(side * side):
            column, row = divmod(head, side)
            self.position.weight[head] = torch.tensor([2 * (column - centre), 2 * (row - centre), -1.0])
        self.position.weight.mul_(self.locality)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k = split_heads(self.qk(x), self.heads, 2)
        (v,) = split_heads(self.v(x), self.heads)
        s = self.gate.sigmoid()[:, None, None]
        near = self.position(self.offsets(grid, x)).permute(2, 0, 1).softmax(-1)  # heads n n, for all images
        content = F.scaled_dot_product_attention(q, k, v)
        return self.out(merge_heads((1 - s) * content + (s * near).to(v.dtype) @ v))

    def offsets(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """(dx, dy, dx^2 + dy^2) from each token to each, float [h w, h w, 3]."""
        found = self._offsets.get(grid)
        if found is None or found.device != like.device:
            y, x = torch.meshgrid(*(torch.arange(n, device=like.device, dtype=torch.float32) for n in grid), indexing="ij")
            x, y = x.flatten(), y.flatten()
            dx, dy = x[None] - x[:, None], y[None] - y[:, None]
            found = torch.stack([dx, dy, dx**2 + dy**2], -1)
            self._offsets = {grid: found}
        return found
