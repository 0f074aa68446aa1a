"""Graph Transformer: github.com/graphdeeplearning/graphtransformer (nets/*/graph_transformer_net.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors

MAX_COLOURS = {"molecules_graph_regression": 37, "SBMs_node_classification": 100}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    molecules = "num_atom_type" in theirs
    kind = "molecules_graph_regression" if molecules else "SBMs_node_classification"
    own: dict[str, Any] = {
        "dim": theirs["hidden_dim"],
        "out_dim": 0 if theirs["out_dim"] == theirs["hidden_dim"] else theirs["out_dim"],
        "depth": theirs["L"],
        "heads": theirs["n_heads"],
        "laplacian": theirs.get("pos_enc_dim", 0) if theirs.get("lap_pos_enc") else 0,
        "wl": MAX_COLOURS[kind] if theirs.get("wl_pos_enc") else 0,
        "batch_norm": theirs["batch_norm"],
        "layer_norm": theirs["layer_norm"],
        "residual": theirs["residual"],
        "readout": theirs["readout"] if theirs.get("readout") in ("sum", "max") else "mean",
        "dropout": theirs.get("dropout", 0.0),
        "input_dropout": theirs.get("in_feat_dropout", 0.0),
        "full_graph": theirs.get("full_graph", False),
        "self_loops": theirs.get("self_loop", False),
    }
    if molecules:
        edges = "types" if theirs.get("edge_feat", True) else "ones"
        types = {"num_node_types": theirs["num_atom_type"], "num_edge_types": theirs["num_bond_type"]}
        return {**own, **types, "edges": edges, "level": "graph", "regression": True, "num_outputs": 1}
    types = {"num_node_types": theirs["in_dim"], "num_edge_types": 1, "num_outputs": theirs["n_classes"]}
    return {**own, **types, "edges": "none", "level": "node", "regression": False}


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    """Their flat graph (src, dst, h, e, and the graph of each node) in our padded batch, and the nodes' outputs flat again."""
    h, src, dst = inputs["h"].flatten(), inputs["src"], inputs["dst"]
    batch = inputs.get("batch", torch.zeros_like(h))
    b, n = int(batch.max()) + 1, torch.bincount(batch)
    first = torch.cat([n.new_zeros(1), n.cumsum(0)[:-1]])
    order = batch.argsort(stable=True)
    place = torch.empty_like(batch)
    place[order] = torch.arange(len(h)) - first[batch[order]]  # of a node in its graph
    count = torch.bincount(batch[dst], minlength=b)
    by_graph = batch[dst].argsort(stable=True)
    slot = torch.empty_like(dst)
    slot[by_graph] = torch.arange(len(dst)) - (count.cumsum(0) - count)[batch[dst][by_graph]]
    nodes = h.new_full((b, int(n.max())), -1).index_put((batch, place), h)
    edges = h.new_full((b, max(1, int(count.max())), 2), -1)
    edges = edges.index_put((batch[dst], slot), torch.stack([place[src], place[dst]], 1))
    types = h.new_full(edges.shape[:2], -1)
    kinds = inputs["e"].flatten().long() if "e" in inputs and model.config.edges == "types" else torch.zeros_like(dst)
    given = [nodes, edges, types.index_put((batch[dst], slot), kinds)]
    if model.config.laplacian:
        lap = next(inputs[k] for k in ("lap", "h_lap_pos_enc", "lap_pos_enc") if k in inputs).float()
        given.append(lap.new_zeros(*nodes.shape, lap.shape[1]).index_put((batch, place), lap))
    if model.config.wl:
        wl = next(inputs[k] for k in ("wl", "h_wl_pos_enc", "wl_pos_enc") if k in inputs).flatten().long()
        given.append(wl.new_full(nodes.shape, -1).index_put((batch, place), wl))
    out = model(*given)
    return out[batch, place] if model.config.level == "node" else out


def fuse(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Q, K and V in one matrix."""
    out = {}
    for name, value in state.items():
        if ".attention.Q." in name:
            out[name.replace(".Q.", ".qkv.")] = torch.cat([state[name.replace(".Q.", f".{k}.")] for k in "QKV"])
        elif ".attention.K." not in name and ".attention.V." not in name:
            out[name] = value
    return out


def split(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if ".attention.qkv." in name:
            out |= {name.replace(".qkv.", f".{k}."): v for k, v in zip("QKV", value.chunk(3), strict=True)}
        else:
            out[name] = value
    if model.config.edges == "none":  # the net without edge features calls its parts by shorter names
        out = {k.replace(".nodes.", ".only."): v for k, v in out.items()}
    return out


def to_ours(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    return fuse({k.replace(".only.", ".nodes."): v for k, v in state.items()}, model)


def _update(part: str, suffix: str, ffn: str) -> list[tuple[str, str]]:
    theirs, ours = "layers.{i}.", "blocks.{i}." + part + "."
    norms = [(f"{theirs}{k}_norm{j}{suffix}", f"{ours}norm{j}.{k}") for j in (1, 2) for k in ("layer", "batch")]
    linears = [(f"{theirs}FFN_{ffn}layer{j}", f"{ours}fc{j}") for j in (1, 2)]
    return [(f"{theirs}O{suffix}", f"{ours}out"), *norms, *linears]


authors = Authors(
    names=[
        ("embedding_h", "embed"),
        ("embedding_e", "embed_edges"),
        ("embedding_lap_pos_enc", "embed_positions"),
        ("embedding_wl_pos_enc", "embed_colours"),
        ("layers.{i}.attention.proj_e", "blocks.{i}.attention.edge"),
        ("layers.{i}.attention", "blocks.{i}.attention"),
        *_update("nodes", "_h", "h_"),
        *_update("edges", "_e", "e_"),
        *_update("only", "", ""),
        ("MLP_layer.FC_layers", "head"),
    ],
    config=config,
    call=call,
    to_ours=to_ours,
    to_theirs=split,
)
