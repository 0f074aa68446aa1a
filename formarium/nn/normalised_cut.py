"""The normalised cut of a graph of feature vectors (Shi and Malik 2000, as Wang et al., CVPR 2022, use it on a transformer's patches).

Patches are nodes; an edge weighs 1 where two are alike (cosine above tau) and eps where not. The second smallest eigenvector of
(D - W) v = lambda D v splits them in two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh

LANCZOS_FROM = 400  # nodes from which on iterations beat a decomposition


@dataclass(frozen=True)
class Cut:
    """vector: float64 [h, w], turned so that the seed is foreground. foreground: bool [h, w], all of that side. seed: index of the node
    with the largest magnitude. mask: bool [h, w], the connected part of the foreground that holds the seed. value: the eigenvalue."""

    vector: np.ndarray
    foreground: np.ndarray
    seed: int
    mask: np.ndarray
    value: float

    def box(self, patch: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) of the mask in pixels, for patches of (height, width) pixels, clipped to an image of (height, width)."""
        rows, columns = np.nonzero(self.mask)
        x0, y0 = columns.min() * patch[1], rows.min() * patch[0]
        x1, y1 = (columns.max() + 1) * patch[1], (rows.max() + 1) * patch[0]
        return int(x0), int(y0), int(min(x1, size[1])), int(min(y1, size[0]))


def affinity(features: np.ndarray, tau: float, eps: float, weighted: bool = False) -> np.ndarray:
    """Edge weights [n, n] of features [n, channels]: 1 where the cosine is above tau, else eps; weighted: the cosine itself where it is at
    least tau, as the paper's ablation has it."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    if weighted:
        return np.where(cosine < tau, np.asarray(eps, cosine.dtype), cosine)
    return np.where(cosine > tau, 1.0, eps)


def second_eigenvector(weights: np.ndarray, lanczos: bool | None = None) -> tuple[float, np.ndarray]:
    """(eigenvalue, vector) of (D - W) v = lambda D v, the second smallest, v scaled to v^T D v = 1. weights: symmetric [n, n].

    With u = D^(1/2) v it is the second largest of D^(-1/2) W D^(-1/2), whose largest, D^(1/2) 1, is known and taken out. lanczos: iterate
    instead of decomposing (by default from LANCZOS_FROM nodes on), which costs n^2 instead of n^3.
    """
    w = weights.astype(np.float64)
    degree = w.sum(1)
    root = np.sqrt(degree)
    if lanczos is None:
        lanczos = len(w) >= LANCZOS_FROM
    if not lanczos:  # two vectors are asked for: where equal nodes tie, rounding then decides as in the authors' code
        values, vectors = eigh(np.diag(degree) - w, np.diag(degree), subset_by_index=[1, 2])
        return float(values[0]), vectors[:, 0]
    scaled = w / root[:, None] / root[None]
    first = root / np.linalg.norm(root)

    def times(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1)
        x = x - first * (first @ x)
        y = scaled @ x
        return y - first * (first @ y)

    start = np.random.default_rng(0).standard_normal(len(w))
    operator = LinearOperator(scaled.shape, matvec=times, dtype=np.float64)
    values, vectors = eigsh(operator, k=1, which="LA", v0=start - first * (first @ start), tol=1e-10)
    return float(1 - values[0]), vectors[:, 0] / root


def normalised_cut(
    features: np.ndarray, grid: tuple[int, int], tau: float = 0.2, eps: float = 1e-5, weighted: bool = False, lanczos: bool | None = None
) -> Cut:
    """Cut the patches of an image in two. features: float [h w, channels], row-major over grid = (h, w)."""
    value, vector = second_eigenvector(affinity(features, tau, eps, weighted), lanczos)
    inside = vector > vector.mean()
    seed = int(np.abs(vector).argmax())
    if not inside[seed]:
        vector, inside = -vector, ~inside
    parts, _ = ndimage.label(inside.reshape(grid))
    mask = parts == parts.reshape(-1)[seed]
    return Cut(vector.reshape(grid), inside.reshape(grid), seed, mask, value)
