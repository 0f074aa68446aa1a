"""Boxes as a set of queries that a heatmap proposes (TransFusion, Bai et al., CVPR 2022), in the form that lidar detectors use it alone.

The best cells of a heatmap become queries, each the map's feature there plus an embedding of its class. One decoder layer lets a query
look at the map around it, and small branches say its class, its box and how well the box fits. Training assigns true boxes to queries one
to one. Maps are laid out [x, y] inside, as released weights have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.nn.center_head import focal_loss
from formarium.nn.matching import hungarian, sigmoid_focal
from formarium.nn.ops.boxes import iou_3d_pairs


class Queries(NamedTuple):
    """What a head says. dense: logits of the heatmap [b, classes, w, h] (x before y); label int64 [b, q] and prior float [b, q] in [0, 1],
    the class and score that a query was proposed with; logits [b, q, classes]; values [b, q, 8 or 10], centre x and y in cells, z of the
    top in metres, log sizes, sine and cosine of the yaw, speed; iou [b, q], the expected 3D IoU scaled to [-1, 1]."""

    dense: Tensor
    label: Tensor
    prior: Tensor
    logits: Tensor
    values: Tensor
    iou: Tensor


_BRANCHES = {"center": 2, "height": 1, "size": 3, "turn": 2, "speed": 2}


class PositionEmbedding(nn.Module):
    """Linear-BN-ReLU-Linear of places float [n, 2] in cells: [n, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(2, dim, 1), nn.BatchNorm1d(dim), nn.ReLU(), nn.Conv1d(dim, dim, 1))

    def forward(self, place: Tensor) -> Tensor:
        return self.net(place.T[None])[0].T


class Projections(nn.Module):
    """The weights of a multi-head attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def part(self, x: Tensor, first: int, last: int) -> Tensor:
        """Queries, keys and values are parts 0, 1 and 2."""
        dim = x.shape[-1]
        return F.linear(x, self.qkv.weight[first * dim : last * dim], self.qkv.bias[first * dim : last * dim])


class LocalDecoder(nn.Module):
    """Self-attention, attention to the map within `radius` cells, and a feed-forward network, each behind LN(x + f(x)).

    A query stands alone in its sequence, as in the released code: self-attention is then the projection of its own value, and what would
    be its queries and keys gets no gradient. wrap: whether cells past the end of a row are the next row's, which released weights were
    trained with; without it they are no keys.
    """

    def __init__(self, dim: int, heads: int, hidden: int, radius: int, wrap: bool):
        super().__init__()
        self.heads, self.radius, self.wrap = heads, radius, wrap
        self.own, self.cross = Projections(dim), Projections(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_position, self.key_position = PositionEmbedding(dim), PositionEmbedding(dim)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor, at: Tensor, cells: Tensor, size: tuple[int, int], places: Tensor) -> Tensor:
        """x: float [b, q, dim] of the cells int64 [b, q]; cells: [b, w * h, dim], the map; size: (w, h); places: [w * h, 2], the cells'
        middles."""
        position = self.query_position(places[at.flatten()]).view_as(x)
        x = self.norm1(x + self.own.out(self.own.part(x + position, 2, 3)))
        k_v = self.cross.part(cells + self.key_position(places), 1, 3)  # each cell once, before the gather
        near, keep = self.around(at, size)  # b q keys
        gathered = k_v[torch.arange(len(x), device=x.device)[:, None, None], near]
        k, v = gathered.unflatten(-1, (2, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # b*q heads keys d
        q = self.cross.part(x + position, 0, 1).unflatten(-1, (self.heads, 1, -1)).flatten(0, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep.flatten(0, 1)[:, None, None])
        x = self.norm2(x + self.cross.out(mixed.flatten(1).view_as(x)))
        return self.norm3(x + self.down(self.up(x).relu()))

    def around(self, at: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Flat places int64 [..., keys] around cells int64 [...] and whether they count."""
        w, h = size
        step = torch.arange(-self.radius, self.radius + 1, device=at.device)
        dx, dy = (s.flatten() for s in torch.meshgrid(step, step, indexing="ij"))
        x, y = at[..., None] // h + dx, at[..., None] % h + dy
        place = x * h + y
        keep = (place >= 0) & (place < w * h) if self.wrap else (x >= 0) & (x < w) & (y >= 0) & (y < h)
        return place.clamp(0, w * h - 1), keep


class QueryHead(nn.Module):
    """Heatmap, proposals, decoder and branches. peak: the side of the neighbourhood that a proposal is the best of; cells at the map's
    border then propose nothing. point_classes: classes whose every cell may propose, as their objects are no larger than a cell or two.

    forward: float [b, in_channels, h, w] to Queries.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        queries: int,
        dim: int = 128,
        heads: int = 8,
        hidden: int = 256,
        radius: int = 20,
        wrap: bool = True,
        peak: int = 3,
        point_classes: Sequence[int] = (),
        speed: bool = True,
        branch: int = 64,
    ):
        super().__init__()
        self.classes, self.queries, self.peak = classes, queries, peak
        self.point_classes = [c for c in point_classes if c < classes]
        self.shared = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.heatmap = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, classes, 3, padding=1)
        )
        self.class_embedding = nn.Conv1d(classes, dim, 1)
        self.decoder = LocalDecoder(dim, heads, hidden, radius, wrap)
        outs = {k: n for k, n in _BRANCHES.items() if k != "speed" or speed} | {"iou": 1, "heatmap": classes}
        self.branches = nn.ModuleDict(
            {
                k: nn.Sequential(nn.Conv1d(dim, branch, 1), nn.BatchNorm1d(branch), nn.ReLU(), nn.Conv1d(branch, n, 1))
                for k, n in outs.items()
            }
        )
        nn.init.constant_(self.branches["heatmap"][-1].bias, -2.19)  # type: ignore[index]

    def forward(self, x: Tensor) -> Queries:
        x = self.shared(x.transpose(2, 3))  # b dim w h
        w, h = x.shape[2:]
        dense = self.heatmap(x)
        score = self.peaks(dense.detach().float().sigmoid()).flatten(1)
        prior, best = score.topk(min(self.queries, score.shape[1]))
        label, at = best // (w * h), best % (w * h)
        cells = x.flatten(2).transpose(1, 2)  # b w*h dim
        embedding = F.embedding(label, self.class_embedding.weight[..., 0].T) + self.class_embedding.bias  # type: ignore[operator]
        queries = cells.gather(1, at[..., None].expand(-1, -1, cells.shape[2])) + embedding
        index = torch.arange(w * h, device=x.device)
        places = torch.stack([index // h, index % h], 1) + x.new_tensor(0.5)
        queries = self.decoder(queries, at, cells, (w, h), places)
        said = {k: branch(queries.transpose(1, 2)).transpose(1, 2) for k, branch in self.branches.items()}
        said["center"] = said["center"] + places[at]
        values = torch.cat([said[k] for k in _BRANCHES if k in said], 2)
        return Queries(dense, label, prior, said["heatmap"], values, said["iou"][..., 0])

    def peaks(self, score: Tensor) -> Tensor:
        """Scores [b, classes, w, h] with 0 wherever a cell isn't its neighbourhood's best."""
        edge = self.peak // 2
        most = F.pad(F.max_pool2d(score, self.peak, 1), (edge,) * 4)
        peaks = score * (score == most)
        if self.point_classes:
            peaks[:, self.point_classes] = score[:, self.point_classes]
        return peaks


def query_boxes(values: Tensor, origin: Tensor, cell: Tensor) -> Tensor:
    """Boxes [..., 7 or 9] of a head's values [..., 8 or 10]."""
    size = values[..., 3:6].exp()
    yaw = torch.atan2(values[..., 6:7], values[..., 7:8])
    z = values[..., 2:3] - size[..., 2:3] / 2
    return torch.cat([values[..., :2] * cell + origin, z, size, yaw, values[..., 8:]], -1)


def query_values(boxes: Tensor, origin: Tensor, cell: Tensor) -> Tensor:
    """The values [..., 8 or 10] that a head should say of boxes [..., 7 or 9]."""
    size, yaw = boxes[..., 3:6].clamp_min(1e-3), boxes[..., 6:7]
    top = boxes[..., 2:3] + size[..., 2:3] / 2
    return torch.cat([(boxes[..., :2] - origin) / cell, top, size.log(), yaw.sin(), yaw.cos(), boxes[..., 7:]], -1)


def assign(
    out: Queries, boxes: Tensor, label: Tensor, origin: Tensor, cell: Tensor, span: Tensor, weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which query stands for which box, one to one at the least cost: (sample, query, box), int64 [pairs] each.

    boxes: [b, m, 7+]; label: int64 [b, m], -1 where there is no box. span: [2], metres of the range along x and y. weights: of the costs of
    class (focal), centre (L1, in shares of the range) and overlap (minus the 3D IoU).
    """
    order = (label < 0).to(torch.int8).argsort(dim=1, stable=True)  # what is no box stands last
    counts = (label >= 0).sum(1).tolist()
    with torch.no_grad():
        p = out.logits.float().sigmoid()
        positive, negative = -(p + 1e-12).log() * 0.25 * (1 - p) ** 2, -(1 - p + 1e-12).log() * 0.75 * p**2
        kind = (positive - negative).gather(2, label.clamp_min(0)[:, None].expand(-1, p.shape[1], -1))
        said, truth = query_boxes(out.values.float(), origin, cell), boxes
        apart = torch.cdist((said[..., :2] - origin) / span, (truth[..., :2] - origin) / span, p=1)
        q, m = said.shape[1], truth.shape[1]
        pairs = said[:, :, None, :7].expand(-1, -1, m, -1), truth[:, None, :, :7].expand(-1, q, -1, -1)
        overlap = iou_3d_pairs(pairs[0].reshape(-1, 7), pairs[1].reshape(-1, 7)).view(-1, q, m)
        cost = weights[0] * kind + weights[1] * apart - weights[2] * overlap
        cost = cost.gather(2, order[:, None].expand(-1, q, -1))
    sample, query, column = hungarian(cost, counts)
    return sample, query, order[sample, column]


def query_losses(
    out: Queries,
    heatmap: Tensor,
    boxes: Tensor,
    label: Tensor,
    matched: tuple[Tensor, Tensor, Tensor],
    origin: Tensor,
    cell: Tensor,
    weights: Sequence[float],
    code_weights: Sequence[float],
) -> dict[str, Tensor]:
    """Weighted terms: heatmap (CornerNet's focal loss of the dense map; heatmap: its target [b, classes, w, h]), label (focal, over all
    queries), regression (L1 over matched ones; unknown values don't count), iou (L1 of the expected IoU, where boxes touch).

    weights: of the four.
    """
    sample, query, box = matched
    count = max(1, len(sample))
    wanted = torch.zeros_like(out.logits, dtype=torch.float32)
    wanted[sample, query, label[sample, box]] = 1
    terms = {"heatmap": focal_loss(out.dense, heatmap), "label": sigmoid_focal(out.logits.float(), wanted).sum() / count}
    said, truth = out.values[sample, query].float(), boxes[sample, box]
    target = query_values(truth, origin, cell)
    error = torch.where(target.isnan(), 0.0, (said - target.nan_to_num()).abs())
    terms["regression"] = (error * error.new_tensor(code_weights)[: error.shape[1]]).sum() / count
    overlap = iou_3d_pairs(query_boxes(said.detach(), origin, cell), truth)
    miss = torch.where(overlap > 0, (out.iou[sample, query].float() - (2 * overlap - 1)).abs(), 0.0)
    terms["iou"] = miss.sum() / (overlap > 0).sum().clamp_min(1)
    return {k: w * v for w, (k, v) in zip(weights, terms.items(), strict=True)}
