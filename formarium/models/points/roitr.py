"""Rotation-Invariant Transformer for point cloud matching (Yu et al., CVPR 2023, arXiv 2303.08231).

Coordinates enter only through what no rigid motion changes: point pair features between neighbours in the encoder and decoder (the PPF
attention module), distances and angles between superpoints in the global transformer. Superpoints are matched first, then the points of
matched patches by optimal transport.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.ops.points import angle, farthest_points, interpolation, nearest_neighbours, pair_features, real, take
from formarium.nn.rigid import fit_motion, move, ransac_motion
from formarium.nn.transport import log_transport
from formarium.tasks.point_cloud_registration.model import Registered, RegistrationModel

# geometry, computed once a cloud ------------------------------------------------------------------------------------


class Around(NamedTuple):
    """k neighbours of each of m points: index int64 [b, m, k] among the finer points, ppf [b, m, k, 4], and which of them there are, bool
    [b, m, k] (None: all)."""

    index: Tensor
    ppf: Tensor
    known: Tensor | None


class Level(NamedTuple):
    """Points of one resolution: points, normals [b, n, 3], count [b]; down int64 [b, n], their places among the finer level's points;
    finer, their neighbours there; own, their neighbours among themselves."""

    points: Tensor
    normals: Tensor
    count: Tensor
    down: Tensor
    finer: Around
    own: Around


def neighbourhood(points: Tensor, normals: Tensor, finer: Tensor, finer_normals: Tensor, count: Tensor, k: int) -> Around:
    """k + 1 neighbours are found and the first dropped, which is the point itself (or one that lies on it). Small clouds have fewer."""
    k = min(k, int(count.max()) - 1)
    near, distance = (x[..., 1:] for x in nearest_neighbours(points, finer, count, k + 1))
    known = None if int(count.min()) > k else distance.isfinite()
    if known is not None:  # what is padding has none: let it see one
        known = known | (~known.any(2, keepdim=True) & (torch.arange(k, device=near.device) == 0))
    return Around(near, pair_features(points, normals, take(finer, near), take(finer_normals, near)), known)


@torch.no_grad()
def pyramid(points: Tensor, normals: Tensor, count: Tensor, strides: tuple[int, ...], neighbours: tuple[int, ...]) -> list[Level]:
    """Levels of n / stride farthest points each."""
    levels = []
    for stride, k in zip(strides, neighbours, strict=True):
        if stride == 1:
            down = torch.arange(points.shape[1], device=points.device).expand(points.shape[:2])
        else:
            down = farthest_points(points, count, points.shape[1] // stride)
        coarse, coarse_normals, coarse_count = take(points, down), take(normals, down), count // stride
        finer = neighbourhood(coarse, coarse_normals, points, normals, count, k)
        own = finer if stride == 1 else neighbourhood(coarse, coarse_normals, coarse, coarse_normals, coarse_count, k)
        levels.append(Level(coarse, coarse_normals, coarse_count, down, finer, own))
        points, normals, count = coarse, coarse_normals, coarse_count
    return levels


# PPF attention ------------------------------------------------------------------------------------------------------


class PPFAttention(nn.Module):
    """The PPF attention module (section 3.2): each point asks its neighbours, whose keys and values have the pair feature added.

    x: float [b, n, in_dim]; query int64 [b, m], places among the n (None: all of them). Returns [b, m, out_dim].
    Positions are p = P (E ppf + e) + c with 4 numbers in ppf, so E and P are multiplied first, and no [b, m, k, dim] of positions is made.
    """

    def __init__(self, in_dim: int, out_dim: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(4, dim)
        self.inner = nn.Linear(in_dim, dim)
        self.q, self.k, self.v, self.p, self.vp = (nn.Linear(dim, dim) for _ in range(5))
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.outer = nn.Linear(dim, out_dim)

    @torch.no_grad()
    def standardise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Make the embedding of ppf what it was of (ppf - mean) / std."""
        self.embed.weight.div_(self.embed.weight.new_tensor(std))
        self.embed.bias.sub_(self.embed.weight @ self.embed.weight.new_tensor(mean))

    def positions(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """`layer` after `embed` as one map of ppf: weight [heads, dim / heads, 4] and bias [heads, dim / heads]."""
        weight, bias = layer.weight @ self.embed.weight, layer.weight @ self.embed.bias + layer.bias
        return weight.unflatten(0, (self.heads, -1)), bias.unflatten(0, (self.heads, -1))

    def forward(self, x: Tensor, query: Tensor | None, around: Around) -> Tensor:
        x = self.inner(x)
        own = x if query is None else take(x, query)
        q = self.q(own).unflatten(2, (self.heads, -1))  # b m h d
        k, v = take(torch.cat([self.k(x), self.v(x)], 2), around.index).unflatten(3, (2, self.heads, -1)).unbind(3)  # b m k h d
        (wp, bp), (wv, bv) = self.positions(self.p), self.positions(self.vp)
        ppf = around.ppf.to(q.dtype)
        scores = torch.einsum("bmhd,bmkhd->bmhk", q, k) + torch.einsum("bmhf,bmkf->bmhk", torch.einsum("bmhd,hdf->bmhf", q, wp), ppf)
        scores = scores + (q * bp).sum(3, keepdim=True)
        if around.known is not None:
            scores = scores.masked_fill(~around.known[:, :, None], -math.inf)
        share = (scores * q.shape[3] ** -0.5).softmax(3)
        mixed = torch.einsum("bmhk,bmkhd->bmhd", share, v) + torch.einsum("bmhf,hdf->bmhd", share @ ppf, wv) + bv
        return self.outer(self.norm(self.out(mixed.flatten(2)) + own))


class Block(nn.Module):
    """relu(x + LN(PPF attention(x))) over a level's own neighbours."""

    def __init__(self, dim: int, width: int, heads: int):
        super().__init__()
        self.attention = PPFAttention(dim, dim, min(dim, width), heads)
        self.norm = nn.LayerNorm(dim)
        self.tap = Tap()

    def forward(self, x: Tensor, level: Level) -> Tensor:
        x = (self.norm(self.attention(x, None, level.own)) + x).relu()
        return self.tap(x, batch=len(x) // 2)


class Encoder(nn.Module):
    """PPF attention from the finer points to the level's, then blocks."""

    def __init__(self, in_dim: int, dim: int, blocks: int, width: int, heads: int):
        super().__init__()
        self.down = PPFAttention(in_dim, dim, min(dim, width), heads)
        self.blocks = nn.ModuleList(Block(dim, width, heads) for _ in range(blocks - 1))

    def descend(self, x: Tensor, level: Level) -> Tensor:
        return self.down(x, level.down, level.finer)

    def refine(self, x: Tensor, level: Level) -> Tensor:
        for block in self.blocks:
            x = block(x, level)
        return x


class Decoder(nn.Module):
    """Brings coarser features up by interpolation and adds the encoder's; the coarsest level takes the cloud's mean instead."""

    def __init__(self, in_dim: int, dim: int, width: int, heads: int, first: bool):
        super().__init__()
        if first:
            self.same = nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim), nn.ReLU())
            self.coarse = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        else:
            self.same = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU())
            self.coarse = nn.Sequential(nn.Linear(in_dim, dim), nn.LayerNorm(dim), nn.ReLU())
        self.blocks = nn.ModuleList([Block(dim, width, heads)])

    def forward(self, x: Tensor, level: Level, coarse: Tensor | None, below: Level | None) -> Tensor:
        if coarse is None or below is None:
            mask = real(level.count, x.shape[1])[..., None]
            mean = (x * mask).sum(1, keepdim=True) / level.count[:, None, None]
            x = self.same(torch.cat([x, self.coarse(mean).expand_as(x)], 2))
        else:
            index, weight = interpolation(level.points, below.points, below.count)
            x = self.same(x) + (take(self.coarse(coarse), index) * weight[..., None]).sum(2)
        return self.blocks[0](x, level)


# the global transformer ---------------------------------------------------------------------------------------------


def sinusoid(x: Tensor, dim: int) -> Tensor:
    """[...] to [..., dim]: sines and cosines in turn, at dim / 2 frequencies from 1 to 1 / 10000."""
    omega = torch.exp(torch.arange(0, dim, 2, device=x.device) * (-math.log(10000.0) / dim))
    phase = x[..., None] * omega
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)


class GeometricEmbedding(nn.Module):
    """What relates each pair of superpoints: their distance, and the largest (per channel) of the angles to the nearest superpoints.

    points [b, n, 3], count [b] to [b, n, n, dim].
    """

    def __init__(self, dim: int, distance_unit: float, angle_unit: float, angle_neighbours: int):
        super().__init__()
        self.dim, self.unit, self.neighbours = dim, distance_unit, angle_neighbours
        self.per_radian = 180.0 / (angle_unit * math.pi)
        self.distance = nn.Linear(dim, dim)
        self.angle = nn.Linear(dim, dim)

    def forward(self, points: Tensor, count: Tensor) -> Tensor:
        near = nearest_neighbours(points, points, count, self.neighbours + 1)[0][..., 1:]
        other = points[:, None] - points[:, :, None]  # b n n 3
        reference = take(points, near) - points[:, :, None]  # b n k 3
        widest: Tensor | None = None
        for ray in reference.unbind(2):  # one neighbour at a time: [b, n, n, k, dim] would be large
            turn = angle(ray[:, :, None].expand_as(other), other) * self.per_radian
            said = self.angle(sinusoid(turn, self.dim))
            widest = said if widest is None else torch.maximum(widest, said)
        assert widest is not None
        return (
            self.distance(sinusoid(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / self.unit, self.dim)) + widest
        )


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim)
        self.squeeze = nn.Linear(2 * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.squeeze(self.expand(x).relu()))


class SelfLayer(nn.Module):
    """Attention within a cloud whose keys have the pairs' embeddings added, and what makes the method rotation-invariant across clouds: a
    position for each superpoint, the attention-weighted embedding of its relations to all others (section 3.3).

    x [b, n, dim], embedding [b, n, n, dim], mask bool [b, n] to (features, positions) [b, n, dim].
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.p, self.vp = (nn.Linear(dim, dim) for _ in range(5))
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.position_out = nn.Linear(dim, dim)
        self.position_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim)
        self.position_ffn = FeedForward(dim)
        self.tap = Tap()

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))  # b h n d
        # q . (P e + c) = (P^T q) . e + q . c: the projection is moved from n * n pairs to n queries
        wp, bp = self.p.weight.unflatten(0, (self.heads, -1)), self.p.bias.unflatten(0, (self.heads, -1))
        asked = torch.einsum("bhnd,hdc->bnhc", q, wp)
        scores = q @ k.transpose(2, 3) + (asked @ embedding.transpose(2, 3)).transpose(1, 2) + (q * bp[:, None]).sum(3, keepdim=True)
        scores = (scores * q.shape[3] ** -0.5).masked_fill(~mask[:, None, None], -math.inf)
        mixed = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
        x = self.ffn(self.norm(self.out(mixed) + x))
        others = scores.masked_fill(torch.eye(x.shape[1], dtype=torch.bool, device=x.device), -math.inf).softmax(3)
        seen = others.transpose(1, 2) @ embedding  # b n h dim
        wv, bv = self.vp.weight.unflatten(0, (self.heads, -1)), self.vp.bias.unflatten(0, (self.heads, -1))
        position = (torch.einsum("bnhc,hdc->bnhd", seen, wv) + bv).flatten(2)
        return self.tap(x, batch=len(x) // 2), self.position_ffn(self.position_norm(self.position_out(position)))


class CrossLayer(nn.Module):
    """Attention to the other cloud; positions are added to queries and keys. The second cloud sees the first as already updated."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim)
        self.tap = Tap()

    def attend(self, x: Tensor, memory: Tensor, position: Tensor, memory_position: Tensor, mask: Tensor) -> Tensor:
        pairs = ((self.q, x + position), (self.k, memory + memory_position), (self.v, memory))
        q, k, v = (layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, y in pairs)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.ffn(self.norm(self.out(mixed.transpose(1, 2).flatten(2)) + x))

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x, position: [b * 2, n, dim], source and target in turn; mask [b * 2, n]."""
        (source, target), (at, other), (some, others) = (t.unflatten(0, (-1, 2)).unbind(1) for t in (x, position, mask))
        source = self.attend(source, target, at, other, others)
        target = self.attend(target, source, other, at, some)
        return self.tap(torch.stack([source, target], 1).flatten(0, 1), batch=len(source))


class GlobalTransformer(nn.Module):
    def __init__(self, c: RoITr.Config):
        super().__init__()
        self.embedding = GeometricEmbedding(c.width, c.distance_unit, c.angle_unit, c.angle_neighbours)
        self.inner = nn.Linear(c.planes[-1], c.width)
        self.blocks = nn.ModuleList({"self": SelfLayer, "cross": CrossLayer}[kind](c.width, c.heads) for kind in c.layers)
        self.outer = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, points: Tensor, count: Tensor) -> Tensor:
        embedding, mask = self.embedding(points, count), real(count, x.shape[1])
        x = self.inner(x)
        position = torch.zeros_like(x)
        for block in self.blocks:
            if isinstance(block, SelfLayer):
                x, position = block(x, embedding, mask)
            else:
                x = block(x, position, mask)
        return self.outer(x)


# matching -----------------------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """Points of each superpoint: index int64 [nodes, k] among the cloud's points, mask bool [nodes, k], which are real."""

    index: Tensor
    mask: Tensor


@torch.no_grad()
def patches(points: Tensor, nodes: Tensor, most: int) -> Patches:
    """Every point of [n, 3] goes to its nearest of [nodes, 3]; the `most` nearest of them stay, nearest first."""
    d = torch.cdist(nodes, points, compute_mode="donot_use_mm_for_euclid_dist")
    own = d.argmin(0) == torch.arange(len(nodes), device=d.device)[:, None]
    near = d.masked_fill(~own, math.inf).topk(min(most, len(points)), 1, largest=False)
    return Patches(near.indices, near.values.isfinite())


def match_nodes(target: Tensor, source: Tensor, most: int, adaptive: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Superpoints that match: (places in target [n, dim], in source [m, dim], scores), best first.

    The `most` highest of exp(-squared distance), divided by the sums of its row and of its column; or (adaptive) every pair nearer than
    that distance, and at least `most` of them.
    """
    square = ((-2 * target @ source.T) + (target**2).sum(1)[:, None] + (source**2).sum(1)).clamp_min(1e-12)
    if adaptive is not None:
        distance = square.sqrt()
        near = (distance <= adaptive).nonzero(as_tuple=True)
        if len(near[0]) >= min(most, distance.numel()):
            return near[0], near[1], (-distance[near]).exp()
        found = distance.flatten().topk(min(most, distance.numel()), largest=False)
        return found.indices // len(source), found.indices % len(source), (-found.values).exp()
    score = (-square).exp()
    score = (score / (score.sum(1, keepdim=True) + 1e-8)) * (score / (score.sum(0, keepdim=True) + 1e-8))
    best = score.flatten().topk(min(most, score.numel()))
    return best.indices // len(source), best.indices % len(source), best.values


@torch.no_grad()
def node_overlaps(target: Tensor, source: Tensor, t: Patches, s: Patches, radius: float) -> tuple[Tensor, Tensor]:
    """Pairs of patches that share ground, int64 [pairs, 2] (target, source), and how much: the mean of both sides' shares of points that
    have one of the other within `radius`. target, source: points in one frame, [n, 3], [m, 3]."""
    a, b = target[t.index], source[s.index]  # nodes k 3
    (ca, ra), (cb, rb) = _balls(a, t.mask), _balls(b, s.mask)
    i, j = (torch.cdist(ca, cb) < ra[:, None] + rb + radius).nonzero(as_tuple=True)
    some = t.mask.any(1)[i] & s.mask.any(1)[j]
    i, j = i[some], j[some]
    shares = [torch.zeros(0, device=a.device)]
    for p, q in zip(i.split(1024), j.split(1024), strict=True):
        near = (torch.cdist(a[p], b[q]) < radius) & t.mask[p][:, :, None] & s.mask[q][:, None]
        shares.append((near.any(2).sum(1) / t.mask[p].sum(1) + near.any(1).sum(1) / s.mask[q].sum(1)) / 2)
    overlap = torch.cat(shares)
    return torch.stack([i, j], 1)[overlap > 0], overlap[overlap > 0]


def _balls(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A centre [nodes, 3] and a radius [nodes] that hold each patch."""
    centre = points[:, 0]
    return centre, (points - centre[:, None]).norm(dim=2).masked_fill(~mask, 0).amax(1)


def mutual_matches(scores: Tensor, rows: Tensor, columns: Tensor, k: int, mutual: bool, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(patch, row, column) of scores [p, m, n] among the k best of their row and (mutual; else or) of their column, and above the
    threshold."""
    by_row = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(min(k, scores.shape[2]), 2).indices, True)
    by_column = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(min(k, scores.shape[1]), 1).indices, True)
    kept = (by_row & by_column if mutual else by_row | by_column) & (scores > threshold) & rows[:, :, None] & columns[:, None]
    return kept.nonzero(as_tuple=True)  # type: ignore[return-value]


# losses -------------------------------------------------------------------------------------------------------------


def circle_loss(target: Tensor, source: Tensor, pairs: Tensor, overlap: Tensor, c: Any) -> Tensor:
    """The overlap-aware circle loss of superpoint features [n, dim], [m, dim] of length 1. pairs: int64 [p, 2] (target, source) with their
    overlaps [p]: above c.positive_overlap a pair attracts, by the root of its overlap; pairs without any repel."""
    square = (target**2).sum(1)[:, None] + (source**2).sum(1) - 2 * target @ source.T
    distance = square.clamp_min(1e-12).sqrt()
    shared = torch.zeros_like(distance).index_put((pairs[:, 0], pairs[:, 1]), overlap)
    positive, negative = shared > c.positive_overlap, shared == 0
    pull = ((distance - c.positive_optimum).clamp_min(0) * shared.sqrt()).masked_fill(~positive, 0).detach()
    push = (c.negative_optimum - distance).clamp_min(0).masked_fill(~negative, 0).detach()
    attract = c.log_scale * (distance - c.positive_margin) * pull
    repel = c.log_scale * (c.negative_margin - distance) * push
    total = distance.sum() * 0  # keeps the graph where no superpoint has both
    for dim in (1, 0):
        some = positive.any(dim) & negative.any(dim)
        loss = F.softplus(attract.logsumexp(dim) + repel.logsumexp(dim)) / c.log_scale
        total = total + (loss * some).sum() / some.sum().clamp_min(1)
    return total / 2


def fine_loss(plan: Tensor, target: Tensor, source: Tensor, target_mask: Tensor, source_mask: Tensor, radius: float) -> Tensor:
    """Mean negative log assignment of true pairs, and of the bin for points without a partner. plan: [p, k + 1, k + 1], logs; target,
    source: points of the patches in one frame, [p, k, 3]; masks bool [p, k]."""
    square = ((target[:, :, None] - source[:, None]) ** 2).sum(3)
    pairs = (square < radius**2) & target_mask[:, :, None] & source_mask[:, None]
    labels = F.pad(pairs, (0, 1, 0, 1))
    labels[:, :-1, -1] = ~pairs.any(2) & target_mask
    labels[:, -1, :-1] = ~pairs.any(1) & source_mask
    return -plan[labels].sum() / labels.sum().clamp_min(1)


# the network --------------------------------------------------------------------------------------------------------


class Descriptors(NamedTuple):
    """Superpoints [b, nodes, 3] with features of length 1 [b, nodes, width], and features of every point [b, n, width]; zeros in
    padding."""

    source_nodes: Tensor
    target_nodes: Tensor
    source_node_features: Tensor
    target_node_features: Tensor
    source_features: Tensor
    target_features: Tensor


class RoITr(RegistrationModel):
    @dataclass(frozen=True)
    class Config:
        planes: tuple[int, ...] = (64, 128, 256, 256)
        blocks: tuple[int, ...] = (2, 3, 3, 3)
        strides: tuple[int, ...] = (1, 4, 4, 4)
        neighbours: tuple[int, ...] = (8, 16, 16, 16)
        width: int = 256  # of the global transformer and the descriptors
        heads: int = 4
        layers: tuple[str, ...] = ("self", "cross") * 3
        distance_unit: float = 0.2  # metres to a radian of the embedding's fastest wave
        angle_unit: float = 15.0  # degrees
        angle_neighbours: int = 3
        node_matches: int = 256
        adaptive: float | None = None  # distance below which all superpoints match, instead of the best `node_matches`
        patch_points: int = 64
        transport_iterations: int = 100
        top_k: int = 3
        mutual: bool = True
        confidence: float = 0.05
        use_node_scores: bool = False
        matching_radius: float = 0.05  # metres: points that are this near are the same
        train_matches: int = 128
        positive_margin: float = 0.1
        negative_margin: float = 1.4
        positive_optimum: float = 0.1
        negative_optimum: float = 1.4
        log_scale: float = 24.0
        positive_overlap: float = 0.1
        coarse_weight: float = 1.0
        fine_weight: float = 1.0
        pair_mean: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # weights are initialised as if pair features came standardised by these:
        pair_std: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # little data can't first learn to tell neighbourhoods apart
        estimator: str = "ransac"  # or "svd": all correspondences, weighted by their scores
        ransac_radius: float = 0.05

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        sizes = [1, *c.planes]
        self.encoder = nn.ModuleList(Encoder(a, b, n, c.width, c.heads) for a, b, n in zip(sizes, c.planes, c.blocks, strict=False))
        self.tokens = Tap()
        last = len(c.planes) - 1
        self.decoder = nn.ModuleList(
            Decoder(c.planes[min(i + 1, last)], d, c.width, c.heads, first=i == last) for i, d in enumerate(c.planes)
        )
        self.transformer = GlobalTransformer(c)
        self.features = Tap()
        self.coarse_head = nn.Linear(c.width, c.width)
        self.fine_head = nn.Linear(c.planes[0], c.width)
        self.bin_score = nn.Parameter(torch.tensor(1.0))
        for module in self.modules():
            if isinstance(module, PPFAttention):
                module.standardise(c.pair_mean, c.pair_std)
        # in the released weights, but nothing reads them
        self.unused_bin_score = nn.Parameter(torch.tensor(1.0))
        self.unused_overlap = nn.Linear(c.width, 1)

    @property
    def least_points(self) -> int:
        """So many that each level has a superpoint more than the angles need, and each interpolation its three points."""
        return max(self.config.angle_neighbours + 1, 4) * math.prod(self.config.strides)

    def forward(
        self, source: Tensor, source_normals: Tensor, source_count: Tensor, target: Tensor, target_normals: Tensor, target_count: Tensor
    ) -> Descriptors:
        """Points and unit normals float [b, n, 3], [b, m, 3], and int64 [b], how many are real."""
        n, m = source.shape[1], target.shape[1]
        points, normals = (
            torch.stack([F.pad(a, (0, 0, 0, max(0, m - n))), F.pad(b, (0, 0, 0, max(0, n - m)))], 1).flatten(0, 1)
            for a, b in ((source, target), (source_normals, target_normals))
        )
        count = torch.stack([source_count, target_count], 1).flatten()
        levels = pyramid(points, normals, count, self.config.strides, self.config.neighbours)
        nodes, node_features, features = self.describe(levels)
        node_features = node_features * real(levels[-1].count, nodes.shape[1])[..., None]
        features = features * real(count, features.shape[1])[..., None]
        (a, b), (fa, fb), (pa, pb) = (x.unflatten(0, (-1, 2)).unbind(1) for x in (nodes, node_features, features))
        return Descriptors(a, b, fa, fb, pa[:, :n], pb[:, :m])

    def describe(self, levels: list[Level]) -> tuple[Tensor, Tensor, Tensor]:
        """Superpoints, their features and those of all points, of clouds that stand in turn, source and target."""
        x = torch.ones_like(levels[0].points[..., :1])  # points bring nothing but where they are
        found = []
        for i, (encoder, level) in enumerate(zip(self.encoder, levels, strict=True)):
            x = encoder.descend(x, level)
            if i == 0:
                x = self.tokens(x, batch=len(x) // 2)
            x = encoder.refine(x, level)
            found.append(x)
        top = levels[-1]
        y = self.transformer(x, top.points, top.count)
        node_features = F.normalize(self.coarse_head(self.features(y, batch=len(y) // 2)), dim=2)
        up: Tensor | None = None
        for i in reversed(range(len(levels))):
            up = self.decoder[i](found[i], levels[i], up, levels[i + 1] if up is not None else None)
        assert up is not None
        return top.points, node_features, self.fine_head(up)

    # matching of one pair -----------------------------------------------------------------------------------------

    def pairs(self, batch: Batch) -> list[dict[str, Tensor]]:
        """For each pair: its points, its patches (t, s) and its features, without padding."""
        out, pairs = self.forward_batch(batch), []
        for i, (n, m) in enumerate(zip(batch["source_count"].tolist(), batch["target_count"].tolist(), strict=True)):
            a, b = _nodes(n, self.config.strides), _nodes(m, self.config.strides)
            source, target = batch["source"][i, :n], batch["target"][i, :m]
            pairs.append(
                {
                    "source": source,
                    "target": target,
                    "s": patches(source, out.source_nodes[i, :a], self.config.patch_points),
                    "t": patches(target, out.target_nodes[i, :b], self.config.patch_points),
                    "source_nodes": out.source_node_features[i, :a].float(),
                    "target_nodes": out.target_node_features[i, :b].float(),
                    "source_features": out.source_features[i, :n].float(),
                    "target_features": out.target_features[i, :m].float(),
                }
            )
        return pairs

    def plan(self, pair: dict[str, Any], t: Tensor, s: Tensor) -> Tensor:
        """Log assignments of the points of matched patches: int64 [p] each to [p, k + 1, k' + 1], rows of the target."""
        a, b = pair["target_features"][pair["t"].index[t]], pair["source_features"][pair["s"].index[s]]
        scores = a @ b.transpose(1, 2) / a.shape[2] ** 0.5
        return log_transport(scores, pair["t"].mask[t], pair["s"].mask[s], self.bin_score, self.config.transport_iterations)

    def match(self, pair: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(target superpoint, source superpoint, score) of each match int64 [p], and the plan."""
        c = self.config
        t, s, score = match_nodes(pair["target_nodes"], pair["source_nodes"], c.node_matches, c.adaptive)
        return t, s, score, self.plan(pair, t, s)

    def loss(self, batch: Batch) -> Losses:
        """Overlap-aware circle loss of superpoints, and the transport's negative log likelihood on true pairs of patches."""
        c, coarse, fine = self.config, [], []
        for pair, motion in zip(self.pairs(batch), batch["transform"], strict=True):
            moved = move(motion, pair["source"])
            which, overlap = node_overlaps(pair["target"], moved, pair["t"], pair["s"], c.matching_radius)
            coarse.append(circle_loss(pair["target_nodes"], pair["source_nodes"], which, overlap, c))
            which = which[overlap > c.positive_overlap]
            if len(which) > c.train_matches:
                which = which[torch.randperm(len(which), device=which.device)[: c.train_matches]]
            if len(which):
                t, s = which.unbind(1)
                points = pair["target"][pair["t"].index[t]], moved[pair["s"].index[s]]
                masks = pair["t"].mask[t], pair["s"].mask[s]
                fine.append(fine_loss(self.plan(pair, t, s), *points, *masks, c.matching_radius))
        terms = {"coarse": torch.stack(coarse).mean(), "fine": torch.stack(fine).mean() if fine else coarse[0] * 0}
        return Losses(c.coarse_weight * terms["coarse"] + c.fine_weight * terms["fine"], terms)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Registered:
        """Correspondences from coarse to fine, and the motion they agree on."""
        c = self.config
        found: tuple[list[Tensor], ...] = ([], [], [], [])
        for pair in self.pairs(batch):
            t, s, node_score, plan = self.match(pair)
            scores = plan[:, :-1, :-1].exp()
            p, i, j = mutual_matches(scores, pair["t"].mask[t], pair["s"].mask[s], c.top_k, c.mutual, c.confidence)
            weight = scores[p, i, j] * (node_score[p] if c.use_node_scores else 1.0)
            source, target = pair["source"][pair["s"].index[s[p], j]], pair["target"][pair["t"].index[t[p], i]]
            if c.estimator == "svd":
                motion = fit_motion(source, target, weight) if len(source) >= 3 else torch.eye(4, device=source.device)
            else:
                motion = ransac_motion(source, target, c.ransac_radius, generator=torch.Generator().manual_seed(0))
            for items, value in zip(found, (motion, source, target, weight), strict=True):
                items.append(value)
        return Registered(torch.stack(found[0]), *found[1:])


def _nodes(count: int, strides: tuple[int, ...]) -> int:
    for s in strides:
        count //= s
    return count
