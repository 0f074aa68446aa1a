"""TNT and PyramidTNT: github.com/huawei-noah/CV-Backbones (tnt_pytorch/tnt.py and tnt_pytorch/pyramid_tnt.py)."""

from __future__ import annotations

from typing import Any

import torch

from formarium.authors import Authors, State

_BLOCK = [
    ("inner_norm1", "words.norm1"),
    ("inner_attn.proj", "words.out"),
    ("inner_norm2", "words.norm2"),
    ("inner_mlp", "words.mlp"),
    ("inner_attn", "words"),  # after the others under `words`, for the way back
    ("proj_norm1", "fuse.norm1"),
    ("proj_norm2", "fuse.norm2"),
    ("proj", "fuse.linear"),
    ("outer_norm1", "norm1"),
    ("outer_attn.linear", "attention.shrink"),
    ("outer_attn.norm", "attention.shrink_norm"),
    ("outer_attn.proj", "attention.out"),
    ("outer_attn", "attention"),
    ("outer_norm2", "norm2"),
    ("outer_mlp", "mlp"),
    ("se_layer.fc.0", "se.norm"),
    ("se_layer.fc.1", "se.fc1"),
    ("se_layer.fc.3", "se.fc2"),
]

_WIDTHS = {"outer_dims": "dims", "inner_dims": "word_dims", "outer_heads": "heads", "inner_heads": "word_heads"}
_SHARED = {
    "depths": "depths",
    "img_size": "image_size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_path_rate": "drop_path",
    "patch_size": "patch_size",
    "inner_stride": "word_stride",
}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    theirs = {**theirs, **(theirs.get("configs") or {})}
    entry = header["reference"]["entry"].lower()
    names = {**_SHARED, **_WIDTHS}
    # one stage in TNT: its widths are plain numbers there
    for one, many in (("outer_dim", "outer_dims"), ("inner_dim", "inner_dims"), ("depth", "depths")):
        if one in theirs:
            theirs[many] = (theirs[one],)
    for side in ("outer", "inner"):
        if f"{side}_num_heads" in theirs:
            theirs[f"{side}_heads"] = (theirs[f"{side}_num_heads"],)
    pyramid = "pyramid" in entry or "ptnt" in entry
    return {"pyramid": pyramid, "se": theirs.get("se", 0) > 0, **{ours: theirs[key] for key, ours in names.items() if key in theirs}}


def fuse_projections(state: State, model: Any) -> State:
    """Their two matrices (queries and keys, values; in PyramidTNT queries, keys and values) are one of ours."""
    parts = ("q", "kv") if model.config.pyramid else ("qk", "v")
    if not model.config.pyramid:
        state = {f"stages.0.{k}" if k.startswith("blocks.") else k: v for k, v in state.items()}
    for name in model.state_dict():
        stem, dot, kind = name.rpartition(".")
        if stem.endswith(".qkv"):
            theirs = [f"{stem.removesuffix('qkv')}{part}{dot}{kind}" for part in parts]
            if all(t in state for t in theirs):
                state[name] = torch.cat([state.pop(t) for t in theirs])
    return state


def split_projections(state: State, model: Any) -> State:
    out = {}
    for name, value in state.items():
        stem, dot, kind = name.rpartition(".")
        if stem.endswith(".qkv"):
            dim = value.shape[0] // 3
            parts, sizes = (("q", "kv"), [dim, 2 * dim]) if model.config.pyramid else (("qk", "v"), [2 * dim, dim])
            for part, piece in zip(parts, value.split(sizes), strict=True):
                out[f"{stem.removesuffix('qkv')}{part}{dot}{kind}"] = piece
        else:
            out[name] = value
    return out if model.config.pyramid else {k.removeprefix("stages.0."): v for k, v in out.items()}


authors = Authors(
    names=[
        *((f"blocks.{{j}}.{theirs}", f"blocks.{{j}}.{ours}") for theirs, ours in _BLOCK),
        *((f"stages.{{i}}.blocks.{{j}}.{theirs}", f"stages.{{i}}.blocks.{{j}}.{ours}") for theirs, ours in _BLOCK),
        ("stages.{i}.relative_pos", "stages.{i}.relative"),
        ("word_merges.{i}.norm", "stages.{i+1}.merge_words.norm"),
        ("word_merges.{i}.conv.0", "stages.{i+1}.merge_words.conv"),
        ("sentence_merges.{i}.norm", "stages.{i+1}.merge_sentences.norm"),
        ("sentence_merges.{i}.conv.0", "stages.{i+1}.merge_sentences.conv"),
        ("patch_embed.proj", "tokeniser.conv"),
        ("patch_embed.common_conv", "tokeniser.common"),
        ("patch_embed.inner_convs", "tokeniser.words"),
        ("patch_embed.outer_convs", "tokeniser.sentences"),
        ("proj_norm1", "tokeniser.fuse.norm1"),
        ("proj_norm2", "tokeniser.fuse.norm2"),
        ("proj", "tokeniser.fuse.linear"),
        ("cls_token", "tokeniser.cls_token"),
        ("outer_tokens", "tokeniser.unused"),
        ("outer_pos", "tokeniser.positions"),
        ("inner_pos", "tokeniser.word_positions"),
    ],
    config=config,
    to_ours=fuse_projections,
    to_theirs=split_projections,
)
