"""SMT: github.com/AFeng-x/SMT (models/smt.py; the detection and segmentation backbones)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    default = {"dims": "embed_dims", "depths": "depths", "modulation_heads": "ca_num_heads", "attention_heads": "sa_num_heads"}
    dense = not header["reference"]["entry"].startswith("models/")
    return {
        **{ours: theirs[name] for ours, name in default.items() if name in theirs},
        "modulates": tuple(bool(x) for x in theirs.get("ca_attentions", (1, 1, 1, 0))),
        "mlp_ratios": theirs.get("mlp_ratios", (4, 4, 4, 4) if dense else (8, 6, 4, 2)),
        "expand": theirs.get("expand_ratio", 2),
        "stem_kernel": theirs.get("head_conv", 3),
        "qkv_bias": theirs.get("qkv_bias", False),
        "layer_scale": theirs.get("layerscale_value", 1e-4) if theirs.get("use_layerscale") else None,
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "dense": dense,
    }


_BLOCK = "stages.{i}.blocks.{j}"
authors = Authors(
    names=[
        ("patch_embed{i+1}.conv", "stages.{i}.embed"),
        ("patch_embed{i+1}.proj", "stages.{i}.embed"),
        ("patch_embed{i+1}.norm", "stages.{i}.embed_norm"),
        *(
            (f"block{{i+1}}.{{j}}.attn.{theirs}", f"{_BLOCK}.mixer.{ours}")
            for theirs, ours in [
                ("local_conv_{k+1}", "mixed.{k}"),
                ("proj0", "gather"),
                ("bn", "norm"),
                ("proj1", "reduce"),
                ("local_conv", "local"),
                ("dw_conv", "local"),
                ("proj", "out"),
            ]
        ),
        ("block{i+1}.{j}.attn", f"{_BLOCK}.mixer"),
        ("block{i+1}.{j}.mlp.dwconv.dwconv", f"{_BLOCK}.mlp.local"),
        ("block{i+1}.{j}.gamma_1", f"{_BLOCK}.scale1"),
        ("block{i+1}.{j}.gamma_2", f"{_BLOCK}.scale2"),
        ("block{i+1}", "stages.{i}.blocks"),
        ("norm{i+1}", "stages.{i}.norm"),
    ],
    config=config,
)
