"""Graph Transformer (Dwivedi & Bresson, DLG-AAAI 2021, arXiv 2012.09699).

A transformer whose tokens attend to their neighbours in a graph only, and whose positions are the graph's own: Laplacian eigenvectors
(eq. 3-4), with random signs in training. Where edges have features, they scale the scores channel by channel, and the scores are what
the edges become (eq. 12-16): s_ij = (K h_j * Q h_i / sqrt(d)) * E e_ij, w_ij = exp(sum of s_ij), h_i' = sum_j w_ij V h_j / sum_j w_ij.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.ops.graph import neighbour_attention, scatter_sum
from formarium.tasks.graph_prediction.model import GraphPredictor

EDGES, READOUTS = ("types", "ones", "none"), ("mean", "sum", "max")
CLAMP = 5.0  # of the scores, in place of subtracting the largest
DENSE = 8  # up to so many pairs of (padded) nodes an edge, matrices of all pairs take less time than lists of edges
EPS = 1e-6  # of the sum of weights, where edges have features


class NeighbourAttention(nn.Module):
    """Attention along edges. x: float [nodes, dim]; source, target: int64 [edges]; edge: float [edges, dim] or None.

    valid: float [edges], 0 for what is padding, or None. pairs: the same edges as matrices, where that is quicker (without edge features
    only), or None. Returns what nodes get, [nodes, out], and what edges get, [edges, out] (None without edge features).
    """

    def __init__(self, dim: int, out: int, heads: int, edges: bool, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * out, bias=bias)
        self.edge = nn.Linear(dim, out, bias=bias) if edges else None

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        target: Tensor,
        edge: Tensor | None = None,
        valid: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(x)
        if pairs is not None and self.edge is None:
            return self.among_all(pairs.spread(qkv), pairs), None
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)  # n h c
        scores = k.index_select(0, source) * (q * q.shape[-1] ** -0.5).index_select(0, target)  # e h c
        if self.edge is not None:
            assert edge is not None
            scores = scores * self.edge(edge).unflatten(-1, (self.heads, -1))
        weights = scores.float().sum(-1).clamp(-CLAMP, CLAMP).exp().to(v.dtype)  # e h
        if valid is not None:
            weights = weights * valid[:, None].to(weights.dtype)
        out = neighbour_attention(weights, v, source, target, EPS if self.edge is not None else 0.0)
        return out.flatten(1), scores.flatten(1) if self.edge is not None else None

    def among_all(self, qkv: Tensor, pairs: Pairs) -> Tensor:
        """The same over all pairs of each graph's nodes, of which those without an edge weigh nothing. qkv: float [b, n, 3 out]."""
        q, k, v = split_heads(qkv, self.heads, 3)  # b h n c
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = scores.float().clamp(-CLAMP, CLAMP).exp() * pairs.count[:, None]
        total = weights.sum(-1, keepdim=True)
        out = (weights.to(v.dtype) @ v) / (total + (total == 0)).to(v.dtype)
        return pairs.gather(merge_heads(out))


class Norm(nn.Module):
    """Layer norm, then batch norm over all nodes (or edges) of the batch; either may be left out. x: float [rows, dim]."""

    def __init__(self, dim: int, layer: bool, batch: bool):
        super().__init__()
        self.layer = nn.LayerNorm(dim) if layer else nn.Identity()
        self.batch = nn.BatchNorm1d(dim) if batch else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.layer(x))


class Update(nn.Module):
    """What follows attention, for nodes and for edges: a projection, then a feed-forward network, each added and normalised (post-norm).

    x: float [rows, dim], attended: float [rows, out]. Returns [rows, out].
    """

    def __init__(self, c: GraphTransformer.Config, out: int):
        super().__init__()
        self.residual, self.dropout = c.residual, c.dropout
        self.out = nn.Linear(out, out)
        self.norm1 = Norm(out, c.layer_norm, c.batch_norm)
        self.fc1, self.fc2 = nn.Linear(out, 2 * out), nn.Linear(2 * out, out)
        self.norm2 = Norm(out, c.layer_norm, c.batch_norm)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        y = self.out(F.dropout(attended, self.dropout, self.training))
        y = self.norm1(x + y if self.residual else y)
        z = self.fc2(F.dropout(F.relu(self.fc1(y)), self.dropout, self.training))
        return self.norm2(y + z if self.residual else z)


class Block(nn.Module):
    """One layer over nodes and, where they have features, edges. The last layer's edges feed nothing, and are not worked out."""

    def __init__(self, c: GraphTransformer.Config, out: int, last: bool):
        super().__init__()
        self.last = last
        self.attention = NeighbourAttention(c.dim, out, c.heads, c.edges != "none", c.qkv_bias)
        self.nodes = Update(c, out)
        self.edges = Update(c, out) if c.edges != "none" else None
        self.tap = Tap("ragged")

    def forward(self, x: Tensor, edge: Tensor | None, graph: Graph) -> tuple[Tensor, Tensor | None]:
        attended, scores = self.attention(x, graph.source, graph.target, edge, graph.valid, graph.pairs)
        x = self.tap(self.nodes(x, attended), index=graph.index, batch=graph.batch)
        if edge is not None and self.edges is not None and not self.last:
            assert scores is not None
            edge = self.edges(edge, scores)
        return x, edge


@dataclass
class Pairs:
    """A batch of graphs as matrices. count: float [b, n, n], how many edges point at a node (row) from another (column).

    rows: int64 [nodes], where each node is among the b n places, of which others are padding.
    """

    count: Tensor
    rows: Tensor

    @staticmethod
    def of(edges: Tensor, n: int, rows: Tensor) -> Pairs:
        """edges: int64 [b, e, 2], filled up with -1."""
        b = edges.shape[0]
        source, target = edges.unbind(2)
        place = target * n + source + (torch.arange(b, device=edges.device) * n * n)[:, None]
        here = (edges >= 0).all(2)
        count = scatter_sum(here.flatten().float(), place.where(here, 0).flatten(), b * n * n)
        return Pairs(count.view(b, n, n), rows)

    def spread(self, x: Tensor) -> Tensor:
        """[nodes, dim] to [b, n, dim], 0 for padding."""
        b, n = self.count.shape[:2]
        return x.new_zeros(b * n, x.shape[1]).index_copy(0, self.rows, x).view(b, n, -1)

    def gather(self, x: Tensor) -> Tensor:
        """And back."""
        return x.flatten(0, 1).index_select(0, self.rows)


def exporting() -> bool:
    """Whether torch.export is at work, which needs shapes that don't depend on the data."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


@dataclass
class Graph:
    """A batch of graphs as one: edges between rows (int64 [edges]), each row's sample (int64 [rows]), and what is no padding.

    rows, kept: int64, which of the padded nodes and edges are none, or None where the padding is kept (in an exported graph, whose shapes
    can't depend on the data); then `valid` says which edges count.
    """

    source: Tensor
    target: Tensor
    index: Tensor
    batch: int
    rows: Tensor | None = None
    kept: Tensor | None = None
    valid: Tensor | None = None
    pairs: Pairs | None = None  # the edges as matrices, where there are enough of them and nothing else is asked of each

    @staticmethod
    def of(nodes: Tensor, edges: Tensor, padded: bool) -> Graph:
        b, n = nodes.shape
        index = torch.arange(b, device=nodes.device)[:, None].expand(b, n).flatten()
        if padded:
            ends = edges.clamp_min(0) + (torch.arange(b, device=nodes.device) * n)[:, None, None]
            source, target = ends.flatten(0, 1).unbind(1)
            return Graph(source, target, index, b, valid=(edges >= 0).all(2).flatten())
        rows, kept = (nodes >= 0).flatten(), (edges >= 0).all(2).flatten()
        place = (rows.cumsum(0) - 1).view(b, n)  # of each node among those that are no padding
        rows, kept = rows.nonzero()[:, 0], kept.nonzero()[:, 0]
        source, target = place.gather(1, edges.clamp_min(0).flatten(1)).view(-1, 2).index_select(0, kept).unbind(1)
        return Graph(source, target, index.index_select(0, rows), b, rows, kept)

    def node_rows(self, x: Tensor) -> Tensor:
        """[batch, n, ...] to [rows, ...]."""
        return x.flatten(0, 1) if self.rows is None else x.flatten(0, 1).index_select(0, self.rows)

    def edge_rows(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.kept is None else x.flatten(0, 1).index_select(0, self.kept)

    def padded(self, x: Tensor, nodes: Tensor) -> Tensor:
        """[rows, ...] to [batch, n, ...], 0 for padding."""
        if self.rows is None:
            return (x * (nodes >= 0).flatten()[:, None]).unflatten(0, nodes.shape)
        return x.new_zeros(nodes.numel(), *x.shape[1:]).index_copy(0, self.rows, x).unflatten(0, nodes.shape)


class GraphTransformer(GraphPredictor):
    @dataclass(frozen=True)
    class Config:
        level: str = "graph"  # what is predicted: a value or class of each "graph", or of each "node"
        regression: bool = True
        num_outputs: int = 1  # values or classes
        num_node_types: int = 28
        num_edge_types: int = 4
        edges: str = "types"  # the edges' features: their "types", "ones" (a learned constant at first), or "none"
        dim: int = 64
        out_dim: int = 0  # of the last layer; 0: dim. Others need residual = False
        depth: int = 10
        heads: int = 8
        laplacian: int = 8  # eigenvectors; 0: none
        wl: int = 0  # size of the table of Weisfeiler-Lehman colours; 0: none
        batch_norm: bool = True
        layer_norm: bool = False
        residual: bool = True
        readout: str = "mean"  # of a graph's nodes: mean, sum or max
        qkv_bias: bool = False
        dropout: float = 0.0
        input_dropout: float = 0.0
        full_graph: bool = False  # every node attends to every other; the edges' types are lost
        self_loops: bool = False  # each node attends to itself, too; the edges' types are lost

    def __init__(self, config: Config):
        super().__init__(config)
        c, width = config, config.out_dim or config.dim
        for name, value, known in (("edges", c.edges, EDGES), ("readout", c.readout, READOUTS)):
            if value not in known:
                raise BadInput(name, expected=" or ".join(known), got=repr(value))
        if c.dim % c.heads or width % c.heads:
            raise BadInput("dim", expected=f"a multiple of the {c.heads} heads", got=f"{c.dim}, {width} at the end")
        if c.residual and width != c.dim:
            raise BadInput("out_dim", expected=f"{c.dim} as dim, or residual = False", got=str(width))
        self.embed = nn.Embedding(c.num_node_types, c.dim)
        self.embed_positions = nn.Linear(c.laplacian, c.dim) if c.laplacian else None
        self.embed_colours = nn.Embedding(c.wl, c.dim) if c.wl else None
        if c.edges != "none":
            self.embed_edges = nn.Embedding(c.num_edge_types, c.dim) if c.edges == "types" else nn.Linear(1, c.dim)
        self.tokens = Tap("ragged")
        self.blocks = nn.ModuleList([Block(c, width if last else c.dim, last) for last in (i == c.depth - 1 for i in range(c.depth))])
        self.features = Tap("tokens" if c.level == "graph" else "ragged")
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in ((width, width // 2), (width // 2, width // 4), (width // 4, c.num_outputs)))

    def forward(
        self, nodes: Tensor, edges: Tensor, edge_types: Tensor | None = None, positions: Tensor | None = None, colours: Tensor | None = None
    ) -> Tensor:
        """Graphs of up to n nodes and e edges, filled up with -1, to [batch, num_outputs] or, at level "node", [batch, n, num_outputs].

        nodes: int64 [batch, n]. edges: int64 [batch, e, 2] (source, target). edge_types: int64 [batch, e].
        positions: what Config asks for: eigenvectors, float [batch, n, laplacian], or else colours, int64 [batch, n].
        colours: where it asks for both. Raises BadInput where numbers are out of range.
        """
        c = self.config
        if not c.laplacian and c.wl:
            positions, colours = None, positions
        graph = Graph.of(nodes, edges, padded=exporting())
        if c.edges == "none" and graph.rows is not None and nodes.numel() * nodes.shape[1] <= DENSE * len(graph.source):
            graph.pairs = Pairs.of(edges, nodes.shape[1], graph.rows)
        x = self.embed(graph.node_rows(nodes).clamp_min(0))
        if c.edges != "none":  # the released nets drop out before the positions are added, or after, as here
            x = F.dropout(x, c.input_dropout, self.training)
        if self.embed_positions is not None and positions is not None:
            x = x + self.embed_positions(graph.node_rows(positions).to(self.embed_positions.weight.dtype))
        if self.embed_colours is not None and colours is not None:
            x = x + self.embed_colours(graph.node_rows(colours).clamp_min(0))
        if c.edges == "none":
            x = F.dropout(x, c.input_dropout, self.training)
        x = self.tokens(x, index=graph.index, batch=graph.batch)
        edge = self.edge_embedding(graph, edge_types, x)
        for block in self.blocks:
            x, edge = block(x, edge, graph)
        if c.level == "node":
            x = self.features(x, index=graph.index, batch=graph.batch)
            return graph.padded(self.mlp(x), nodes)
        return self.mlp(self.features(self.pool(graph.padded(x, nodes), nodes)[:, None])[:, 0])

    def edge_embedding(self, graph: Graph, edge_types: Tensor | None, x: Tensor) -> Tensor | None:
        """What edges start as, [edges, dim]."""
        if self.config.edges == "none":
            return None
        if self.config.edges == "ones":
            return self.embed_edges(x.new_ones(len(graph.source), 1))
        assert edge_types is not None
        return self.embed_edges(graph.edge_rows(edge_types).clamp_min(0))

    def pool(self, x: Tensor, nodes: Tensor) -> Tensor:
        """The readout of a graph: [batch, n, dim] to [batch, dim]."""
        present = (nodes >= 0)[..., None]
        if self.config.readout == "max":
            return x.masked_fill(~present, -torch.inf).amax(1)
        total = x.sum(1)
        return total if self.config.readout == "sum" else total / present.sum(1)

    def mlp(self, x: Tensor) -> Tensor:
        for layer in self.head[:-1]:
            x = F.relu(layer(x))
        return self.head[-1](x)
