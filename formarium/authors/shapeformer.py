"""ShapeFormer: github.com/xuanmay2701/shapeformer (Models/shapeformer.py, Shapelet/mul_shapelet_discovery.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.tasks.time_series_classification.shapelets import best_apart, candidates

_OURS = ("mean", "std", "filter.complexity")  # buffers that their checkpoints don't have
_QKV = ("query", "key", "value")


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    info = np.asarray(theirs["shapelets_info"], dtype=float)
    return {
        "channels": theirs.get("ts_dim", theirs["Data_shape"][1]),
        "length": theirs.get("len_ts", theirs["Data_shape"][2]),
        "num_classes": theirs.get("num_classes", theirs.get("num_labels")),
        "shapelets": tuple((int(r[1]), int(r[2]), int(r[5]), int(r[4])) for r in info),
        "studied": True,
        "dim": theirs["shape_embed_dim"],
        "generic_dim": theirs["local_embed_dim"],
        "hidden": theirs["dim_ff"],
        "heads": theirs["num_heads"],
        "dropout": theirs.get("dropout", 0.4),
        "patch": theirs.get("len_w", 64),
        "patch_dim": theirs.get("local_pos_dim", 48),
    }


def to_ours(state: State, model: Any) -> State:
    """Shapelets and their layers, one module each there, one behind the other here; queries, keys and values in one layer."""
    ours, count = dict(state), len(model.spans)
    pieces = {name: [ours.pop(f"shape_blocks.{i}.{name}") for i in range(count)] for name in _PIECES if f"shape_blocks.0.{name}" in ours}
    for name, (target, turned) in _PIECES.items():
        if name in pieces:
            found = [p.T for p in pieces[name]] if turned else pieces[name]
            ours[target] = torch.stack(found) if name.endswith("bias") else torch.cat(found)
    for block in ("generic", "shapelets"):
        names = [f"blocks.{block}.attention.{part}.weight" for part in _QKV]
        if all(n in ours for n in names):
            ours[f"blocks.{block}.attention.qkv.weight"] = torch.cat([ours.pop(n) for n in names])
    own = model.state_dict()
    return {**{k: own[k] for k in _OURS}, **ours}


_PIECES = {
    "shapelet": ("filter.values", False),
    "l1.weight": ("filter.match_weight", True),
    "l1.bias": ("filter.match_bias", False),
    "l2.weight": ("filter.own_weight", True),
    "l2.bias": ("filter.own_bias", False),
}


def to_theirs(state: State, model: Any) -> State:
    theirs = {k: v for k, v in state.items() if k not in _OURS}
    for name, (source, turned) in _PIECES.items():
        value = theirs.pop(source)
        pieces = value.unbind(0) if name.endswith("bias") else value.split(model.filter.sizes)
        theirs |= {f"shape_blocks.{i}.{name}": p.T.contiguous() if turned else p for i, p in enumerate(pieces)}
    for block in ("generic", "shapelets"):
        parts = theirs.pop(f"blocks.{block}.attention.qkv.weight").chunk(3)
        theirs |= {f"blocks.{block}.attention.{name}.weight": p for name, p in zip(_QKV, parts, strict=True)}
    return theirs


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Tensor:
    """Their complexities are those of the shapelets the network was made with, whatever its weights became."""
    filled = model.filter.values.clone()
    model.filter.set_values(header["reference"]["constructor"]["shapelets"])
    model.filter.values.copy_(filled)
    return model(inputs["x"])


def discovery(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Any]:
    made = header["reference"]["constructor"]
    x, y = inputs["x"].double().numpy(), inputs["y"].numpy()
    tables = candidates(x, y, made["window_size"], made.get("num_pip", 0.4), released=True)
    chosen = sum(len(best_apart(t, max(1, made.get("num_shapelet", 3)))) for t in tables)
    out: dict[str, Any] = {f"candidates_{i}": torch.from_numpy(t) for i, t in enumerate(tables)}
    selected = np.concatenate([best_apart(t, max(1, made.get("num_shapelet", 3))) for t in tables])
    return {**out, "n_selected": torch.tensor(float(chosen)), "selected": torch.from_numpy(selected)}


authors = Authors(
    names=[
        ("embed_layer.0", "conv.time"),
        ("embed_layer.1", "conv.time_norm"),
        ("embed_layer2.0", "conv.across"),
        ("embed_layer2.1", "conv.across_norm"),
        ("Fix_Position.pe", "positions"),
        ("local_attention_layer.to_out", "blocks.generic.attention.norm"),
        ("local_attention_layer", "blocks.generic.attention"),
        ("local_ln1", "blocks.generic.norm1"),
        ("local_ln2", "blocks.generic.norm2"),
        ("local_ff.0", "blocks.generic.fc1"),
        ("local_ff.3", "blocks.generic.fc2"),
        ("attention_layer.to_out", "blocks.shapelets.attention.norm"),
        ("attention_layer", "blocks.shapelets.attention"),
        ("LayerNorm1", "blocks.shapelets.norm1"),
        ("LayerNorm2", "blocks.shapelets.norm2"),
        ("FeedForward.0", "blocks.shapelets.fc1"),
        ("FeedForward.3", "blocks.shapelets.fc2"),
        ("d_pos_embedding", "channel_position"),
        ("s_pos_embedding", "start_position"),
        ("e_pos_embedding", "end_position"),
        ("sw", "weights"),
        ("out", "head"),
        ("out2", "unused.head"),
        ("local_layer", "unused.patch"),
        ("local_pos_layer", "unused.patch_position"),
        ("local_merge", "unused.merge"),
    ],
    config=config,
    call=call,
    to_ours=to_ours,
    to_theirs=to_theirs,
    parts={"shapeformer_discovery*": discovery},
)
