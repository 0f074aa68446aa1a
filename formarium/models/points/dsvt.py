"""Dynamic Sparse Voxel Transformer with rotated sets (Wang et al., CVPR 2023, arXiv 2301.06051).

Occupied voxels of a window are sorted and cut into sets of exactly tau slots, so that sparse attention becomes one dense batch: a window
of n voxels gets s = ceil(n / tau) sets, and slot j of set k holds the voxel of rank floor((k tau + j) n / (s tau)) (eq. 3). A voxel that
fills two neighbouring slots is masked as key in the second. Sorting y-major in one layer and x-major in the next rotates the sets, which
carries information across them; every second block has other windows, larger and shifted. Between stages of the 3D version an attention
pools neighbouring voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import check_tensor
from formarium.nn.bev import ResidualBEV
from formarium.nn.center_head import CenterHead, Centers
from formarium.nn.query_head import Queries, QueryHead
from formarium.nn.voxel_pool import Pool, pooled_space
from formarium.nn.voxels import DynamicVFE, grid_size, scatter_to_bev
from formarium.tasks.lidar_detection.queries import QueryDetector

Shape = tuple[int, int, int]  # along x, y, z


# sets ---------------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """window int64 [n], each voxel's; place int64 [n, 3], where in it (x, y, z)."""

    window: Tensor
    place: Tensor


class Sets(NamedTuple):
    """voxel int64 [sets, tau]; keep bool [sets, tau], False where a slot repeats its left neighbour; first int64 [n], the first slot
    (flat) of each voxel."""

    voxel: Tensor
    keep: Tensor
    first: Tensor


def windows_of(coordinates: Tensor, space: Shape, window: Shape, shift: Shape) -> Windows:
    """The windows of voxels int64 [n, 4] (sample, z, y, x). space: voxels along x, y, z. One window more than fits makes room for the
    shift."""
    shift = (shift[0], shift[1], 0 if space[2] == window[2] else shift[2])
    counts = [math.ceil(s / w) + 1 for s, w in zip(space, window, strict=True)]
    size = coordinates.new_tensor(window)
    at = coordinates[:, [3, 2, 1]] + coordinates.new_tensor(shift)
    ids = at // size
    flat = ((coordinates[:, 0] * counts[0] + ids[:, 0]) * counts[1] + ids[:, 1]) * counts[2] + ids[:, 2]
    return Windows(flat, at % size)


def rotated_sets(windows: Windows, window: Shape, tau: int) -> tuple[Sets, Sets]:
    """The sets of all windows, with voxels sorted y-major (y, x, z) and x-major (x, y, z)."""
    _, dense, count = torch.unique(windows.window, return_inverse=True, return_counts=True)
    sets = (count + tau - 1) // tau
    owner = torch.repeat_interleave(sets)  # each set's window
    start, first_set = count.cumsum(0) - count, sets.cumsum(0) - sets
    k = torch.arange(len(owner), device=owner.device) - first_set[owner]
    slot = k[:, None] * tau + torch.arange(tau, device=owner.device)
    rank = slot * count[owner][:, None] // (sets[owner][:, None] * tau) + start[owner][:, None]
    x, y, z = windows.place.unbind(1)
    wx, wy, wz = window
    base = dense * (wx * wy * wz) + z
    return _sets((base + (y * wx + x) * wz).argsort()[rank]), _sets((base + (x * wy + y) * wz).argsort()[rank])


def _sets(voxel: Tensor) -> Sets:
    flat = voxel.flatten()
    new = torch.ones_like(flat, dtype=torch.bool)
    new[1:] = flat[1:] != flat[:-1]  # a voxel's slots lie side by side, across the border of two sets too
    keep = new.view_as(voxel).clone()
    keep[:, 0] = True
    slots = new.nonzero()[:, 0]
    first = torch.empty_like(slots).scatter_(0, flat[slots], slots)
    return Sets(voxel, keep, first)


# attention ----------------------------------------------------------------------------------------------------------


class SetAttention(nn.Module):
    """Attention within each set; positions are added to queries and keys. A voxel takes what its first slot says.

    x, position: float [n, dim]. Returns [n, dim]. Projections are made once a voxel, before the gather.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, position: Tensor, sets: Sets) -> Tensor:
        dim = x.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        qk = F.linear(x + position, weight[: 2 * dim], bias[: 2 * dim])
        v = F.linear(x, weight[2 * dim :], bias[2 * dim :])
        gathered = torch.cat([qk, v], 1)[sets.voxel]  # sets tau 3*dim
        q, k, v = gathered.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sets.keep[:, None, None], dropout_p=rate)
        return self.out(mixed.transpose(1, 2).reshape(-1, dim)[sets.first])


class Layer(nn.Module):
    """Set attention and a feed-forward network, each behind LN(x + f(x)), and LN over their sum with the input."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, activation: str):
        super().__init__()
        self.attention = SetAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm = nn.LayerNorm(dim)
        self.activation = {"relu": F.relu, "gelu": F.gelu}[activation]

    def forward(self, x: Tensor, position: Tensor, sets: Sets) -> Tensor:
        y = self.norm1(x + self.attention(x, position, sets))
        y = self.norm2(y + self.down(self.activation(self.up(y))))
        return self.norm(y + x)


class Block(nn.Module):
    """A layer over y-major sets, a layer over x-major sets, and LN over their sum with the input."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, activation: str):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, hidden, dropout, activation) for _ in range(2))
        self.norm = nn.LayerNorm(dim)
        self.tap = Tap("ragged")

    def forward(self, x: Tensor, positions: list[Tensor], sets: tuple[Sets, Sets], sample: Tensor, batch: int) -> Tensor:
        y = x
        for layer, position, s in zip(self.layers, positions, sets, strict=True):
            y = layer(y, position, s)
        return self.tap(self.norm(y + x), index=sample, batch=batch)


class PositionEmbedding(nn.Module):
    """Linear-BN-ReLU-Linear of a voxel's place in its window, from the window's middle. place: int64 [n, 3] (x, y, z) to float [n, dim]."""

    def __init__(self, dims: int, dim: int, window: Shape, normalise: bool):
        super().__init__()
        self.dims, self.window, self.normalise = dims, window, normalise
        self.net = nn.Sequential(nn.Linear(dims, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, place: Tensor) -> Tensor:
        wx, wy, wz = self.window
        if self.training or wx * wy * wz > len(place):
            return self.net(self.scale(place))
        # there are fewer places than voxels: embed each place once
        index = torch.arange(wx * wy * wz, device=place.device)
        table = self.net(self.scale(torch.stack([index // (wy * wz), index // wz % wy, index % wz], 1)))
        return table[(place[:, 0] * wy + place[:, 1]) * wz + place[:, 2]]

    def scale(self, place: Tensor) -> Tensor:
        size = torch.tensor(self.window[: self.dims], device=place.device)
        x = place[:, : self.dims] - size / 2
        return x / size * 2 * 3.1415 if self.normalise else x  # the weights are used to this pi


# the backbone -------------------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Blocks over the same voxels. Blocks with an even number (counted over all stages) see `windows[0]`, the others `windows[1]`."""

    def __init__(self, c: DSVT.Config, stage: int, space: Shape, first_block: int):
        super().__init__()
        dim, self.tau, self.space, self.first_block = c.dims[stage], c.set_sizes[stage], space, first_block
        base = tuple(c.windows[stage])
        self.windows: tuple[Shape, Shape] = (base, tuple(w * f for w, f in zip(base, c.hybrid_factor, strict=True)))  # type: ignore[assignment]
        self.shifts = c.shifts[stage]
        self.matched = c.matched_positions
        dims = 3 if space[2] > 1 else 2
        self.blocks = nn.ModuleList(Block(dim, c.heads[stage], c.hidden[stage], c.dropout, c.activation) for _ in range(c.depths[stage]))
        self.positions = nn.ModuleList(
            nn.ModuleList(PositionEmbedding(dims, dim, self.windows[self.geometry(b, i)], c.normalise_positions) for i in range(2))
            for b in range(c.depths[stage])
        )

    def geometry(self, block: int, layer: int) -> int:
        """Which windows layer `layer`'s positions are places in. In the released weights layer 0 always sees those of windows[0] and
        layer 1 those of windows[1], whichever the block's sets come from."""
        return (self.first_block + block) % 2 if self.matched else layer

    def forward(self, x: Tensor, coordinates: Tensor, batch: int) -> Tensor:
        found = [windows_of(coordinates, self.space, w, s) for w, s in zip(self.windows, self.shifts, strict=True)]
        sets: dict[int, tuple[Sets, Sets]] = {}
        for b, block in enumerate(self.blocks):
            which = (self.first_block + b) % 2
            if which not in sets:
                sets[which] = rotated_sets(found[which], self.windows[which], self.tau)
            positions = [p(found[self.geometry(b, i)].place) for i, p in enumerate(self.positions[b])]
            x = block(x, positions, sets[which], coordinates[:, 0], batch)
        return x


class Backbone(nn.Module):
    """Stages and the pools between them: voxels [n, dims[0]] at [n, 4] (sample, z, y, x) to those of the last stage."""

    def __init__(self, c: DSVT.Config):
        super().__init__()
        self.spaces: list[Shape] = [tuple(c.space)]
        stages, pools, block = [], [], 0
        for i, depth in enumerate(c.depths):
            stages.append(Stage(c, i, self.spaces[-1], block))
            block += depth
            if i < len(c.depths) - 1:
                pools.append(Pool(c.dims[i], c.dims[i + 1], c.pool_strides[i], c.pool))
                self.spaces.append(pooled_space(self.spaces[-1], c.pool_strides[i]))
        self.stages, self.pools = nn.ModuleList(stages), nn.ModuleList(pools)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor, coordinates: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        for i, stage in enumerate(self.stages):
            x = stage(x, coordinates, batch)
            if i < len(self.pools):
                x, coordinates = self.pools[i](x, coordinates, self.spaces[i])
        return x, coordinates


class DSVT(QueryDetector):
    """Points to voxels, the transformer over them, a convolutional network over the map seen from above, and a centre head or, with
    `queries`, TransFusion's.

    With num_classes = 0 it is the backbone alone, which takes voxels instead of points.
    """

    @dataclass(frozen=True)
    class Config:
        num_classes: int = 3  # 0: the backbone alone
        point_features: int = 5  # x, y, z, then what the sensor adds (intensity, elongation), and the age where there are several frames
        frames: int = 1  # sweeps that a cloud is made of
        point_range: tuple[float, ...] = (-74.88, -74.88, -2.0, 74.88, 74.88, 4.0)  # metres: x0, y0, z0, x1, y1, z1
        voxel_size: tuple[float, ...] = (0.32, 0.32, 6.0)  # metres
        vfe_widths: tuple[int, ...] = (192, 192)
        space: tuple[int, ...] = (468, 468, 1)  # voxels along x, y, z
        windows: tuple[tuple[int, ...], ...] = ((12, 12, 1),)  # per stage, in voxels
        hybrid_factor: tuple[int, ...] = (2, 2, 1)  # of every second block's windows
        shifts: tuple[tuple[tuple[int, ...], ...], ...] = (((0, 0, 0), (6, 6, 0)),)  # per stage, of its two kinds of windows
        set_sizes: tuple[int, ...] = (36,)
        depths: tuple[int, ...] = (4,)
        dims: tuple[int, ...] = (192,)
        heads: tuple[int, ...] = (8,)
        hidden: tuple[int, ...] = (384,)
        dropout: float = 0.0
        activation: str = "gelu"
        pool: str = "attention"  # attention, maxpool or linear
        pool_strides: tuple[tuple[int, ...], ...] = ()
        normalise_positions: bool = False
        matched_positions: bool = False  # positions of the windows that the sets come from (the paper); released weights differ
        bev_layers: tuple[int, ...] = (1, 2, 2)
        bev_strides: tuple[int, ...] = (1, 2, 2)
        bev_channels: tuple[int, ...] = (128, 128, 256)
        bev_up_strides: tuple[float, ...] = (1, 2, 4)
        bev_up_channels: tuple[int, ...] = (128, 128, 128)
        head_channels: int = 64
        head_groups: tuple[tuple[int, ...], ...] = ()  # labels of each head; () for one head of all classes
        velocity: bool = False
        iou_branch: bool = True
        iou_regression: bool = True
        location_weight: float = 2.0
        code_weights: tuple[float, ...] = (1.0,) * 10
        gaussian_overlap: float = 0.1
        min_radius: int = 2
        max_objects: int = 500
        score_threshold: float = 0.1
        iou_rectifier: tuple[float, ...] = (0.68, 0.71, 0.65)  # per class (the last for any further): score^(1-r) * iou^r
        nms_thresholds: tuple[float, ...] = (0.7, 0.6, 0.55)  # per class (the last for any further), BEV IoU; 1 for none
        queries: int = 0  # of the query head; 0: a centre head
        query_heads: int = 8
        query_hidden: int = 256
        query_radius: int = 20  # cells around a query that it looks at
        wrapped_keys: bool = True  # cells past a row's end are the next row's, which released weights were trained with
        point_classes: tuple[int, ...] = ()  # classes whose every cell may propose a query
        match_weights: tuple[float, ...] = (0.15, 0.25, 0.25)  # of class, centre and overlap, when boxes are assigned to queries
        query_weights: tuple[float, ...] = (1.0, 1.0, 0.25, 0.5)  # of the terms: heatmap, label, regression, iou

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        _check(c)
        if c.num_classes:
            self.vfe = DynamicVFE(c.point_features, c.vfe_widths, c.voxel_size, c.point_range)
            self.tokens = Tap("ragged")
        self.backbone = Backbone(c)
        if c.num_classes:
            wide = c.dims[-1] * self.backbone.spaces[-1][2]
            self.bev = ResidualBEV(wide, c.bev_layers, c.bev_strides, c.bev_channels, c.bev_up_strides, c.bev_up_channels)
            self.features = Tap("map")
            self.head = self._head(c)

    def _head(self, c: DSVT.Config) -> CenterHead | QueryHead:
        if not c.queries:
            return CenterHead(self.bev.out_channels, c.head_channels, [len(g) for g in self.groups], c.iou_branch, c.velocity)
        return QueryHead(
            self.bev.out_channels, c.num_classes, c.queries, c.head_channels, c.query_heads, c.query_hidden, c.query_radius,
            c.wrapped_keys, point_classes=c.point_classes, speed=c.velocity,
        )  # fmt: skip

    @property
    def map_stride(self) -> float:
        return self.config.bev_strides[0] / self.config.bev_up_strides[0]

    def forward(self, *inputs: Tensor) -> Any:
        """points float [b, n, features] and count int64 [b], how many of the n are points, to one Centers a head, maps [b, c, h, w], or to
        Queries.

        The backbone alone takes features float [b, n, dims[0]], coordinates int64 [b, n, 3] (z, y, x) and count, and gives the last
        stage's voxels of all samples: features [m, dims[-1]] and coordinates [m, 4] (sample, z, y, x).
        """
        if self.config.num_classes:
            return self.detect(*inputs)
        features, coordinates, count = inputs
        sample, row = _rows(count, features.shape[1])
        at = torch.cat([sample[:, None], coordinates[sample, row]], 1)
        return self.backbone(features[sample, row], at, len(count))

    def detect(self, points: Tensor, count: Tensor) -> list[Centers] | Queries:
        batch = points.shape[0]
        sample, row = _rows(count, points.shape[1])
        x, at = self.vfe(points[sample, row], sample)
        if not self.training and not len(x):
            raise BadInput("points", expected=f"some in the range {self.config.point_range}", got="none there")
        x, at = self.backbone(self.tokens(x, index=at[:, 0], batch=batch), at, batch)
        return self.head(self.features(self.bev(scatter_to_bev(x, at, batch, self.backbone.spaces[-1]))))

    def check_input(self, *inputs: Any) -> None:
        c = self.config
        need = 2 if c.num_classes else 3
        if len(inputs) != need:
            raise BadInput(
                "inputs", expected="points, count" if c.num_classes else "features, coordinates, count", got=f"{len(inputs)} of them"
            )
        if c.num_classes:
            self.check_points(*inputs)
            return
        features, coordinates, count = inputs
        check_tensor("features", features, "batch voxels channels", sizes={2: c.dims[0]})
        check_tensor("coordinates", coordinates, "batch voxels 3", sizes={0: len(features), 1: features.shape[1], 2: 3}, dtype=_is_int)
        check_tensor("count", count, "batch", sizes={0: len(features)}, dtype=_is_int)

    def example(self, batch: int = 1, points: int = 400) -> tuple[Tensor, ...]:
        if self.config.num_classes:
            return self.example_points(batch, points)
        g = torch.Generator().manual_seed(0)
        nx, ny, nz = self.config.space
        side = min(40, nx, ny)
        flat = torch.stack([torch.randperm(side * side * nz, generator=g)[: min(points, side * side * nz)] for _ in range(batch)])
        coordinates = torch.stack([flat % nz, flat // nz % side, flat // nz // side], -1)
        features = torch.randn(*flat.shape, self.config.dims[0], generator=g)
        return features.to(self.device), coordinates.to(self.device), torch.full((batch,), flat.shape[1], device=self.device)


def _is_int(dtype: torch.dtype) -> bool:
    return dtype in (torch.int64, torch.int32)


def _rows(count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(sample, row) of what isn't padding."""
    sample, row = (torch.arange(most, device=count.device) < count[:, None]).nonzero(as_tuple=True)
    return sample, row


def _check(c: DSVT.Config) -> None:
    stages = len(c.depths)
    for name in ("windows", "shifts", "set_sizes", "dims", "heads", "hidden"):
        if len(getattr(c, name)) != stages:
            raise BadInput(name, expected=f"one entry for each of {stages} stages", got=str(len(getattr(c, name))))
    if len(c.pool_strides) != stages - 1:
        raise BadInput("pool_strides", expected=f"{stages - 1} of them, one between two stages", got=str(len(c.pool_strides)))
    if c.pool not in ("attention", "maxpool", "linear"):
        raise BadInput("pool", expected="attention, maxpool or linear", got=repr(c.pool))
    if c.activation not in ("gelu", "relu"):
        raise BadInput("activation", expected="gelu or relu", got=repr(c.activation))
    if c.num_classes and tuple(c.space) != grid_size(c.point_range, c.voxel_size):
        raise BadInput(
            "space", expected=f"{grid_size(c.point_range, c.voxel_size)}, the range over the voxel size", got=str(tuple(c.space))
        )
