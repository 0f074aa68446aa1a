"""CrossViT: github.com/IBM/CrossViT (models/crossvit.py)."""

from __future__ import annotations

from typing import Any

from formarium.authors import Authors


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    size, patches = theirs.get("img_size", 224), theirs.get("patch_size", (8, 16))
    return {
        "image_sizes": size if isinstance(size, (list, tuple)) else (size,) * len(patches),
        "patch_sizes": patches,
        "dims": theirs.get("embed_dim", (192, 384)),
        "depths": theirs.get("depth", ((1, 3, 1),) * 3),
        "heads": theirs.get("num_heads", (6, 12)),
        "mlp_ratios": theirs.get("mlp_ratio", (2, 2, 4))[: len(patches)],  # the last is never read
        "multi_conv": theirs.get("multi_conv", False),
        "qkv_bias": theirs.get("qkv_bias", False),
        "qk_scale": theirs.get("qk_scale"),
        "norm_eps": theirs.get("norm_eps", 1e-5),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "drop_path": theirs.get("drop_path_rate", 0.0),
    }


_CROSS = "blocks.{k}.cross.{i}.{j}"
authors = Authors(
    names=[
        ("patch_embed.{i}.proj", "branches.{i}.embed"),
        ("pos_embed.{i}", "branches.{i}.positions"),
        ("cls_token.{i}", "branches.{i}.cls_token"),
        ("blocks.{k}.blocks.{i}.{j}.attn.proj", "blocks.{k}.branches.{i}.{j}.attention.out"),
        ("blocks.{k}.blocks.{i}.{j}.attn", "blocks.{k}.branches.{i}.{j}.attention"),
        ("blocks.{k}.blocks", "blocks.{k}.branches"),
        ("blocks.{k}.projs", "blocks.{k}.to_other"),
        ("blocks.{k}.revert_projs", "blocks.{k}.back"),
        # several crossings are numbered, a single one is not
        *(
            (f"blocks.{{k}}.fusion.{{i}}.{{j}}.{t}", f"{_CROSS}.{o}")
            for t, o in [
                ("norm1", "norm"),
                ("attn.wq", "attention.q"),
                ("attn.wk", "attention.k"),
                ("attn.wv", "attention.v"),
                ("attn.proj", "attention.out"),
            ]
        ),
        ("norm.{i}", "norms.{i}"),
        ("head.{i}", "heads.{i}"),
    ],
    config=config,
    to_ours=lambda state, model: {_numbered(k): v for k, v in state.items()},
    to_theirs=lambda state, model: {_unnumbered(k, model.config.depths): v for k, v in state.items()},
)


def _numbered(name: str) -> str:
    """blocks.K.fusion.I.norm1.* (one crossing, unnumbered) under the name of crossing 0."""
    parts = name.split(".")
    if parts[0] == "blocks" and len(parts) > 4 and parts[2] == "fusion":
        return authors.rename(".".join([*parts[:4], "0", *parts[4:]]))
    return name


def _unnumbered(name: str, depths: tuple[tuple[int, ...], ...]) -> str:
    """The way back: crossing 0 of a block whose depth says 0."""
    parts = name.split(".")
    if parts[0] == "blocks" and parts[2] == "cross" and depths[int(parts[1])][-1] == 0:
        theirs = authors.rename(name, forward=False).split(".")
        return ".".join([*theirs[:4], *theirs[5:]])
    return name
