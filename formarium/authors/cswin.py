"""CSWin: github.com/microsoft/CSWin-Transformer (models/cswin.py and segmentation/backbone/cswin_transformer.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors, State


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dense = header["reference"]["entry"].startswith("segmentation")
    heads = theirs["num_heads"]
    dims = [theirs["embed_dim"]]
    for i in range(1, len(heads)):  # the dense code widens as the heads do, the classifier always doubles
        dims.append(dims[-1] * (heads[i] // heads[i - 1] if dense else 2))
    return {
        "dims": dims,
        "depths": theirs["depth"],
        "heads": heads,
        "stripes": theirs["split_size"],
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "qkv_bias": True if dense else theirs.get("qkv_bias", True),
        "image_size": theirs.get("img_size", 224),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "dense": dense,
    }


def to_ours(state: State, model: Any) -> State:
    """The classifier calls its one norm `norm`; the dense backbone numbers its four."""
    return {k.replace("norm.", f"norms.{len(model.norms) - 1}.", 1) if k.startswith("norm.") else k: v for k, v in state.items()}


def to_theirs(state: State, model: Any) -> State:
    if model.config.dense:
        return state
    return {k.replace("norms.0.", "norm.", 1) if k.startswith("norms.0.") else k: v for k, v in state.items()}


authors = Authors(
    names=[
        ("stage1_conv_embed.0", "stages.0.embed"),
        ("stage1_conv_embed.2", "stages.0.embed_norm"),
        ("merge{i}.conv", "stages.{i}.embed"),
        ("merge{i}.norm", "stages.{i}.embed_norm"),
        ("stage{i+1}.{j}.attns.{k}.get_v", "stages.{i}.blocks.{j}.attention.{k}.lepe"),
        ("stage{i+1}.{j}.proj", "stages.{i}.blocks.{j}.out"),
        ("stage{i+1}", "stages.{i}.blocks"),
        ("norm{i+1}", "norms.{i}"),
    ],
    config=config,
    to_ours=to_ours,
    to_theirs=to_theirs,
)
