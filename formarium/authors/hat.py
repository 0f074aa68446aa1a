"""HAT: github.com/XPixelGroup/HAT (hat/archs/hat_arch.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors

# what the released class takes for granted; its own defaults differ from every published configuration
DEFAULTS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 1,
    "in_chans": 3,
    "embed_dim": 96,
    "depths": (6, 6, 6, 6),
    "num_heads": (6, 6, 6, 6),
}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    t = {**DEFAULTS, **theirs}
    patch = t["patch_size"]
    height, width = (t["img_size"],) * 2 if isinstance(t["img_size"], int) else t["img_size"]
    patch_h, patch_w = (patch, patch) if isinstance(patch, int) else patch
    return {
        "dim": t["embed_dim"],
        "depths": t["depths"],
        "heads": t["num_heads"],
        "window": t.get("window_size", 7),
        "compress_ratio": t.get("compress_ratio", 3),
        "squeeze_factor": t.get("squeeze_factor", 30),
        "conv_scale": t.get("conv_scale", 0.01),
        "overlap_ratio": t.get("overlap_ratio", 0.5),
        "mlp_ratio": t.get("mlp_ratio", 4.0),
        "qkv_bias": t.get("qkv_bias", True),
        "qk_scale": t.get("qk_scale") or None,
        "image_size": (height // patch_h, width // patch_w),
        "in_channels": t["in_chans"],
        "upscale": t.get("upscale", 2),
        "image_range": t.get("img_range", 1.0),
        "upsampler": "pixelshuffle" if t.get("upsampler", "") == "pixelshuffle" else "none",
        "residual_conv": t.get("resi_connection", "1conv"),
        "absolute_positions": t.get("ape", False),
        "embed_norm": t.get("patch_norm", True),
        "drop_path": t.get("drop_path_rate", 0.1),
        "bicubic_skip": False,
    }


BLOCK, THEIRS = "groups.{i}.blocks.{j}", "layers.{i}.residual_group.blocks.{j}"
OVERLAP, THEIR_OVERLAP = "groups.{i}.overlap", "layers.{i}.residual_group.overlap_attn"

authors = Authors(
    names=[
        ("conv_first", "embed"),
        ("patch_embed.norm", "embed_norm"),
        ("absolute_pos_embed", "positions"),
        (f"{THEIRS}.attn.relative_position_bias_table", f"{BLOCK}.attention.table"),
        (f"{THEIRS}.attn.proj", f"{BLOCK}.attention.out"),
        (f"{THEIRS}.attn", f"{BLOCK}.attention"),
        (f"{THEIRS}.conv_block.cab.0", f"{BLOCK}.channel.down"),
        (f"{THEIRS}.conv_block.cab.2", f"{BLOCK}.channel.up"),
        (f"{THEIRS}.conv_block.cab.3.attention.1", f"{BLOCK}.channel.gate_in"),
        (f"{THEIRS}.conv_block.cab.3.attention.3", f"{BLOCK}.channel.gate_out"),
        (THEIRS, BLOCK),
        (f"{THEIR_OVERLAP}.relative_position_bias_table", f"{OVERLAP}.table"),
        (f"{THEIR_OVERLAP}.proj", f"{OVERLAP}.out"),
        (THEIR_OVERLAP, OVERLAP),
        ("layers.{i}.conv", "groups.{i}.conv"),
        ("conv_after_body", "body"),
        ("conv_before_upsample.0", "before"),
        ("upsample", "enlarge"),
        ("conv_last", "last"),
    ],
    ignore=["relative_position_index_*", "attn_mask"],
    config=config,
)
