"""Sample data, generated: molecules with a value that their structure fixes, and graphs of communities (stochastic block models)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.graph_prediction.data import as_data

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
VALENCE = (4, 3, 2, 1, 3, 2, 1, 1, 1)
SHARE = (0.7, 0.1, 0.1, 0.02, 0.01, 0.03, 0.02, 0.01, 0.01)  # of each element
WORTH = (0.4, -0.7, -0.9, 0.3, -0.3, 0.2, 0.6, 0.8, 1.0)  # what an atom of each adds to the value
RING_PENALTY, NEXT_TO_HETERO, DOUBLE_TO_HETERO = 0.8, -0.6, -0.9


def sample(name: str, seed: int = 0) -> Data:
    """ "molecules": 800 and 200 valence-correct molecules (10 to 33 heavy atoms; types ELEMENTS; bonds single, double, triple) with the
    value that `worth` works out of each, normalised by the training set's mean and deviation, as ZINC's penalised logP is.

    "pattern": 300 and 80 graphs of two communities (p 0.5 within, 0.2 between) and a pattern planted among them, one of ten fixed
    subgraphs with fixed node signals; its nodes are to be found (PATTERN). "cluster": 300 and 80 graphs of four communities, one node
    of each labelled in the input; the others' communities are to be found (CLUSTER).
    """
    makers = {"molecules": _molecules, "pattern": _pattern, "cluster": _cluster}
    if name not in makers:
        raise UnknownName("sample", name, makers)
    return makers[name](seed)


# molecules ----------------------------------------------------------------------------------------------------------


def molecule(rng: np.random.Generator) -> tuple[list[int], list[tuple[int, int, int]]]:
    """(elements, bonds (a, b, order)): rings of 5 to 7 and chains, grown to 10 or more atoms; no valence is exceeded."""
    while True:
        types, bonds = _grown(rng)
        if len(types) >= 10:  # or it ran out of free valences
            return types, bonds


def _grown(rng: np.random.Generator) -> tuple[list[int], list[tuple[int, int, int]]]:
    types: list[int] = []
    free: list[int] = []
    bonds: list[tuple[int, int, int]] = []

    def atom(least: int) -> int:
        fits = np.array([s if v >= least else 0 for s, v in zip(SHARE, VALENCE, strict=True)])
        types.append(int(rng.choice(len(SHARE), p=fits / fits.sum())))
        free.append(VALENCE[types[-1]])
        return len(types) - 1

    def bond(a: int, b: int, order: int) -> None:
        bonds.append((a, b, order))
        free[a] -= order
        free[b] -= order

    wanted = int(rng.integers(10, 27))
    atom(2)
    while len(types) < wanted:
        hosts = [i for i, f in enumerate(free) if f > 0]
        if not hosts:
            break
        host = int(rng.choice(hosts))
        if rng.random() < 0.3:
            size = int(rng.choice([5, 6, 6, 7]))
            ring = [atom(3 if i == 0 else 2) for i in range(size)]
            bond(host, ring[0], 1)
            for a, b in zip(ring, [*ring[1:], ring[0]], strict=True):
                bond(a, b, 1)
        else:
            other = atom(1)
            bond(host, other, int(min(rng.choice([1, 2, 3], p=[0.75, 0.21, 0.04]), free[host], free[other])))
    return types, bonds


def worth(types: list[int], bonds: list[tuple[int, int, int]]) -> float:
    """The value of a molecule, before it is normalised: WORTH of its atoms, NEXT_TO_HETERO for each carbon with a neighbour that is none,
    DOUBLE_TO_HETERO for each double bond of a carbon to another element, and a penalty for each atom more than five of each ring."""
    import networkx as nx

    value = sum(WORTH[t] for t in types)
    value += NEXT_TO_HETERO * len({i for a, b, _ in bonds for i, j in ((a, b), (b, a)) if types[i] == 0 and types[j] != 0})
    value += DOUBLE_TO_HETERO * sum(order == 2 and (types[a] == 0) != (types[b] == 0) for a, b, order in bonds)
    rings = nx.cycle_basis(nx.Graph([(a, b) for a, b, _ in bonds]))
    return value - RING_PENALTY * sum(max(0, len(r) - 5) for r in rings)


@cache
def _molecules(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    found, splits = [molecule(rng) for _ in range(1000)], {}
    values = np.array([worth(*m) for m in found])
    values = (values - values[:800].mean()) / values[:800].std()
    for split, places in (("train", range(800)), ("val", range(800, 1000))):
        splits[split] = [_graph(f"molecule {i}", *found[i], np.float32([values[i]])) for i in places]
    return as_data("molecules", splits, {"sample": "molecules", "seed": seed}, names=["penalised worth"])


def _graph(name: str, types: list[int], bonds: list[tuple[int, int, int]], y: Any) -> Sample:
    pairs = np.array([(a, b) for a, b, _ in bonds], dtype=np.int64)
    orders = np.array([order - 1 for *_, order in bonds], dtype=np.int64)
    return {
        "id": name,
        "nodes": np.array(types, dtype=np.int64),
        "edges": np.concatenate([pairs, pairs[:, ::-1]]),
        "edge_types": np.concatenate([orders, orders]),
        "y": y,
    }


# stochastic block models --------------------------------------------------------------------------------------------


def block_model(blocks: np.ndarray, chance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges, both ways, int64 [e, 2]: nodes i and j are joined with probability chance[blocks[i], blocks[j]]."""
    n = len(blocks)
    joined = np.triu(rng.random((n, n)) < chance[blocks[:, None], blocks], 1)
    return np.argwhere(joined | joined.T).astype(np.int64)


def _sbm(name: str, nodes: np.ndarray, edges: np.ndarray, label: np.ndarray) -> Sample:
    return {"id": name, "nodes": nodes, "edges": edges, "edge_types": np.zeros(len(edges), np.int64), "y": label}


@cache
def _pattern(seed: int, size: int = 10) -> Data:
    rng = np.random.default_rng(seed)
    chance = np.array([[0.5, 0.2, 0.35], [0.2, 0.5, 0.35], [0.35, 0.35, 0.0]])
    patterns = [
        (block_model(np.zeros(size, np.int64), np.full((1, 1), 0.6), rng), rng.choice(3, size, p=[0.6, 0.2, 0.2])) for _ in range(10)
    ]

    def one(name: str) -> Sample:
        sizes = [*rng.integers(12, 21, size=2), size]
        blocks = np.repeat(np.arange(3), sizes)
        edges, signal = patterns[rng.integers(10)]
        edges = np.concatenate([block_model(blocks, chance, rng), edges + sum(sizes[:2])])
        nodes = np.concatenate([rng.integers(3, size=sum(sizes[:2])), signal])
        order = rng.permutation(len(nodes))  # new place -> old place
        return _sbm(name, nodes[order], np.argsort(order)[edges], (blocks[order] == 2).astype(np.int64))

    splits = {split: [one(f"{split} {i}") for i in range(count)] for split, count in (("train", 300), ("val", 80))}
    return as_data("pattern", splits, {"sample": "pattern", "seed": seed}, names=["background", "pattern"])


@cache
def _cluster(seed: int, communities: int = 4) -> Data:
    rng = np.random.default_rng(seed)
    chance = np.where(np.eye(communities) > 0, 0.55, 0.15)

    def one(name: str) -> Sample:
        blocks = rng.permutation(np.repeat(np.arange(communities), rng.integers(8, 15, size=communities)))
        nodes = np.zeros(len(blocks), np.int64)
        for c in range(communities):
            nodes[rng.choice(np.flatnonzero(blocks == c))] = c + 1
        return _sbm(name, nodes, block_model(blocks, chance, rng), blocks.astype(np.int64))

    splits = {split: [one(f"{split} {i}") for i in range(count)] for split, count in (("train", 300), ("val", 80))}
    return as_data("cluster", splits, {"sample": "cluster", "seed": seed}, names=[f"community {c}" for c in range(communities)])
