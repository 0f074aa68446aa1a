"""The Frechet distance, which generators of several kinds are scored by, each in a feature space of its own."""

from __future__ import annotations

import numpy as np


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance between Gaussians fitted to two sets of points [samples, dims]."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(ca @ cb)  # the trace of the root of a product of two covariances
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(max(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * root, 0.0))
