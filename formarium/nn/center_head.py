"""Boxes as points (CenterPoint, Yin et al. 2021): heatmaps of centres, and what a box is regressed to at its centre's cell.

A box is (x, y, z, dx, dy, dz, yaw[, vx, vy]) in metres, radians and metres a second. Maps are [batch, c, h, w] over the ground plane, h
along y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formarium.nn.bev import bev_norm
from formarium.nn.ops.boxes import iou_3d_pairs


class Centers(NamedTuple):
    """What a head says of each cell: heatmap, logits [b, classes, h, w]; offset [b, 2, h, w], of the centre from the cell's corner, in
    cells; height [b, 1, h, w], z in metres; size [b, 3, h, w], log metres; turn [b, 2, h, w], cosine and sine of the yaw; iou [b, 1, h,
    w], the expected 3D IoU scaled to [-1, 1]; speed [b, 2, h, w] (None where the head has none)."""

    heatmap: Tensor
    offset: Tensor
    height: Tensor
    size: Tensor
    turn: Tensor
    iou: Tensor | None
    speed: Tensor | None


class Targets(NamedTuple):
    """heatmap [b, classes, h, w] in [0, 1]; cell int64 [b, m], y * w + x; valid bool [b, m]; values [b, m, 8 or 10], what the maps should
    say there (offset, height, size, turn, speed); boxes [b, m, 7 or 9]."""

    heatmap: Tensor
    cell: Tensor
    valid: Tensor
    values: Tensor
    boxes: Tensor


_PARTS = {"offset": 2, "height": 1, "size": 3, "turn": 2, "iou": 1, "speed": 2}


class CenterHead(nn.Module):
    """A shared convolution, then one head a group of classes, each of small branches: conv3-BN-ReLU-conv3.

    groups: how many classes each head has. `forward` gives one Centers a group.
    """

    def __init__(self, in_channels: int, channels: int, groups: Sequence[int], iou: bool = True, speed: bool = False, convs: int = 2):
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False), bev_norm(channels), nn.ReLU())
        parts = {k: n for k, n in _PARTS.items() if (k != "iou" or iou) and (k != "speed" or speed)}
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: _branch(channels, out, convs) for name, out in {**parts, "heatmap": classes}.items()})
            for classes in groups
        )
        for head in self.heads:
            nn.init.constant_(head["heatmap"][-1].bias, -2.19)  # a share of 0.1 cells at first

    def forward(self, x: Tensor) -> list[Centers]:
        x = self.shared(x)
        return [Centers(*(head[f](x) if f in head else None for f in Centers._fields)) for head in self.heads]


def _branch(channels: int, out: int, convs: int) -> nn.Sequential:
    inner = [nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), bev_norm(channels), nn.ReLU()) for _ in range(convs - 1)]
    branch = nn.Sequential(*inner, nn.Conv2d(channels, out, 3, 1, 1))
    for module in branch.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return branch


# targets -----------------------------------------------------------------------------------------------------------


def gaussian_radius(dx: Tensor, dy: Tensor, overlap: float) -> Tensor:
    """How far (in cells) corners of a dx by dy box may lie off for it still to overlap the true one by `overlap` (CornerNet, Law and Deng
    2018; the roots are those of its released code)."""
    total, area = dx + dy, dx * dy
    r1 = (total + (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    r2 = (2 * total + (4 * total**2 - 16 * area * (1 - overlap)).sqrt()) / 2
    r3 = (-2 * overlap * total + (4 * overlap**2 * total**2 - 16 * overlap * area * (overlap - 1)).sqrt()) / 2
    return torch.minimum(torch.minimum(r1, r2), r3)


def center_targets(
    boxes: Tensor, label: Tensor, classes: Sequence[int], size: tuple[int, int], origin: Tensor, cell: Tensor, overlap: float, least: int
) -> Targets:
    """Targets of one head. boxes: [b, m, 7 or 9]; label: int64 [b, m], -1 for padding; classes: the labels that are this head's.

    size: (h, w) of the map; origin, cell: [2], metres along x and y of its corner and of a cell. overlap, least: of the Gaussians' radius.
    A box whose centre lies off the map is pulled to its edge.
    """
    h, w = size
    own = torch.full_like(label, -1)
    for i, c in enumerate(classes):
        own = torch.where(label == c, i, own)
    valid = (own >= 0) & (boxes[..., 3:6] > 0).all(-1)
    centre = (boxes[..., :2] - origin) / cell
    centre = torch.minimum(centre.clamp_min(0), centre.new_tensor([w - 0.5, h - 0.5]))
    corner = centre.floor()
    span = boxes[..., 3:5].clamp_min(1e-3) / cell
    radius = gaussian_radius(span[..., 0], span[..., 1], overlap).floor().clamp_min(least)
    # the Gaussian is a product of one along x and one along y, cut at the radius
    sigma = ((2 * radius + 1) / 6)[..., None]
    gap_x = torch.arange(w, device=boxes.device) - corner[..., :1]  # b m w
    gap_y = torch.arange(h, device=boxes.device) - corner[..., 1:]
    near_x = torch.where(gap_x.abs() <= radius[..., None], (-(gap_x**2) / (2 * sigma**2)).exp(), 0.0)
    near_y = torch.where(gap_y.abs() <= radius[..., None], (-(gap_y**2) / (2 * sigma**2)).exp(), 0.0)
    heatmap = boxes.new_zeros(len(label), len(classes), h, w)
    for i, j in valid.nonzero().tolist():  # boxes are few, their maps large
        at = heatmap[i, own[i, j]]
        torch.maximum(at, near_y[i, j, :, None] * near_x[i, j], out=at)
    size_log = boxes[..., 3:6].clamp_min(1e-3).log()
    values = torch.cat([centre - corner, boxes[..., 2:3], size_log, boxes[..., 6:7].cos(), boxes[..., 6:7].sin(), boxes[..., 7:]], -1)
    place = corner[..., 1].long() * w + corner[..., 0].long()
    return Targets(heatmap, place, valid, values, boxes)


# losses ------------------------------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """CornerNet's focal loss of a heatmap: cells that are 1 are centres, the others count less the nearer they are to one."""
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = (target == 1).float()
    loss = -(p.log() * (1 - p) ** 2 * centre + (1 - p).log() * p**2 * (1 - target) ** 4 * (1 - centre))
    return loss.sum() / centre.sum().clamp_min(1)


def at_cells(maps: Tensor, cell: Tensor) -> Tensor:
    """What maps [b, c, h, w] say at cells int64 [b, m]: [b, m, c]."""
    return maps.flatten(2).gather(2, cell[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)


def regressed(out: Centers) -> Tensor:
    """What makes a box, as maps [b, 8 or 10, h, w]: offset, height, log size, turn, speed."""
    return torch.cat([m for m in (out.offset, out.height, out.size, out.turn, out.speed) if m is not None], 1).float()


def decode(values: Tensor, cell: Tensor, width: int, origin: Tensor, size: Tensor) -> Tensor:
    """Boxes [..., 7 or 9] of regressed values [..., 8 or 10] (offset, height, log size, turn, speed) at cells int64 [...]."""
    corner = torch.stack([cell % width, cell // width], -1)
    xy = (corner + values[..., :2]) * size + origin
    yaw = torch.atan2(values[..., 7:8], values[..., 6:7])
    return torch.cat([xy, values[..., 2:3], values[..., 3:6].exp(), yaw, values[..., 8:]], -1)


def diou_aligned(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU of the volumes of boxes [n, 7+], both taken as lying along the axes (their yaw plays no part): float [n] in [-1, 1]."""
    low = torch.maximum(a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2)
    high = torch.minimum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2)
    shared = (high - low).clamp_min(0).prod(1)
    union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - shared
    hull_low = torch.minimum(a[:, :3] - a[:, 3:6] / 2, b[:, :3] - b[:, 3:6] / 2)
    hull_high = torch.maximum(a[:, :3] + a[:, 3:6] / 2, b[:, :3] + b[:, 3:6] / 2)
    apart = ((a[:, :3] - b[:, :3]) ** 2).sum(1) / ((hull_high - hull_low) ** 2).sum(1)
    return (shared / union - apart).clamp(-1, 1)


def center_losses(
    out: Centers, target: Targets, origin: Tensor, cell: Tensor, weight: float, code_weights: Sequence[float], iou_regression: bool
) -> dict[str, Tensor]:
    """Terms of one head, weighted: heatmap (focal), regression (L1 over boxes, times `weight`), iou (L1 of the IoU branch), and diou (the
    boxes' own, times `weight`) where `iou_regression`."""
    terms = {"heatmap": focal_loss(out.heatmap, target.heatmap)}
    count = target.valid.sum().clamp_min(1)
    said = at_cells(regressed(out), target.cell)  # b m 8|10
    known = target.valid[..., None] & ~target.values.isnan()
    error = torch.where(known, (said - target.values.nan_to_num()).abs(), 0.0).sum((0, 1)) / count
    terms["regression"] = weight * (error * error.new_tensor(code_weights)[: error.shape[0]]).sum()
    boxes = decode(said, target.cell, out.heatmap.shape[-1], origin, cell)[target.valid]
    truth = target.boxes[target.valid]
    if out.iou is not None:
        wanted = 2 * iou_3d_pairs(boxes.detach(), truth) - 1
        guess = at_cells(out.iou.float(), target.cell)[target.valid][:, 0]
        terms["iou"] = (guess - wanted).abs().sum() / count
    if iou_regression:
        terms["diou"] = weight * (1 - diou_aligned(boxes, truth)).sum() / count
    return terms


# boxes out ---------------------------------------------------------------------------------------------------------


def best_boxes(out: Centers, origin: Tensor, cell: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The `most` best cells of one head: boxes [b, k, 7 or 9], scores [b, k] in [0, 1], classes int64 [b, k], expected IoU [b, k] in [0, 1]
    (None where the head has no such branch)."""
    _, c, h, w = out.heatmap.shape
    score, at = out.heatmap.float().sigmoid().flatten(1).topk(min(most, c * h * w))
    place = at % (h * w)
    values = at_cells(regressed(out), place)
    iou = ((at_cells(out.iou.float(), place)[..., 0] + 1) / 2).clamp(0, 1) if out.iou is not None else None
    return decode(values, place, w, origin, cell), score, at // (h * w), iou
