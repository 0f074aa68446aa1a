"""iFormer: github.com/sail-sg/iFormer (models/inception_transformer.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    scale = theirs.get("layer_scale_init_value", 1e-5) if theirs.get("use_layer_scale") else None
    return {
        "dims": theirs["embed_dims"],
        "depths": theirs["depths"],
        "heads": theirs["num_heads"],
        "attention_heads": theirs["attention_heads"],
        "layer_scales": (None, None, scale, scale),
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "qkv_bias": theirs.get("qkv_bias", True),
        "image_size": theirs.get("img_size", 224),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
    }


_BLOCK = "stages.{i}.blocks.{j}"
_MIXER = [
    ("high_mixer.conv1", "high_mixer.widen_conv"),
    ("high_mixer.proj1", "high_mixer.depthwise"),
    ("high_mixer.proj2", "high_mixer.widen_pool"),
    ("conv_fuse", "fuse"),
    ("proj", "out"),
]
authors = Authors(
    names=[
        ("patch_embed.proj1", "stages.0.embed.0"),
        ("patch_embed.norm1", "stages.0.embed.1"),
        ("patch_embed.proj2", "stages.0.embed.3"),
        ("patch_embed.norm2", "stages.0.embed.4"),
        ("patch_embed{i+1}.proj", "stages.{i}.embed.0"),
        ("patch_embed{i+1}.norm", "stages.{i}.embed.1"),
        ("pos_embed{i+1}", "stages.{i}.positions"),
        *((f"blocks{{i+1}}.{{j}}.attn.{theirs}", f"{_BLOCK}.mixer.{ours}") for theirs, ours in _MIXER),
        ("blocks{i+1}.{j}.attn", f"{_BLOCK}.mixer"),
        ("blocks{i+1}.{j}.layer_scale_1", f"{_BLOCK}.scale1"),
        ("blocks{i+1}.{j}.layer_scale_2", f"{_BLOCK}.scale2"),
        ("blocks{i+1}", "stages.{i}.blocks"),
    ],
    config=config,
)
