"""Multi-scale deformable attention (Zhu et al., ICLR 2021): a query reads a few points of each map, bilinearly, and sums them by weights.

`sampled_by_grid` says what is computed, level by level with grid_sample. `sampled_by_bag` computes the same: a bilinear sample is a
weighted sum of four pixels, so that a query's result is one weighted sum of 4 * levels * points rows of the value table, which
`F.embedding_bag` does in one pass, without copying the maps. On the maps of a whole photograph it takes a tenth of the time; on small ones,
whose copies cost little, grid_sample is the faster one. `deformable_attention` takes whichever is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]
LARGE = 1024  # pixels of all levels from which on the bag is the faster one


def sampled_by_grid(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """value: float [batch, sum of h w, heads, width], the levels' maps one after another, row-major, of `shapes` [(h, w), ...].
    locations: [batch, queries, heads, levels, points, 2], (x, y) in [0, 1] of a map's extent; what lies outside reads zeros.
    weights: [batch, queries, heads, levels, points]. Returns [batch, queries, heads * width]."""
    b, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = value.new_zeros(b * heads, width, queries)
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        h, w = shapes[level]
        maps = part.permute(0, 2, 3, 1).reshape(b * heads, width, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(b * heads, queries, points, 2)
        samples = F.grid_sample(maps, grid.to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        share = weights[:, :, :, level].transpose(1, 2).reshape(b * heads, 1, queries, points)
        out = out + (samples * share).sum(-1)
    return out.view(b, heads * width, queries).transpose(1, 2)


def deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """See `sampled_by_grid` for shapes and meaning."""
    plain = torch.compiler.is_compiling() or value.device.type != "cpu" or value.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if plain or value.shape[1] < LARGE:
        return sampled_by_grid(value, shapes, locations, weights)
    return sampled_by_bag(value, shapes, locations, weights)


def sampled_by_bag(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The same as `sampled_by_grid` (see there for shapes), by one gather and weighted sum over all levels."""
    b, total, heads, width = value.shape
    queries = locations.shape[1]
    sizes = torch.tensor([(w, h) for h, w in shapes], device=value.device)  # levels 2
    starts = torch.tensor([0, *(h * w for h, w in shapes[:-1])], device=value.device).cumsum(0)
    place = locations * sizes[:, None] - 0.5
    low = place.detach().floor()
    part = place - low  # b q heads levels points 2
    corner = low.long()
    rows, shares = [], []
    first = torch.arange(b, device=value.device)[:, None, None, None, None] * total * heads
    head = torch.arange(heads, device=value.device)[:, None, None]
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            w, h = sizes[:, 0, None], sizes[:, 1, None]
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            pixel = starts[:, None] + y.clamp_min(0).minimum(h - 1) * w + x.clamp_min(0).minimum(w - 1)
            rows.append(first + pixel * heads + head)
            along = (part[..., 0] if dx else 1 - part[..., 0]) * (part[..., 1] if dy else 1 - part[..., 1])
            shares.append(along * inside * weights)
    index = torch.stack(rows, -1).flatten(0, 2).flatten(1)  # (b q heads) (levels points 4)
    share = torch.stack(shares, -1).flatten(0, 2).flatten(1)
    out = F.embedding_bag(index, value.reshape(b * total * heads, width), per_sample_weights=share, mode="sum")
    return out.view(b, queries, heads * width)


class DeformableAttention(nn.Module):
    """Queries look at `points` places a head and level, whose offsets from a reference and weights they predict.

    query: float [batch, queries, dim]. reference: [batch, queries, levels, 2], places in [0, 1], or [..., 4], boxes (centre, size) whose
    size scales the offsets. memory: [batch, sum of h w, dim] of the levels' `shapes`. padding: bool [batch, sum of h w], True for what
    counts as zero. Returns [batch, queries, dim].
    """

    def __init__(self, dim: int, heads: int = 8, levels: int = 4, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reset()

    def reset(self) -> None:
        """Heads look in different directions, points at growing distance, all with the same weight."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        with torch.no_grad():
            self.offsets.weight.zero_()
            self.offsets.bias.copy_((direction[:, None, None] * steps[:, None]).expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.weights.weight)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.weights, self.value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: Shapes, padding: Tensor | None = None) -> Tensor:
        value = self.value(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        split = (self.heads, self.levels, self.points)
        offsets = self.offsets(query).unflatten(-1, (*split, 2))
        weights = self.weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, split[1:])
        at = reference[:, :, None, :, None, :2]  # b q heads levels points 2
        if reference.shape[-1] == 2:
            places = at + offsets / torch.tensor([(w, h) for h, w in shapes], device=query.device, dtype=offsets.dtype)[:, None]
        else:
            places = at + offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
        return self.out(deformable_attention(value, shapes, places, weights))
