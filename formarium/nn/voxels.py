"""From a ragged cloud of points to the features of occupied voxels, and from voxels to a map seen from above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def grid_size(point_range: Sequence[float], voxel_size: Sequence[float]) -> tuple[int, int, int]:
    """Voxels along x, y, z of a range (x0, y0, z0, x1, y1, z1), both in metres."""
    return tuple(round((point_range[i + 3] - point_range[i]) / voxel_size[i]) for i in range(3))  # type: ignore[return-value]


class PointFeatures(nn.Module):
    """One layer of the encoder: Linear-BN-ReLU of every point, and the maximum over the points of its voxel.

    forward: float [points, in], int64 [points] voxel of each, voxels -> the maxima [voxels, out] where `last`, else every point's own
    features beside its voxel's maximum, [points, out].
    """

    def __init__(self, in_features: int, out_features: int, last: bool, norm: bool = True):
        super().__init__()
        self.last = last
        width = out_features if last else out_features // 2
        self.linear = nn.Linear(in_features, width, bias=not norm)
        self.norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.01) if norm else nn.Identity()

    def forward(self, x: Tensor, voxel: Tensor, voxels: int) -> Tensor:
        x = self.norm(self.linear(x)).relu()
        start = x.new_zeros(voxels, x.shape[1])  # no feature is below zero
        most = start.scatter_reduce(0, voxel[:, None].expand_as(x), x, "amax")
        return most if self.last else torch.cat([x, most[voxel]], 1)


class DynamicVFE(nn.Module):
    """Dynamic voxel feature encoder: every point counts, whatever a voxel holds (dynamic voxelisation, Zhou et al. 2019).

    A point's features are its own (x, y, z in metres first), its offset from the mean of its voxel's points and from the voxel's centre.
    widths: of the layers; the last is the voxels' width. absolute: whether x, y, z themselves are features; distance: whether the distance
    to the sensor is.
    """

    def __init__(
        self,
        point_features: int,
        widths: Sequence[int],
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        norm: bool = True,
        absolute: bool = True,
        distance: bool = False,
    ):
        super().__init__()
        self.absolute, self.distance = absolute, distance
        sizes = [point_features + (6 if absolute else 3) + int(distance), *widths]
        self.layers = nn.ModuleList(
            PointFeatures(a, b, i == len(widths) - 1, norm) for i, (a, b) in enumerate(zip(sizes, widths, strict=False))
        )
        self.grid = grid_size(point_range, voxel_size)
        self.register_buffer("voxel_size", torch.tensor([float(v) for v in voxel_size]), persistent=False)
        self.register_buffer("origin", torch.tensor([float(v) for v in point_range[:3]]), persistent=False)

    def forward(self, points: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """points: float [n, features]; sample: int64 [n], each one's place in the batch.

        Returns features [voxels, width] and int64 coordinates [voxels, 4] (sample, z, y, x), sorted by (sample, x, y, z). Points outside
        of the range are left out; there may be no voxel at all.
        """
        nx, ny, nz = self.grid
        at = ((points[:, :3] - self.origin) / self.voxel_size).floor()
        inside = ((at >= 0) & (at < at.new_tensor(self.grid))).all(1)
        points, at, sample = points[inside], at[inside].long(), sample[inside]
        key = ((sample * nx + at[:, 0]) * ny + at[:, 1]) * nz + at[:, 2]
        key, voxel = torch.unique(key, return_inverse=True)
        xyz = points[:, :3]
        total = xyz.new_zeros(len(key), 4).index_add_(0, voxel, torch.cat([xyz, torch.ones_like(xyz[:, :1])], 1))
        mean = total[:, :3] / total[:, 3:]
        centre = at * self.voxel_size + self.voxel_size / 2 + self.origin
        parts = [points if self.absolute else points[:, 3:], xyz - mean[voxel], xyz - centre]
        if self.distance:
            parts.append(xyz.norm(dim=1, keepdim=True))
        x = torch.cat(parts, 1)
        for layer in self.layers:
            x = layer(x, voxel, len(key))
        coordinates = torch.stack([key // (nx * ny * nz), key % nz, key // nz % ny, key // (ny * nz) % nx], 1)
        return x, coordinates


def scatter_to_bev(features: Tensor, coordinates: Tensor, batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Voxel features on a map seen from above: [voxels, c] at int64 [voxels, 4] (sample, z, y, x) to [batch, c * z, y, x], zero where
    empty.

    shape: voxels along x, y, z.
    """
    nx, ny, nz = shape
    place = ((coordinates[:, 0] * nz + coordinates[:, 1]) * ny + coordinates[:, 2]) * nx + coordinates[:, 3]
    canvas = features.new_zeros(batch * nz * ny * nx, features.shape[1]).index_copy(0, place, features)
    return canvas.view(batch, nz, ny, nx, -1).permute(0, 4, 1, 2, 3).flatten(1, 2)
