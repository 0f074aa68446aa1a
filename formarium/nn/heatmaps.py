"""Heat-maps of points: unbiased Gaussian targets, distribution-aware decoding, the flip test.

Coordinates are pixel centres: a map of width W spans 0 .. W - 1, and so does an image (Huang et al., "The Devil is in the Details", CVPR
2020); between the two lies the factor (W_image - 1) / (W_map - 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_targets(points: Tensor, visible: Tensor, size: tuple[int, int], sigma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Gaussians of height 1 at sub-pixel places, cut off 3 sigma from the nearest pixel.

    points: float [batch, joints, 2], (x, y) in map pixels. visible: float [batch, joints], 0 for joints without a target. size: (height,
    width) of the maps. Returns (targets [batch, joints, height, width], weights [batch, joints]): a joint whose Gaussian lies wholly
    outside has weight 0.
    """
    height, width = size
    reach = 3 * sigma
    place = (points + 0.5).trunc()  # the nearest pixel, for points inside
    xs, ys = (torch.arange(n, device=points.device, dtype=points.dtype) for n in (width, height))

    def along(axis: Tensor, at: Tensor, near: Tensor) -> Tensor:
        return torch.exp(-((axis - at[..., None]) ** 2) / (2 * sigma**2)) * ((axis - near[..., None]).abs() <= reach)

    inside = (place[..., 0] - reach < width) & (place[..., 1] - reach < height) & (place + reach + 1 >= 0).all(-1)
    weights = visible * inside
    rows, columns = along(ys, points[..., 1], place[..., 1]), along(xs, points[..., 0], place[..., 0])
    return rows[..., :, None] * columns[..., None, :] * (weights > 0.5)[..., None, None], weights


def heatmap_loss(maps: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The mean squared error of maps [batch, joints, height, width], each joint's map and target times its weight [batch, joints]."""
    return ((maps.float() - targets) * weights[..., None, None]).square().mean()


def peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(places [batch, joints, 2] as (x, y) of the largest value, that value [batch, joints])."""
    values, index = maps.flatten(2).max(-1)
    width = maps.shape[-1]
    return torch.stack([index % width, index // width], -1).to(maps.dtype), values


def blur(maps: Tensor, kernel: int) -> Tensor:
    """A Gaussian blur of odd width `kernel`, deviation 0.3 ((kernel - 1) / 2 - 1) + 0.8, the border mirrored."""
    reach, sigma = kernel // 2, 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    taps = torch.exp(-(torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    flat = F.pad(maps.flatten(0, 1)[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1)).view_as(maps)


def dark(maps: Tensor, kernel: int = 11) -> tuple[Tensor, Tensor]:
    """Distribution-aware decoding (Zhang et al., CVPR 2020, in the form of UDP): one Newton step on the logarithm of the blurred map, from
    the peak. maps: float [batch, joints, height, width]. Returns (places [batch, joints, 2] in map pixels, peak values [batch, joints])."""
    maps = maps.float()
    places, values = peaks(maps)
    width = maps.shape[-1]
    reach = min(kernel // 2, maps.shape[-1] - 1, maps.shape[-2] - 1)  # tiny maps take a narrower blur
    logs = F.pad(blur(maps, 2 * reach + 1).clamp(0.001, 50).log(), (1, 1, 1, 1), mode="replicate").flatten(2)
    centre = ((places[..., 1] + 1) * (width + 2) + places[..., 0] + 1).long()

    def at(dx: int, dy: int) -> Tensor:
        return logs.gather(2, (centre + dx + dy * (width + 2))[..., None])[..., 0]

    here, left, right, up, down = at(0, 0), at(-1, 0), at(1, 0), at(0, -1), at(0, 1)
    gradient = 0.5 * torch.stack([right - left, down - up], -1)  # b k 2
    xx, yy = right - 2 * here + left, down - 2 * here + up
    xy = 0.5 * (at(1, 1) - right - down + 2 * here - left - up + at(-1, -1))
    eps = torch.finfo(torch.float32).eps
    xx, yy = xx + eps, yy + eps
    determinant = xx * yy - xy * xy
    determinant = torch.where(determinant.abs() < 1e-12, torch.full_like(determinant, 1e-12), determinant)
    step = torch.stack([yy * gradient[..., 0] - xy * gradient[..., 1], xx * gradient[..., 1] - xy * gradient[..., 0]], -1)
    return places - step / determinant[..., None], values


def swapped(pairs: Sequence[tuple[int, int]], joints: int) -> list[int]:
    """The order of joints in a mirror image: left and right ones change places."""
    order = [*range(joints)]
    for left, right in pairs:
        order[left], order[right] = right, left
    return order


def flip_back(maps: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Maps of the mirrored image as those of the image: mirrored, left and right joints exchanged."""
    return maps[:, swapped(pairs, maps.shape[1])].flip(-1)
