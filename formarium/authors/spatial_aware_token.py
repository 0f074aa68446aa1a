"""SAT: github.com/wpy1999/SAT (Model/SAT.py, and the loss of train.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formarium.authors import Authors, State, load_state, vit_config
from formarium.catalogue import create
from formarium.methods.spatial_aware_token import localisation_loss, normalisation_loss

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # of their deit_sat_*_patch16_224: dim, heads


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    entry = header.get("reference", {}).get("entry", "")
    made = next((s for s in SIZES if f"deit_sat_{s}" in entry), "")  # these functions fix what the class leaves open
    dim, heads = SIZES.get(made, (768, 12))
    own = {"embed_dim": dim, "num_heads": heads, "qkv_bias": bool(made), "norm_eps": 1e-6 if made else 1e-5, **theirs}
    trunk = {**vit_config(own), "dense": True}
    gated = max(0, int(trunk["depth"]) - 9)  # blocks from the tenth on, whatever the depth; the map is of the last three
    return {"trunk": "vit", "trunk_config": trunk, "gated": gated, "mapped": 3, "in_channels": theirs.get("in_chans", 3),
            "num_classes": theirs.get("num_classes", 1000)}  # fmt: skip


def whole(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Both phases of their forward: the training one's means and the test one's map."""
    model: Any = create("spatial_aware_token_tiny", **config(dict(header["reference"]["constructor"]), header))
    load_state(model, state, source="the record")
    expected = header["parameters"]
    if model.parameters_count != expected:
        raise ValueError(f"{model.parameters_count} parameters, the reference has {expected}")
    out = model.eval()(inputs["x"])
    area = out.map.mean((1, 2))
    norm = normalisation_each(out.map, model.kernel)
    share = header["reference"]["constructor"].get("area", 0.25)
    return {
        "logits": out.logits,
        "area_mean": area,
        "norm": norm,
        "map": out.map,
        "loss_localization": (area.mean() - share).abs() + norm.mean(),
    }


def normalisation_each(maps: Tensor, kernel: Tensor) -> Tensor:
    import torch

    return torch.stack([normalisation_loss(m[None], kernel) for m in maps])


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    share = header["reference"]["constructor"].get("area", 0.25)
    maps = inputs["map"].view(len(inputs["map"]), *inputs["map"].shape[-2:])
    out = localisation_loss(inputs["logits"], maps, inputs["labels"].long(), share, inputs["kernel"])
    return {**out.terms, "total": out.total}


authors = Authors(
    names=[
        ("cls_token", "trunk.cls_token"),
        ("loc_token", "spatial_token"),
        ("pos_embed", "trunk.positions"),
        ("loc_embed", "spatial_position"),
        ("weight", "kernel"),
        ("patch_embed.proj", "trunk.embed"),
        ("blocks.{i}.attn.qkv", "trunk.blocks.{i}.attention.qkv"),
        ("blocks.{i}.attn.proj", "trunk.blocks.{i}.attention.out"),
        ("blocks.{i}", "trunk.blocks.{i}"),
        ("norm", "trunk.norm"),
        ("head", "classifier"),
    ],
    config=config,
    parts={"spatial_aware_token_loss*": loss, "*": whole},
)
