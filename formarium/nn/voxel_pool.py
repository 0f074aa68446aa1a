"""Pooling of sparse voxels by attention over the slots of a cell (DSVT, Wang et al., CVPR 2023, section 3.4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]  # along x, y, z


class Pool(nn.Module):
    """Voxels of a cell of (x, y, z) `stride` become one. They stand in the cell's slots, zeros where it is empty.

    "attention": the maximum over all slots asks, slots with a learned embedding answer; "maxpool": that maximum alone; "linear":
    Linear-LN of the slots side by side.
    """

    def __init__(self, dim: int, out_dim: int, stride: Shape, kind: str, heads: int = 8):
        super().__init__()
        self.stride, self.kind, self.heads = stride, kind, heads
        volume = math.prod(stride)
        if kind == "linear":
            self.linear = nn.Linear(volume * dim, out_dim, bias=False)
            self.norm = nn.LayerNorm(out_dim)
        elif kind == "attention":
            self.slots = nn.Parameter(torch.empty(volume, dim))
            self.qkv = nn.Linear(dim, 3 * dim)
            self.out = nn.Linear(dim, dim)
            self.norm = nn.LayerNorm(dim)
            nn.init.zeros_(self.qkv.bias)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, coordinates: Tensor, space: Shape) -> tuple[Tensor, Tensor]:
        """x [n, dim] at int64 [n, 4] (sample, z, y, x) to [cells, out_dim] at [cells, 4], sorted by (sample, x, y, z)."""
        (sx, sy, sz), (nx, ny, nz) = self.stride, pooled_space(space, self.stride)
        sample, z, y, x_ = coordinates.unbind(1)
        key = ((sample * nx + x_ // sx) * ny + y // sy) * nz + z // sz
        key, cell = torch.unique(key, return_inverse=True)
        slot = (x_ % sx * sy + y % sy) * sz + z % sz
        volume = sx * sy * sz
        dense = x.new_zeros(len(key) * volume, x.shape[1]).index_copy(0, cell * volume + slot, x).unflatten(0, (-1, volume))
        pooled = torch.stack([key // (nx * ny * nz), key % nz, key // nz % ny, key // (ny * nz) % nx], 1)
        return self.reduce(dense), pooled

    def reduce(self, dense: Tensor) -> Tensor:
        """[cells, slots, dim] to [cells, out_dim]."""
        if self.kind == "linear":
            return self.norm(self.linear(dense.flatten(1)))
        most = dense.amax(1)
        if self.kind == "maxpool":
            return most
        wq, wk, wv = self.qkv.weight.chunk(3)
        bq, bk, bv = self.qkv.bias.chunk(3)
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for t in (F.linear(most[:, None], wq, bq), F.linear(dense + self.slots, wk, bk), F.linear(dense, wv, bv))
        )
        return self.norm(self.out(F.scaled_dot_product_attention(q, k, v).flatten(1)) + most)


def pooled_space(space: Shape, stride: Shape) -> Shape:
    return tuple(math.ceil(n / s) for n, s in zip(space, stride, strict=True))  # type: ignore[return-value]
