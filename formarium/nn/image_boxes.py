"""Upright boxes in images: two ways to write them, overlaps. Masks as discrete cosine codes live in nn/mask_codes.py."""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) to (left, top, right, bottom), float [..., 4]."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def from_corners(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) to (centre x, centre y, width, height), float [..., 4]."""
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)


def area(boxes: Tensor) -> Tensor:
    """Of corner boxes [..., 4]: float [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection over union, union) of corner boxes, broadcast: a[:, None] and b[None] give all pairs."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inner = (high - low).clamp_min(0).prod(-1)
    union = area(a) + area(b) - inner
    return inner / union.clamp_min(1e-12), union


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU minus the share of the enclosing box that neither covers (Rezatofighi et al., CVPR 2019), -1 to 1; corner boxes, broadcast."""
    overlap, union = iou(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp_min(0).prod(-1)
    return overlap - (hull - union) / hull.clamp_min(1e-12)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) of x in [0, 1], finite at both ends."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp_min(eps) / (1 - x).clamp_min(eps))
