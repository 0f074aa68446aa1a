"""From a graph as read to what a model's batch holds: positional encodings, complete graphs, padding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.task import Sample


def laplacian_eigenvectors(n: int, edges: np.ndarray, k: int) -> np.ndarray:
    """Eigenvectors 2 to k + 1, by eigenvalue, of I - D^-1/2 A D^-1/2 (D: in-degrees, at least 1): float32 [n, k].

    edges: int64 [e, 2]. A graph with fewer than k + 1 nodes gets zeros for what it lacks. An undirected graph's are orthonormal; of a
    directed one's, the real parts. Signs are arbitrary, and so is the basis where eigenvalues coincide.
    """
    adjacency = np.zeros((n, n))
    adjacency[edges[:, 0], edges[:, 1]] = 1
    scale = adjacency.sum(0).clip(1) ** -0.5
    laplacian = np.eye(n) - scale[:, None] * adjacency * scale
    if np.array_equal(adjacency, adjacency.T):
        vectors = np.linalg.eigh(laplacian)[1]
    else:
        values, vectors = np.linalg.eig(laplacian)
        vectors = np.real(vectors[:, values.argsort()])
    out = np.zeros((n, k), dtype=np.float32)
    kept = vectors[:, 1 : k + 1]
    out[:, : kept.shape[1]] = kept
    return out


def wl_colours(n: int, edges: np.ndarray, rounds: int = 1) -> np.ndarray:
    """Weisfeiler-Lehman colours after so many rounds of refinement: int64 [n], from 1.

    A node's new colour is the rank, in its graph, of the MD5 of its own and its neighbours' sorted colours. One round is what the
    released encodings hold (their loop stops before it takes over the second), which tells nodes apart by their degree.
    """
    neighbours: list[set[int]] = [set() for _ in range(n)]
    for a, b in edges.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    colours = [1] * n
    for _ in range(rounds):
        words = ["_".join([str(colours[i]), *sorted(str(colours[j]) for j in neighbours[i])]) for i in range(n)]
        digests = [hashlib.md5(w.encode(), usedforsecurity=False).hexdigest() for w in words]
        rank = {d: r for r, d in enumerate(sorted({*digests}), start=1)}
        colours = [rank[d] for d in digests]
    return np.array(colours, dtype=np.int64)


def complete_edges(n: int) -> np.ndarray:
    """Every ordered pair of different nodes: int64 [n (n - 1), 2]."""
    source, target = np.divmod(np.arange(n * n, dtype=np.int64), n)
    return np.stack([source, target], 1)[source != target]


class Prepare:
    """Raw sample to a prepared one: encodings of the sparse graph first, then its edges as the model takes them.

    preprocessing: laplacian (eigenvectors wanted), wl (whether colours are), full_graph (all pairs become edges of type 0), self_loops
    (an edge of type 0 from each node to itself). What was worked out for a graph is kept, so that it is done once.
    """

    def __init__(self, preprocessing: Mapping[str, Any]):
        self.laplacian = int(preprocessing.get("laplacian", 0))
        self.wl, self.rounds = bool(preprocessing.get("wl", False)), int(preprocessing.get("wl_rounds", 1))
        self.full, self.loops = bool(preprocessing.get("full_graph", False)), bool(preprocessing.get("self_loops", False))
        self._kept: dict[int, tuple[np.ndarray, dict[str, np.ndarray]]] = {}  # by the array of edges, which is held on to

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        out, edges, n = dict(sample), sample["edges"], len(sample["nodes"])
        if id(edges) not in self._kept:
            self._kept[id(edges)] = (edges, self.encodings(n, edges))
        out |= self._kept[id(edges)][1]
        if self.full:
            out["edges"] = complete_edges(n)
            out["edge_types"] = np.zeros(len(out["edges"]), np.int64)
        if self.loops:
            apart = out["edges"][:, 0] != out["edges"][:, 1]
            loops = np.repeat(np.arange(n, dtype=np.int64)[:, None], 2, axis=1)
            out["edges"] = np.concatenate([out["edges"][apart], loops])
            out["edge_types"] = np.zeros(len(out["edges"]), np.int64)
        return out

    def encodings(self, n: int, edges: np.ndarray) -> dict[str, np.ndarray]:
        found = {"eigenvectors": laplacian_eigenvectors(n, edges, self.laplacian)} if self.laplacian else {}
        return found | ({"colours": wl_colours(n, edges, self.rounds)} if self.wl else {})


def collate(samples: Sequence[Sample], nodes: int = 0, edges: int = 1) -> dict[str, Any]:
    """The batch that `model.py` documents, padded to its largest graph (and at least to so many nodes and edges)."""
    import torch

    n = max(nodes, *(len(s["nodes"]) for s in samples))
    e = max(edges, *(len(s["edges"]) for s in samples))
    sizes = {"nodes": n, "edges": e, "edge_types": e, "eigenvectors": n, "colours": n}
    batch: dict[str, Any] = {"id": [s["id"] for s in samples]}
    for key in ("nodes", "edges", "edge_types", "eigenvectors", "colours"):
        if key in samples[0]:
            values = [s[key] for s in samples]
            floats = np.issubdtype(values[0].dtype, np.floating)
            batch[key] = _padded(values, sizes[key], 0.0 if floats else -1)
    for key, fill in (("label", -1), ("target", np.nan)):
        if key in samples[0]:
            values = [np.asarray(s[key]) for s in samples]
            per_node = values[0].ndim == (1 if key == "label" else 2)
            batch[key] = _padded(values, n, fill) if per_node else torch.from_numpy(np.stack(values))
    return batch


def _padded(values: Sequence[np.ndarray], size: int, fill: float) -> Any:
    import torch

    out = np.full((len(values), size, *values[0].shape[1:]), fill, dtype=values[0].dtype)
    for row, value in zip(out, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(out)
