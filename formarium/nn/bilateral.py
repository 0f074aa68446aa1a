"""The fast bilateral solver (Barron and Poole, ECCV 2016, arXiv 1511.03296): smooth a map where its image is smooth, keep the image's
edges.

Pixels fall into the cells of a grid over place, brightness and colour; the smooth solution is found on the occupied cells alone, as the
linear system (lambda (D_m - D_n B D_n) + diag(splat confidence)) y = splat(confidence * target).
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix, diags, identity
from scipy.sparse.linalg import cg

TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


class BilateralGrid:
    """The occupied cells of an image's bilateral grid. image: uint8 [height, width, 3]; the bandwidths are in pixels and grey levels."""

    def __init__(self, image: np.ndarray, sigma_spatial: float, sigma_luma: float, sigma_chroma: float):
        h, w = image.shape[:2]
        yuv = image.reshape(-1, 3) @ TO_YUV.T + np.array([0, 128.0, 128.0])
        y, x = np.divmod(np.arange(h * w), w)
        places = [x / sigma_spatial, y / sigma_spatial, yuv[:, 0] / sigma_luma, yuv[:, 1] / sigma_chroma, yuv[:, 2] / sigma_chroma]
        cells = np.stack([p.astype(np.int64) for p in places], 1)
        cells += 1 - cells.min(0)  # room for a neighbour below
        steps = np.cumprod([1, *(cells.max(0) + 2)[:-1]])  # ... and above, so that a cell's number is its own
        numbers, first, self.cell = np.unique(cells @ steps, return_index=True, return_inverse=True)
        self.pixels, self.cells, self.axes = h * w, len(numbers), cells.shape[1]
        self.splatter = csr_matrix((np.ones(self.pixels), (self.cell, np.arange(self.pixels))), (self.cells, self.pixels))
        self.blur = 2 * self.axes * identity(self.cells, format="csr")  # 1 2 1 along each axis
        own = cells[first] @ steps
        for step in steps:
            for neighbour in (own - step, own + step):
                at = np.searchsorted(numbers, neighbour).clip(max=len(numbers) - 1)
                there = np.flatnonzero(numbers[at] == neighbour)
                self.blur = self.blur + csr_matrix((np.ones(len(there)), (there, at[there])), (self.cells, self.cells))

    def splat(self, values: np.ndarray) -> np.ndarray:
        """Sums of pixel values [pixels] by cell."""
        return self.splatter @ values

    def slice(self, values: np.ndarray) -> np.ndarray:
        """Each pixel's cell's value."""
        return values[self.cell]

    def balanced(self, iterations: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The diagonals n and m that make the blur (nearly) bistochastic; m is made to fit n exactly."""
        m, n = self.splat(np.ones(self.pixels)), np.ones(self.cells)
        for _ in range(iterations):
            n = np.sqrt(n * m / (self.blur @ n))
        return n, n * (self.blur @ n)


def bilateral_solve(
    image: np.ndarray,
    target: np.ndarray,
    *,
    sigma_spatial: float = 16,
    sigma_luma: float = 16,
    sigma_chroma: float = 8,
    smoothness: float = 256,
    confidence: float = 0.999,
    diagonal_min: float = 1e-5,
    tolerance: float = 1e-5,
    iterations: int = 25,
) -> np.ndarray:
    """A map [height, width] smoothed along its image, uint8 [height, width, 3]: float64 [height, width]."""
    grid = BilateralGrid(image, sigma_spatial, sigma_luma, sigma_chroma)
    n, m = grid.balanced()
    weight = np.full(grid.pixels, confidence)
    data, wanted = grid.splat(weight), grid.splat(target.reshape(-1).astype(np.float64) * weight)
    system = smoothness * (diags(m) - diags(n) @ grid.blur @ diags(n)) + diags(data)
    jacobi = diags(1 / np.maximum(system.diagonal(), diagonal_min))
    solution, _ = cg(system.tocsr(), wanted, x0=wanted / data, M=jacobi, maxiter=iterations, rtol=tolerance)
    return grid.slice(solution).reshape(target.shape)
