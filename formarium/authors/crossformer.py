"""CrossFormer: github.com/cheerss/CrossFormer (models/crossformer.py and its detection and segmentation backbones)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dense = "backbone" in header["reference"]["entry"]
    stages, ratio, size = len(theirs["depths"]), theirs.get("mlp_ratio", 4.0), theirs.get("img_size", 224)
    return {
        "dim": theirs.get("embed_dim", 96),
        "depths": theirs["depths"],
        "heads": theirs["num_heads"],
        "groups": theirs.get("group_size", (7,) * stages),
        "intervals": theirs.get("crs_interval", (8, 4, 2, 1)),
        "patch_sizes": theirs.get("patch_size", (4,)),
        "merge_sizes": theirs.get("merge_size", ((2,),) * (stages - 1)),
        "mlp_ratios": ratio if isinstance(ratio, (list, tuple)) else (ratio,) * stages,
        "group_growth": theirs.get("group_type", "constant"),
        "adaptive_interval": theirs.get("adaptive_interval", False),
        "cooling": theirs.get("use_acl", False),
        "qkv_bias": theirs.get("qkv_bias", True),
        "patch_norm": theirs.get("patch_norm", True),
        "absolute_positions": theirs.get("ape", False),
        "conditional_positions": theirs.get("use_cpe", False),
        "mask_padding": dense or not theirs.get("no_mask", False),  # the dense code always masks, and pads at the end
        "centre_padding": not dense and bool(theirs.get("pad_type", 0)),
        "image_size": size if isinstance(size, int) else size[0],
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "dense": dense,
    }


_BLOCK = "stages.{i}.blocks.{j}"
authors = Authors(
    names=[
        ("patch_embed.projs", "embed.convs"),
        ("patch_embed.norm", "embed_norm"),
        ("absolute_pos_embed", "positions"),
        ("layers.{i}.downsample.reductions", "stages.{i}.merge.convs"),
        ("layers.{i}.downsample.norm", "stages.{i}.merge_norm"),
        ("layers.{i}.blocks.{j}.attn.pos.pos_proj", f"{_BLOCK}.attention.bias.project"),
        ("layers.{i}.blocks.{j}.attn.pos.pos1", f"{_BLOCK}.attention.bias.layers.0"),
        ("layers.{i}.blocks.{j}.attn.pos.pos2", f"{_BLOCK}.attention.bias.layers.1"),
        ("layers.{i}.blocks.{j}.attn.pos.pos3", f"{_BLOCK}.attention.bias.layers.2"),
        ("layers.{i}.blocks.{j}.attn.proj", f"{_BLOCK}.attention.out"),
        ("layers.{i}.blocks.{j}.attn", f"{_BLOCK}.attention"),
        ("layers.{i}.blocks.{j}.norm_cpe", f"{_BLOCK}.cpe_norm"),
        ("layers.{i}.blocks.{j}.ex_conv", f"{_BLOCK}.cooling.conv"),
        ("layers.{i}.blocks.{j}.ex_ln", f"{_BLOCK}.cooling.norm"),
        ("layers", "stages"),
    ],
    config=config,
    ignore=["*.attn_mask", "*.attn.biases", "*.attn.relative_position_index"],
)
