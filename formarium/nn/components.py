"""Principal components of a set of feature vectors: what each explains, what is left without some, clusters along them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def centre(x: Tensor) -> Tensor:
    """x [samples, channels] minus its mean over samples."""
    return x - x.mean(0, keepdim=True)


@dataclass(frozen=True)
class Components:
    """The singular value decomposition of centred features, x - mean = u diag(s) v^T, leading components first.

    u [samples, k], s [k], v [channels, k], mean [1, channels], with k = min(samples, channels). The sign of a component is arbitrary;
    here each is turned so that its largest entry in v is positive.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    mean: Tensor

    @classmethod
    def of(cls, x: Tensor, centred: bool = False) -> Components:
        """The components of x, float [samples, channels], in float64. centred: take x as it is, without subtracting its mean."""
        x = x.double()
        mean = torch.zeros_like(x[:1]) if centred else x.mean(0, keepdim=True)
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        sign = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
        return cls(u * sign.T, s, (vh * sign).T, mean)

    @cached_property
    def explained(self) -> Tensor:
        """The share of the variance that each component explains, float64 [k]; zeros where all samples are alike."""
        power = self.s.square()
        return power / power.sum().clamp_min(torch.finfo(power.dtype).tiny)

    def count(self, share: float) -> int:
        """How many leading components explain this share of the variance."""
        return int((self.explained.cumsum(0) < share - 1e-12).sum().clamp_max(len(self.s) - 1)) + 1

    @property
    def participation(self) -> float:
        """The participation ratio (sum p)^2 / sum p^2 of the variances p: a smooth count of the directions in use."""
        square = self.explained.square().sum()
        return float(self.explained.sum().square() / square) if square > 0 else 0.0

    def project(self, k: int = 2) -> Tensor:
        """The samples on the k leading components, [samples, k]."""
        return self.u[:, :k] * self.s[:k]

    def without_leading(self, k: int) -> Tensor:
        """The centred features without their k leading components (0: all of them), [samples, channels]."""
        return (self.u[:, k:] * self.s[k:]) @ self.v[:, k:].T

    def only(self, k: int) -> Tensor:
        """Component k (from 0) of the centred features alone, [samples, channels]; over all k they add up to the features."""
        return (self.u[:, k : k + 1] * self.s[k]) @ self.v[:, k : k + 1].T


def clusters_on_line(values: Tensor, clusters: int) -> Tensor:
    """The best k-means clusters of numbers on a line, int64 [samples] in rising order of their means.

    Exact, by dynamic programming over the sorted values: clusters on a line are runs of them. values: float [samples].
    """
    ordered, order = values.double().sort()
    n, clusters = len(ordered), min(clusters, len(values.unique()))
    zero = ordered.new_zeros(1)
    total, squares = torch.cat([zero, ordered.cumsum(0)]), torch.cat([zero, ordered.square().cumsum(0)])
    width = torch.arange(n + 1, dtype=torch.float64)
    span = (width[None] - width[:, None]).clamp_min(1)
    cost = squares[None] - squares[:, None] - (total[None] - total[:, None]).square() / span  # of one cluster over i..j-1
    cost = cost.clamp_min(0).masked_fill(width[None] <= width[:, None], torch.inf)
    best, cuts = cost[0], []
    for _ in range(clusters - 1):
        best, cut = (best[:, None] + cost).min(0)  # the last cluster starts at `cut`
        cuts.append(cut)
    labels, end = torch.empty(n, dtype=torch.int64), n
    for label in range(clusters - 1, -1, -1):
        start = int(cuts[label - 1][end]) if label else 0
        labels[order[start:end]] = label
        end = start
    return labels


def component_clusters(projections: Tensor, clusters: int) -> Tensor:
    """Clusters of samples whose axes differ in scale: int64 [samples], 0 the largest, -1 for samples in none (Hsu et al. 2024, fig. 2).

    Each component's projections are clustered on their own; a sample's cell is the combination of its clusters, and the `clusters` cells
    that hold most samples are kept. projections: float [samples, components].
    """
    lines = torch.stack([clusters_on_line(column, clusters) for column in projections.T], 1)
    _, cell, counts = lines.unique(dim=0, return_inverse=True, return_counts=True)
    kept = counts.argsort(descending=True, stable=True)[:clusters]
    rank = torch.full_like(counts, -1)
    rank[kept] = torch.arange(len(kept))
    return rank[cell]
