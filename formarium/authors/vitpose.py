"""ViTPose: github.com/ViTAE-Transformer/ViTPose (mmpose/models/backbones/vit.py, mmpose/models/heads/topdown_heatmap_simple_head.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    body, head = theirs.get("backbone", theirs), theirs.get("keypoint_head", {})
    size = body.get("img_size", 224)
    extra = head.get("extra") or {}
    deconvs = head.get("num_deconv_layers", 3)
    convs = extra.get("num_conv_layers", 0)
    return {
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "patch": body.get("patch_size", 16),
        "dim": body.get("embed_dim", 768),
        "depth": body.get("depth", 12),
        "heads": body.get("num_heads", 12),
        "mlp_ratio": body.get("mlp_ratio", 4.0),
        "qkv_bias": body.get("qkv_bias", False),
        "qk_scale": body.get("qk_scale"),
        "ratio": body.get("ratio", 1),
        "last_norm": body.get("last_norm", True),
        "drop_path": body.get("drop_path_rate", 0.0),
        "num_joints": head.get("out_channels", 17),
        "upsample": head.get("upsample", 0),
        "align_corners": head.get("align_corners", False),
        "deconv_filters": tuple(head.get("num_deconv_filters", (256, 256, 256))) if deconvs else (),
        "deconv_kernels": tuple(head.get("num_deconv_kernels", (4, 4, 4))) if deconvs else (),
        "head_conv_kernels": tuple(extra.get("num_conv_kernels", [1] * convs)[:convs]),
        "final_kernel": extra.get("final_conv_kernel", 1),
    }


authors = Authors(
    names=[
        ("backbone.patch_embed.proj", "embed"),
        ("backbone.pos_embed", "positions"),
        ("backbone.blocks.{i}.attn.proj", "blocks.{i}.attention.out"),
        ("backbone.blocks.{i}.attn", "blocks.{i}.attention"),
        ("backbone.blocks", "blocks"),
        ("backbone.last_norm", "norm"),
        ("keypoint_head.deconv_layers", "head.deconv"),
        ("keypoint_head.final_layer", "head.final"),
    ],
    config=config,
)
