"""Neighbours, samples and groups of points in plain PyTorch, for batches of clouds that are padded to one length.

A cloud is float [batch, n, 3] with int64 [batch] counts: only the first count[i] points of cloud i are real. Nothing here looks at padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PAIRS = 1 << 24  # distances held at a time


def real(count: Tensor, size: int) -> Tensor:
    """Which of `size` places hold points: bool [batch, size]."""
    return torch.arange(size, device=count.device) < count[:, None]


@torch.no_grad()
def farthest_points(points: Tensor, count: Tensor, samples: int) -> Tensor:
    """Farthest point sampling from each cloud's first point: int64 [batch, samples], each point the one farthest from all before it.

    Where a cloud has fewer points than samples, the rest are repeats; callers know from the counts which are real.
    """
    b, n, _ = points.shape
    axes = points.unbind(2)  # b n each: faster to sweep than [b, n, 3]
    nearest = torch.where(real(count, n), 1e10, -1.0).to(points.dtype)
    chosen = torch.zeros(b, samples, dtype=torch.int64, device=points.device)
    last = chosen[:, :1]
    for i in range(1, samples):
        d = torch.zeros_like(nearest)
        for a in axes:
            d += (a - a.gather(1, last)) ** 2
        nearest = torch.minimum(nearest, d)
        last = nearest.argmax(1, keepdim=True)
        chosen[:, i : i + 1] = last
    return chosen


@torch.no_grad()
def nearest_neighbours(queries: Tensor, points: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query, nearest first: (int64 [batch, m, k], distances [batch, m, k]).

    A cloud with fewer than k points fills the rest with its first point (at infinite distance).
    """
    n = points.shape[1]
    hidden = ~real(count, n)[:, None]
    step = max(1, _PAIRS // (n * len(points)))
    found = []
    for part in queries.split(step, 1):
        d = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(hidden, math.inf)
        near = d.topk(min(k, n), dim=2, largest=False)
        found.append((near.indices.masked_fill(near.values.isinf(), 0), near.values))
    index, distance = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    if k > n:
        index = torch.nn.functional.pad(index, (0, k - n))
        distance = torch.nn.functional.pad(distance, (0, k - n), value=math.inf)
    return index, distance


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [batch, n, c] at int64 [batch, ...]: [batch, ..., c]."""
    start = torch.arange(len(x), device=x.device) * x.shape[1]
    return x.flatten(0, 1)[index + start.view(-1, *(1,) * (index.ndim - 1))]


@torch.no_grad()
def interpolation(queries: Tensor, points: Tensor, count: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """The k nearest points of each query and their weights, in proportion to 1 / distance: int64 and float [batch, m, k]."""
    index, distance = nearest_neighbours(queries, points, count, k)
    weight = 1 / (distance + 1e-8)
    return index, weight / weight.sum(2, keepdim=True)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors [..., 3], in radians, 0 to pi: [...]. Exact near 0 and pi too, where arccos isn't."""
    return torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))


def pair_features(points: Tensor, normals: Tensor, other: Tensor, other_normals: Tensor) -> Tensor:
    """Point pair features (Drost et al. 2010): distance d, and the angles between each normal and d and between the normals, over pi.

    points, normals: [..., 3]; other, other_normals: [..., k, 3]. Returns [..., k, 4]. No rigid motion of both changes them.
    """
    d = other - points.unsqueeze(-2)
    n = normals.unsqueeze(-2).expand_as(d)
    return torch.stack([d.norm(dim=-1), *(angle(a, b) / math.pi for a, b in ((n, d), (other_normals, d), (n, other_normals)))], -1)
