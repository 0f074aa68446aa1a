"""Graph Transformer beside PyTorch Geometric's TransformerConv: a peer that works along edges too, not the same function.

The authors' network passes its messages through dgl. Here PyG's layer stands where our attention stands, in as many layers, as wide, with
as many heads; embeddings, norms, feed-forward networks and the head around it are the same modules. Its softmax has no clamp, its edges
are added to keys and values instead of scaling scores, and the edges' own stream gets the edges, not their scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import formarium
from formarium.models.graph.graph_transformer import Update
from references import Pair, forward, squares, step

PEER = "torch_geometric"
NEEDS = ("torch_geometric",)


class Layer(nn.Module):
    """PyG's attention, with what our blocks have around theirs."""

    def __init__(self, config: Any, last: bool):
        super().__init__()
        from torch_geometric.nn import TransformerConv

        edges = config.edges != "none"
        width = config.dim // config.heads
        self.attention = TransformerConv(
            config.dim, width, config.heads, edge_dim=config.dim if edges else None, bias=False, root_weight=False
        )
        self.nodes = Update(config, config.dim)
        self.edges = Update(config, config.dim) if edges and not last else None

    def forward(self, x: Tensor, ends: Tensor, edge: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.nodes(x, self.attention(x, ends, edge))
        return x, self.edges(edge, edge) if self.edges is not None else edge


class Peer(nn.Module):
    """The whole network, from PyG's flat batch: nodes int64 [rows], ends int64 [2, edges], kinds int64 [edges], positions float [rows, k],
    graph int64 [rows], the number of each row's graph."""

    def __init__(self, ours: Any):
        super().__init__()
        c = self.config = ours.config
        self.embed, self.positions = nn.Embedding(c.num_node_types, c.dim), nn.Linear(c.laplacian, c.dim)
        self.embed_edges = nn.Embedding(c.num_edge_types, c.dim) if c.edges == "types" else None
        self.layers = nn.ModuleList(Layer(c, i == c.depth - 1) for i in range(c.depth))
        sizes = ((c.dim, c.dim // 2), (c.dim // 2, c.dim // 4), (c.dim // 4, c.num_outputs))
        self.head = nn.Sequential(*[part for a, b in sizes for part in (nn.Linear(a, b), nn.ReLU())][:-1])

    def forward(self, nodes: Tensor, ends: Tensor, kinds: Tensor, positions: Tensor, graph: Tensor, graphs: int) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        x = self.embed(nodes) + self.positions(positions)
        edge = self.embed_edges(kinds) if self.embed_edges is not None else None
        for layer in self.layers:
            x, edge = layer(x, ends, edge)
        return self.head(x if self.config.level == "node" else global_mean_pool(x, graph, graphs))


def molecule(generator: torch.Generator) -> tuple[int, Tensor]:
    """About 23 atoms: a tree whose atoms bond to one of the last three, and three bonds more, each both ways. Edges int64 [e, 2]."""
    n = int(torch.randint(16, 31, (), generator=generator))
    pairs = {(i, max(0, i - 1 - int(torch.randint(0, 3, (), generator=generator)))) for i in range(1, n)}
    pairs |= {(i, i - 5) for i in torch.randint(5, n, (3,), generator=generator).tolist()}
    bonds = torch.tensor(sorted(pairs))
    return n, torch.cat([bonds, bonds.flip(1)])


def community(generator: torch.Generator) -> tuple[int, Tensor]:
    """About 117 nodes, of which 43 in 100 pairs are joined, as many as in PATTERN's block models."""
    n = int(torch.randint(88, 147, (), generator=generator))
    joined = torch.rand(n, n, generator=generator).tril(-1) > 0.57
    pairs = joined.nonzero()
    return n, torch.cat([pairs, pairs.flip(1)])


def batches(graphs: list[tuple[int, Tensor]], c: Any, generator: torch.Generator) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The same graphs as formarium and as PyG take them."""
    count, most = len(graphs), max(n for n, _ in graphs)
    nodes = torch.full((count, most), -1)
    edges = torch.full((count, max(len(e) for _, e in graphs), 2), -1)
    kinds = torch.full(edges.shape[:2], -1)
    positions = torch.zeros(count, most, c.laplacian)
    ends, first = [], 0
    for i, (n, e) in enumerate(graphs):
        nodes[i, :n] = torch.randint(0, c.num_node_types, (n,), generator=generator)
        edges[i, : len(e)] = e
        kinds[i, : len(e)] = torch.randint(0, c.num_edge_types, (len(e),), generator=generator)
        positions[i, :n] = torch.randn(n, c.laplacian, generator=generator)
        ends.append(e.T + first)
        first += n
    here = nodes >= 0
    flat = nodes[here], torch.cat(ends, 1), kinds[kinds >= 0], positions[here], here.nonzero()[:, 0], count
    return (nodes, edges, kinds, positions), flat


def pairs(clone: Path) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(0)
    for variant, what, graphs in (
        ("graph_transformer_zinc_bn", "128 molecules", [molecule(generator) for _ in range(128)]),
        ("graph_transformer_pattern_bn", "8 block models", [community(generator) for _ in range(8)]),
    ):
        torch.manual_seed(0)
        ours = formarium.create(variant)
        peer = Peer(ours)
        own, flat = batches(graphs, ours.config, generator)
        yield Pair(f"{variant}, {what}", "forward", forward(ours, *own), forward(peer, *flat))
        yield Pair(
            f"{variant}, {what}",
            "train",
            step(ours, lambda m=ours, x=own: squares(m(*x))),
            step(peer, lambda m=peer, x=flat: squares(m(*x))),
        )
