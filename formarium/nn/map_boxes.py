"""From a map of where the object is to boxes around it: thresholds and connected components."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

_EIGHT = np.ones((3, 3), dtype=bool)  # neighbours, corners too


def min_max(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Each map from its least value to 0 and its greatest to (nearly) 1: float [batch, h, w]."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + eps)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, [batch, h, w] -> [batch, *size]."""
    return F.interpolate(maps[:, None].float(), size=size, mode="bilinear")[:, 0]


def component_boxes(mask: np.ndarray) -> np.ndarray:
    """The boxes of all connected parts of a mask, bool [height, width]: int64 [parts, 4], (left, top, right, bottom), ends exclusive."""
    parts, _ = ndimage.label(mask, _EIGHT)
    found = ndimage.find_objects(parts)
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in found], dtype=np.int64).reshape(-1, 4)


def largest_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box of the part with most pixels, as `component_boxes` has them; the whole image where there is none."""
    parts, count = ndimage.label(mask, _EIGHT)
    if not count:
        return 0, 0, mask.shape[1], mask.shape[0]
    most = int(np.bincount(parts.ravel())[1:].argmax())
    y, x = ndimage.find_objects(parts)[most]
    return x.start, y.start, x.stop, y.stop


def map_boxes(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Boxes of maps, float [batch, h, w], in an image of `size` (height, width): each map from 0 to 1, enlarged, what is above the
    threshold, its largest part. float32 [batch, 4], (left, top, right, bottom) in pixels."""
    masks = (enlarge(min_max(maps.float()), size) > threshold).cpu().numpy()
    return torch.tensor([largest_box(m) for m in masks], dtype=torch.float32, device=maps.device).view(-1, 4)
