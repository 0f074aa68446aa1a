"""Bicubic resizing as MATLAB's imresize does it, the degradation that super-resolution is measured on.

Keys' kernel (a = -0.5); when it shrinks, the kernel is widened by the factor, so that nothing aliases; beyond the edge the image is
mirrored, the edge repeated. Each axis is one product with a matrix, so it exports and has a gradient.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5, zero from 2 on."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


@lru_cache(maxsize=128)
def resize_matrix(size: int, wanted: int) -> np.ndarray:
    """float64 [wanted, size]: each row the weights of one output sample; rows sum to 1."""
    scale = wanted / size
    width = 4 / min(scale, 1)  # of the kernel, in input samples
    centre = (np.arange(wanted) + 0.5) / scale - 0.5
    first = np.floor(centre - width / 2).astype(np.int64)
    taps = first[:, None] + np.arange(int(np.ceil(width)) + 2)
    weights = cubic((centre[:, None] - taps) * min(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    mirror = taps % (2 * size)
    mirror = np.where(mirror < size, mirror, 2 * size - 1 - mirror)
    matrix = np.zeros((wanted, size))
    np.add.at(matrix, (np.arange(wanted)[:, None], mirror), weights)
    return matrix


def imresize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float [h, w, channels] -> float64 [height, width, channels]; it may overshoot the range."""
    rows, columns = resize_matrix(image.shape[0], height), resize_matrix(image.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True)


def bicubic(x: Tensor, height: int, width: int) -> Tensor:
    """float [batch, channels, h, w] -> [batch, channels, height, width], the same numbers as `imresize`."""
    rows, columns = (torch.from_numpy(resize_matrix(a, b)).to(x) for a, b in ((x.shape[2], height), (x.shape[3], width)))
    return rows @ x @ columns.T
