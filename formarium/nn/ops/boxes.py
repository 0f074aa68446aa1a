"""Rotated boxes seen from above: overlap areas, IoU and non-maximum suppression in plain PyTorch.

A box is (x, y, z, dx, dy, dz, yaw): centre in metres, full sizes along its own axes, yaw in radians about z, counter-clockwise from x.
Two rectangles overlap in a convex polygon whose corners are corners of one inside the other or crossings of their sides: 24 candidates,
sorted by angle around their mean, give the area by the shoelace formula.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PAIRS = 1 << 17  # pairs worked through at a time
_EPS = 1e-6


def corners_bev(boxes: Tensor) -> Tensor:
    """Corners of boxes [n, 7+] in the ground plane, counter-clockwise: float [n, 4, 2]."""
    signs = boxes.new_tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    local = signs * boxes[:, None, 3:5]
    cos, sin = boxes[:, 6].cos()[:, None], boxes[:, 6].sin()[:, None]
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack([x, y], -1) + boxes[:, None, :2]


def overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """Area that box a[i] and box b[i] share in the ground plane: [pairs, 7+] twice to float [pairs], in square metres."""
    if len(a) > _PAIRS:
        return torch.cat([overlap_bev(p, q) for p, q in zip(a.split(_PAIRS), b.split(_PAIRS), strict=True)])
    if not len(a):
        return a.new_zeros(0)
    origin = torch.cat([a[:, :2], torch.zeros_like(a[:, 2:7])], 1)
    a, b = a[:, :7] - origin, b[:, :7] - origin  # near zero, where float32 is fine
    p, q = corners_bev(a), corners_bev(b)  # n 4 2
    side_p, side_q = p.roll(-1, 1) - p, q.roll(-1, 1) - q
    between = q[:, None] - p[:, :, None]  # n 4 4 2
    det = _cross(side_p[:, :, None], side_q[:, None])
    safe = torch.where(det.abs() < _EPS, torch.ones_like(det), det)
    t = _cross(between, side_q[:, None].expand_as(between)) / safe
    u = _cross(between, side_p[:, :, None].expand_as(between)) / safe
    crosses = (det.abs() >= _EPS) & (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    crossing = p[:, :, None] + t[..., None] * side_p[:, :, None]
    points = torch.cat([p, q, crossing.flatten(1, 2)], 1)  # n 24 2
    valid = torch.cat([_inside(p, b), _inside(q, a), crosses.flatten(1)], 1)
    count = valid.sum(1, keepdim=True)
    points = torch.where(valid[..., None], points, torch.zeros_like(points))
    middle = points.sum(1) / count.clamp_min(1)
    spoke = points - middle[:, None]
    angle = torch.atan2(spoke[..., 1], spoke[..., 0]).masked_fill(~valid, float("inf"))
    order = angle.argsort(1)
    spoke = spoke.gather(1, order[..., None].expand_as(spoke))
    rank = torch.arange(24, device=a.device)
    polygon = torch.where((rank < count)[..., None], spoke, spoke[:, :1])  # what is no corner repeats the first one
    area = 0.5 * _cross(polygon, polygon.roll(-1, 1)).sum(1).abs()
    smaller = torch.minimum(a[:, 3] * a[:, 4], b[:, 3] * b[:, 4])
    return torch.where(count[:, 0] > 2, torch.minimum(area, smaller), torch.zeros_like(area))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points [n, 4, 2] lie in boxes [n, 7]: bool [n, 4]."""
    offset = points - boxes[:, None, :2]
    cos, sin = boxes[:, 6].cos()[:, None], boxes[:, 6].sin()[:, None]
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    half = boxes[:, None, 3:5] / 2 + 1e-5
    return (along.abs() <= half[..., 0]) & (across.abs() <= half[..., 1])


def iou_bev_pairs(a: Tensor, b: Tensor) -> Tensor:
    """IoU in the ground plane of a[i] and b[i]: float [pairs] in [0, 1]."""
    shared = overlap_bev(a, b)
    return shared / (a[:, 3] * a[:, 4] + b[:, 3] * b[:, 4] - shared).clamp_min(_EPS)


def iou_3d_pairs(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the volumes of a[i] and b[i]: float [pairs] in [0, 1]."""
    top = torch.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2)
    bottom = torch.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    shared = overlap_bev(a, b) * (top - bottom).clamp_min(0)
    return shared / (a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared).clamp_min(_EPS)


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """IoU in the ground plane of every a with every b: [n, 7+], [m, 7+] to float [n, m]. Only pairs that are near are worked out."""
    reach = a[:, None, 3:5].norm(dim=-1) / 2 + b[None, :, 3:5].norm(dim=-1) / 2
    near = (a[:, None, :2] - b[None, :, :2]).norm(dim=-1) < reach
    i, j = near.nonzero(as_tuple=True)
    out = a.new_zeros(len(a), len(b))
    out[i, j] = iou_bev_pairs(a[i], b[j])
    return out


def nms_bev(boxes: Tensor, scores: Tensor, threshold: float, most: int = 500) -> Tensor:
    """Greedy non-maximum suppression: indices int64 of boxes [n, 7+] kept, best score first.

    A box falls where its BEV IoU with a better kept one is above `threshold`; at most `most` are kept.
    """
    order = scores.argsort(descending=True, stable=True)
    beats = (iou_bev(boxes[order], boxes[order]) > threshold).cpu().numpy()
    alive, kept = np.ones(len(order), dtype=bool), []
    for i in range(len(order)):
        if alive[i]:
            kept.append(i)
            alive = alive & ~beats[i]
        if len(kept) == most:
            break
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]
