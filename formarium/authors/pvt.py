"""PVT: github.com/whai362/PVT (classification/pvt.py and detection/pvt.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    stages = len(theirs["embed_dims"])
    return {
        "dims": theirs["embed_dims"],
        "depths": theirs["depths"],
        "heads": theirs["num_heads"],
        "reductions": theirs["sr_ratios"],
        "mlp_ratios": theirs["mlp_ratios"],
        "patch_sizes": (theirs["patch_size"], *(2,) * (stages - 1)),
        "qkv_bias": theirs.get("qkv_bias", False),
        "norm_eps": theirs.get("norm_eps", 1e-5),
        "image_size": theirs["img_size"],
        "num_classes": theirs.get("num_classes", 1000),
        "dense": header["reference"]["entry"].startswith("detection"),
    }


authors = Authors(
    names=[
        ("patch_embed{i+1}.proj", "stages.{i}.embed"),
        ("patch_embed{i+1}.norm", "stages.{i}.embed_norm"),
        ("pos_embed{i+1}", "stages.{i}.positions"),
        ("block{i+1}.{j}.attn.sr", "stages.{i}.blocks.{j}.attention.shrink"),
        ("block{i+1}.{j}.attn.norm", "stages.{i}.blocks.{j}.attention.shrink_norm"),
        ("block{i+1}.{j}.attn.proj", "stages.{i}.blocks.{j}.attention.out"),
        ("block{i+1}.{j}.attn", "stages.{i}.blocks.{j}.attention"),
        ("block{i+1}.{j}", "stages.{i}.blocks.{j}"),
    ],
    config=config,
)
