"""STViT: github.com/hhb072/STViT (models/stvit.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dims = theirs.get("embed_dim", (96, 192, 384, 768))
    return {
        "dims": dims,
        "depths": theirs.get("depths", (2, 2, 6, 2)),
        "heads": theirs.get("num_heads", (3, 6, 12, 24)),
        "super_tokens": theirs.get("stoken_size", (8, 4, 2, 1)),
        "iterations": theirs.get("n_iter", (1, 1, 1, 1)),
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "projection": theirs.get("projection") or dims[-1],
        "qkv_bias": theirs.get("qkv_bias", True),
        "qk_scale": theirs.get("qk_scale"),
        "layer_scales": tuple(bool(x) for x in theirs.get("layerscale", (False,) * len(dims))),
        "layer_scale_init": theirs.get("init_values", 1e-6),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
    }


_BLOCK = "stages.{i}.blocks.{j}"


def to_ours(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """Their layer scales are maps of one pixel."""
    return {k: v.flatten() if k.endswith((".scale1", ".scale2")) else v for k, v in state.items()}


def to_theirs(state: dict[str, Any], model: Any) -> dict[str, Any]:
    return {k: v.view(1, -1, 1, 1) if k.endswith((".scale1", ".scale2")) else v for k, v in state.items()}


authors = Authors(
    names=[
        ("patch_embed.proj", "stages.0.embed"),
        ("layers.{i}.downsample.proj", "stages.{i+1}.embed"),
        ("layers.{i}.blocks.{j}.pos_embed.conv", f"{_BLOCK}.positions"),
        ("layers.{i}.blocks.{j}.norm1.norm", f"{_BLOCK}.norm1"),
        ("layers.{i}.blocks.{j}.attn.stoken_refine.qkv", f"{_BLOCK}.attention.qkv"),
        ("layers.{i}.blocks.{j}.attn.stoken_refine.proj", f"{_BLOCK}.attention.out"),
        ("layers.{i}.blocks.{j}.mlp2.conv.conv", f"{_BLOCK}.mlp.local"),
        ("layers.{i}.blocks.{j}.mlp2", f"{_BLOCK}.mlp"),
        ("layers.{i}.blocks.{j}.gamma_1", f"{_BLOCK}.scale1"),
        ("layers.{i}.blocks.{j}.gamma_2", f"{_BLOCK}.scale2"),
        ("layers.{i}.blocks.{j}", _BLOCK),
        ("proj", "projection"),
    ],
    config=config,
    ignore=("*.attn.unfold.weights", "*.attn.fold.weights"),  # the constant kernels eye(9) of their unfold and fold
    to_ours=to_ours,
    to_theirs=to_theirs,
)
