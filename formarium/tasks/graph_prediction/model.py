"""What every graph predictor shares: the batch it takes, its losses, its predictions, its checks.

A batch holds graphs of different sizes, filled up with -1:
    nodes         int64 [batch, n], the type of each node
    edges         int64 [batch, e, 2], (source, target) as places in `nodes`; an undirected edge stands there both ways
    edge_types    int64 [batch, e], the type of each edge (0 where edges have none)
    eigenvectors  float32 [batch, n, k], of the Laplacian, 0 for padding           (where the preprocessing asks for `laplacian`)
    colours       int64 [batch, n], Weisfeiler-Lehman colours, from 1              (where it asks for `wl`)
and, in training and evaluation, one of
    label         int64 [batch] or [batch, n], classes of graphs or of nodes, -1 for padding and for nodes without one
    target        float32 [batch, t] or [batch, n, t], values of graphs or of nodes, NaN for padding and where there is none
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.tasks.graph_prediction.encodings import Prepare, collate, laplacian_eigenvectors, wl_colours

LEVELS = ("graph", "node")


class Values(NamedTuple):
    """value: float32 [batch, t] of graphs, or [batch, n, t] of nodes (0 for padding)."""

    value: Tensor


class Labels(NamedTuple):
    """probabilities: float32 [batch, classes], or [batch, n, classes] of nodes. label: int64 [batch] or [batch, n], the likeliest class,
    -1 for padding."""

    probabilities: Tensor
    label: Tensor


class GraphPredictor(Model):
    """A network over nodes and edges, and what is made of its output.

    Config has at least `level` ("graph" or "node"), `regression`, `num_outputs` (values or classes), `num_node_types`, `num_edge_types`,
    `laplacian` (eigenvectors it takes, 0: none), `wl` (colours it knows, 0: takes none), `full_graph`, `self_loops`. Subclasses write
    `forward(nodes, edges, edge_types, positions, colours)` giving [batch, num_outputs] or [batch, n, num_outputs].
    """

    task = "graph-prediction"
    channel_axes = (None, None, None, 2, None)

    def __init__(self, config: Any):
        super().__init__(config)
        if config.level not in LEVELS:
            raise BadInput("level", expected="graph or node", got=repr(config.level))
        self.set_preprocessing({})

    def adopt(self, card: Any, variant: str, preprocessing: Mapping[str, Any]) -> None:
        super().adopt(card, variant, preprocessing)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Mapping[str, Any]) -> None:
        """What the task works out of each graph is what this network takes."""
        c = self.config
        own = {"laplacian": c.laplacian, "wl": bool(c.wl), "full_graph": c.full_graph, "self_loops": c.self_loops}
        self.preprocessing = {**preprocessing, **own}

    # feeding it -------------------------------------------------------------------------------------------------------

    def inputs_of(self, batch: Batch) -> tuple[Tensor, ...]:
        """`forward`'s inputs from a batch; encodings that the batch lacks are worked out."""
        c, found = self.config, [batch["nodes"], batch["edges"], batch["edge_types"]]
        if c.laplacian:
            vectors = batch.get("eigenvectors")
            if vectors is None or vectors.shape[2] < c.laplacian:
                vectors = _each(batch, lambda n, e: laplacian_eigenvectors(n, e, c.laplacian)).to(batch["nodes"].device)
            found.append(vectors[..., : c.laplacian])
        if c.wl:
            colours = batch.get("colours")
            if colours is None:
                colours = _each(batch, wl_colours, fill=-1).to(batch["nodes"].device)
            found.append(colours)
        return tuple(found)

    def forward_batch(self, batch: Batch) -> Tensor:
        return self(*self.inputs_of(batch))

    # objective and prediction -----------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        """L1 for values; cross entropy for graphs' classes; for nodes' classes, cross entropy weighted by (V - V_c) / V of the batch."""
        inputs = self.inputs_of(batch)
        if self.config.laplacian and self.training:  # an eigenvector's sign is arbitrary: one draw a column and batch
            signs = torch.randint(0, 2, (self.config.laplacian,), device=inputs[3].device) * 2 - 1
            inputs = (*inputs[:3], inputs[3] * signs, *inputs[4:])
        out = self(*inputs).float()
        if self.config.regression:
            known = ~batch["target"].isnan()
            loss = (out[known] - batch["target"][known]).abs().mean()
            return Losses(loss, {"mae": loss})
        label = batch["label"].flatten()
        known = label >= 0
        label, logits = label[known], out.flatten(0, -2)[known]
        weight = class_weights(label, self.config.num_outputs) if self.config.level == "node" else None
        loss = F.cross_entropy(logits, label, weight)
        return Losses(loss, {"cross_entropy": loss})

    def predict(self, batch: Batch) -> Values | Labels:
        out = self.forward_batch(batch).float()
        if self.config.regression:
            return Values(out)
        label = out.argmax(-1)
        if self.config.level == "node":
            label = label.masked_fill(batch["nodes"] < 0, -1)
        return Labels(out.softmax(-1), label)

    # examples and checks ----------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, size: int = 12) -> tuple[Tensor, ...]:
        return self.inputs_of(self.example_batch(batch, seed=int(torch.randint(1 << 30, ())), size=size))

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        alone = self.example_batch(1, size=1)
        return {"30 nodes": self.example(2, size=30), "3 nodes": self.example(2, size=3), "one node": self.inputs_of(alone)}

    def example_batch(self, batch: int = 2, seed: int = 0, size: int = 12) -> dict[str, Any]:
        """Random connected graphs; all of them but the first may have fewer than `size` nodes."""
        c, rng, samples = self.config, np.random.default_rng(seed), []
        prepare = Prepare(self.preprocessing)
        for i in range(batch):
            n = size if i == 0 else int(rng.integers(max(1, size // 2), size + 1))
            tree = [(int(rng.integers(j)), j) for j in range(1, n)]
            pairs = np.array([*tree, *(tuple(p) for p in rng.integers(n, size=(n // 3, 2)) if p[0] != p[1])], dtype=np.int64).reshape(-1, 2)
            pairs = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
            kinds = rng.integers(c.num_edge_types, size=len(pairs)) if c.num_edge_types else np.zeros(len(pairs), np.int64)
            sample = {"id": f"example {i}", "nodes": rng.integers(c.num_node_types, size=n), "edges": pairs, "edge_types": kinds}
            shape = (n,) if c.level == "node" else ()
            if c.regression:
                sample["target"] = rng.standard_normal((*shape, c.num_outputs)).astype(np.float32)
            else:
                sample["label"] = rng.integers(c.num_outputs, size=shape)
            samples.append(prepare(sample, rng))
        room = 2 * (size - 1 + size // 3) if not c.full_graph else size * size
        found = collate(samples, nodes=size, edges=max(1, room))  # of one shape, whatever was drawn
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in found.items()}

    def check_input(
        self, nodes: Any, edges: Any, edge_types: Any = None, positions: Any = None, colours: Any = None
    ) -> None:  # fmt: skip
        c = self.config
        integers = {"dtype": lambda d: d == torch.int64}
        check_tensor("nodes", nodes, "batch nodes", **integers)
        b, n = nodes.shape
        check_tensor("edges", edges, "batch edges 2", sizes={0: b, 2: 2}, **integers)
        _must_be_below("nodes", nodes, c.num_node_types, "node types")
        _must_be_below("edges", edges, n, "nodes")
        if nodes.device.type == "cpu":
            if bool((nodes < 0).all(1).any()):
                raise BadInput("nodes", expected="at least one node in each graph", got="a graph that is all padding")
            ends = edges.flatten(1)
            if bool(((nodes.gather(1, ends.clamp_min(0)) < 0) & (ends >= 0)).any()):
                raise BadInput("edges", expected="edges between nodes", got="one that ends at padding")
        if edge_types is None and c.num_edge_types:
            raise BadInput("edge_types", expected="a tensor [batch, edges]", got="none")
        if edge_types is not None:
            check_tensor("edge_types", edge_types, "batch edges", sizes={0: b, 1: edges.shape[1]}, **integers)
            _must_be_below("edge_types", edge_types, max(1, c.num_edge_types), "edge types")
        given = [("positions", positions), ("colours", colours)]
        for kind in [k for k, wanted in (("eigenvectors", c.laplacian), ("colours", c.wl)) if wanted]:
            name, value = given.pop(0)
            if kind == "eigenvectors":
                check_tensor(f"{name} (eigenvectors)", value, "batch nodes k", sizes={0: b, 1: n, 2: c.laplacian})
            else:
                check_tensor(f"{name} (colours)", value, "batch nodes", sizes={0: b, 1: n}, **integers)
                _must_be_below(name, value, c.wl, "colours")


def class_weights(label: Tensor, classes: int) -> Tensor | None:
    """(V - V_c) / V for each class c of V labels, 0 for a class that isn't there; None where only one is (the weights would be all 0)."""
    sizes = torch.bincount(label, minlength=classes)
    weight = (len(label) - sizes).float() / max(1, len(label)) * (sizes > 0)
    return weight if int((sizes > 0).sum()) > 1 else None


def _must_be_below(name: str, x: Tensor, most: int, what: str) -> None:
    if x.device.type == "cpu" and (int(x.max()) >= most or int(x.min()) < -1):
        raise BadInput(name, expected=f"numbers of {what}, 0 to {most - 1} (-1 for padding)", got=f"{int(x.min())} to {int(x.max())}")


def _each(batch: Batch, encode: Any, fill: float = 0) -> Tensor:
    """An encoding of every graph of a batch, padded."""
    rows = []
    nodes, edges = batch["nodes"].cpu().numpy(), batch["edges"].cpu().numpy()
    for types, pairs in zip(nodes, edges, strict=True):
        n = int((types >= 0).sum())
        code = encode(n, pairs[(pairs >= 0).all(1)])
        rows.append(np.concatenate([code, np.full((len(types) - n, *code.shape[1:]), fill, code.dtype)]))
    return torch.from_numpy(np.stack(rows))
