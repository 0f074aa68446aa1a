"""A learned filter as large as the map, applied in the frequency domain (Rao et al., "Global Filter Networks", NeurIPS 2021).

y = irfft2(rfft2(x) * K), which is one circular depthwise convolution per channel with the kernel irfft2(K), at the cost of two transforms.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

Grid = tuple[int, int]
PRODUCTS_UP_TO = 64  # sides; up to there, transforms as matrix products are the faster on the CPU, in the layout that the map has


class GlobalFilter(nn.Module):
    """x: float [b, height, width, dim], any size. Returns the same shape and dtype; float32 inside, also under autocast.

    grid: (height, width) of the map whose frequencies the weight holds: complex [height, width // 2 + 1, dim], kept as pairs (real,
    imaginary) in a last axis of 2. Maps of another size get the response at their own frequencies, interpolated between these (in
    cycles per pixel, so a kernel keeps its extent in pixels). The imaginary part of a frequency that is its own mirror
    (0 or Nyquist on both axes) has no effect on an output that is real.
    """

    def __init__(self, dim: int, grid: Grid, std: float = 0.02):
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2) * std)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            weight = resize_response(self.weight.to(dtype), self.grid, grid)
            return filter_map(x.to(dtype), weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, dim={self.weight.shape[2]}"


def filter_map(x: Tensor, weight: Tensor) -> Tensor:
    """irfft2(rfft2(x) * weight) over the axes 1 and 2. x: float [b, h, w, c]; weight: [h, w // 2 + 1, c, 2]. Returns x's shape."""
    products = torch.compiler.is_compiling() or (x.device.type == "cpu" and max(x.shape[1:3]) <= PRODUCTS_UP_TO)
    return filter_by_products(x, weight) if products else filter_by_fft(x, weight)


def filter_by_fft(x: Tensor, weight: Tensor) -> Tensor:
    y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * torch.view_as_complex(weight.contiguous())
    return torch.fft.irfft2(y, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def filter_by_products(x: Tensor, weight: Tensor) -> Tensor:
    """The same, each one-dimensional transform being a product with its matrix; real arithmetic only, so it exports anywhere."""
    b, h, w, c = x.shape
    n = w // 2 + 1
    into, down, up, back = (torch.from_numpy(m).to(x) for m in transforms(h, w))
    y = (into @ x).view(b, 2 * h, n * c)  # rows to half spectra: b (h 2) (n c)
    y = (down @ y).view(b, h, 2, n, c)  # b frequency (real, imaginary) n c
    real, imaginary = y.unbind(2)
    wr, wi = weight.unbind(3)
    y = torch.stack([real * wr - imaginary * wi, real * wi + imaginary * wr], 2)
    return back @ (up @ y.view(b, 2 * h, n * c)).view(b, h, 2 * n, c)


@lru_cache(maxsize=32)
def transforms(h: int, w: int) -> tuple[np.ndarray, ...]:
    """Orthonormal transforms of an h x w map as float32 matrices: rows into half spectra [2 (w // 2 + 1), w], columns forth and back
    [2 h, 2 h] over (place, real or imaginary), half spectra back to rows [w, 2 (w // 2 + 1)]."""
    angle = 2 * np.pi / w * np.outer(np.arange(w // 2 + 1), np.arange(w))
    cos, sin = np.cos(angle) / np.sqrt(w), np.sin(angle) / np.sqrt(w)
    twice = np.full((w // 2 + 1, 1), 2.0)  # a frequency stands for its mirror too,
    twice[0] = 1
    if w % 2 == 0:
        twice[-1] = 1  # but for those that are their own
    into, back = np.concatenate([cos, -sin]), np.concatenate([twice * cos, -twice * sin]).T
    angle = 2 * np.pi / h * np.outer(np.arange(h), np.arange(h))
    cos, sin = np.cos(angle) / np.sqrt(h), np.sin(angle) / np.sqrt(h)
    down = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], 1).reshape(2 * h, 2 * h)
    return tuple(np.ascontiguousarray(m) for m in (into, down, down.T, back))


def resize_response(weight: Tensor, old: Grid, new: Grid) -> Tensor:
    """A response [old h, old w // 2 + 1, c, 2] at the frequencies of another grid, linear between its own: [new h, new w // 2 + 1, c, 2].

    Rows wrap round; columns beyond the last frequency known take that one's.
    """
    if old == new:
        return weight
    if old[0] != new[0]:
        at = np.fft.fftfreq(new[0]) * old[0]
        low = np.floor(at)
        first, second = low.astype(int) % old[0], (low.astype(int) + 1) % old[0]
        weight = _between(weight, 0, first, second, at - low)
    if old[1] != new[1]:
        last = old[1] // 2
        at = np.minimum(np.fft.rfftfreq(new[1]) * old[1], last)
        low = np.floor(at)
        weight = _between(weight, 1, low.astype(int), np.minimum(low.astype(int) + 1, last), at - low)
    return weight


def _between(x: Tensor, axis: int, first: np.ndarray, second: np.ndarray, share: np.ndarray) -> Tensor:
    a, b = (x.index_select(axis, torch.from_numpy(i).to(x.device)) for i in (first, second))
    return torch.lerp(a, b, torch.from_numpy(share).to(x).view(-1, *(1,) * (x.ndim - axis - 1)))
