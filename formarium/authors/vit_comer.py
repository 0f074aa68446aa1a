"""ViT-CoMer: github.com/Traffic-X/ViT-CoMer (segmentation/ and detection/, and BEiTComer2 of its Co-DETR branch)."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from formarium.authors import Authors, Rename, State
from formarium.catalogue import make_config


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    entry = header["reference"]["entry"]
    beit = "beit" in entry.lower() or "injector" in "".join(theirs) or "use_rel_pos_bias" in theirs
    detection = entry.startswith("detection") and not beit
    depth = theirs.get("depth", 12)
    chunks = theirs["interaction_indexes"]

    def each(name: str, default: bool) -> tuple[bool, ...]:
        value = theirs.get(name, default)
        return tuple(value[: len(chunks)]) if isinstance(value, (list, tuple)) else (value,) * len(chunks)

    def per_block(name: str, default: Any) -> list[Any]:
        value = theirs.get(name, default)
        return list(value) if isinstance(value, (list, tuple)) else [value] * depth

    windowed, sizes = per_block("window_attn", False), per_block("window_size", 14)
    add = theirs.get("add_vit_feature", True)
    each_chunk = theirs.get("version", "new") == "old" if beit else not detection
    init = theirs.get("init_values", 0.0)
    return {
        "dim": theirs.get("embed_dim", 768),
        "depth": depth,
        "heads": theirs.get("num_heads", 12),
        "mlp_ratio": theirs.get("mlp_ratio", 4.0),
        "qkv_bias": theirs.get("qkv_bias", not beit),
        "layer_scale": init if beit else 1.0 if theirs.get("layer_scale", True) else None,
        "windows": tuple(size if on or beit else 0 for on, size in zip(windowed, sizes, strict=True)),
        "bottlenecks": tuple(theirs.get("residual_indices", ())),
        "beit": beit,
        "positions": theirs.get("use_abs_pos_emb", not beit),
        "chunks": tuple((c[0], c[-1]) for c in chunks),
        "to_vit": each("use_injector" if beit else "use_CTI_toV", True),
        "to_conv": each("use_extractor" if beit else "use_CTI_toC", True),
        "extracts": each("cnn_feature_interaction", not (detection or beit)),
        "extra": theirs.get("extra_num", 4) if theirs.get("use_extra_extractor" if beit else "use_extra_CTI", True) else 0,
        "conv_width": theirs.get("conv_inplane", 64),
        "points": theirs.get("n_points", 4),
        "deform_heads": theirs.get("deform_num_heads", 6),
        "deform_ratio": theirs.get("deform_ratio", 1.0),
        "conv_ffn": theirs.get("with_cffn", True),
        "ffn_ratio": theirs.get("cffn_ratio", 0.25),
        "mrfp_ratio": 0.5 if beit or detection else theirs.get("dim_ratio", 6.0),
        "spare_mrfp": not detection,
        "gamma": init,
        "vit_features": "none" if not add else "each" if each_chunk else "last",
        "image_size": theirs.get("img_size", 512 if beit else 224),
        "in_channels": theirs.get("in_chans", 3),
        "dense": True,
    }


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    last, maps = model.run(*inputs.values())
    if not model.config.beit:
        return maps
    return (last if model.config.vit_features == "last" else last.flatten(2).transpose(1, 2), *maps)


def block(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> Any:
    """One CTI block, alone: x and c in, x and c out."""
    from formarium.models.image.vit_comer import Interaction, Levels, ViTCoMer

    theirs = dict(header["reference"]["constructor"])
    detection = header["reference"]["entry"].startswith("detection")
    x, c = inputs["x"], inputs["c"]
    values = {
        "dim": theirs["dim"],
        "chunks": ((0, 0),),
        "to_vit": (theirs.get("use_CTI_toV", True),),
        "to_conv": (theirs.get("use_CTI_toC", True),),
        "extracts": (theirs.get("cnn_feature_interaction", False),),
        "extra": theirs.get("extra_num", 4) if theirs.get("extra_CTI", False) else 0,
        "points": theirs.get("n_points", 4),
        "deform_heads": theirs.get("num_heads", 6),
        "deform_ratio": theirs.get("deform_ratio", 1.0),
        "conv_ffn": theirs.get("with_cffn", True),
        "ffn_ratio": theirs.get("cffn_ratio", 0.25),
        "mrfp_ratio": 0.5 if detection else theirs.get("dim_ratio", 6.0),
        "spare_mrfp": not detection,
        "gamma": theirs.get("init_values", 0.0),
        "vit_features": "last",
    }
    part = Interaction(make_config(ViTCoMer.Config, values), 0).eval()
    renamed = {authors.rename(re.sub(r"^(block\.)?", "interactions.0.", k)).removeprefix("interactions.0."): v for k, v in state.items()}
    part.load_state_dict({**{k: v for k, v in part.state_dict().items() if k.endswith("num_batches_tracked")}, **renamed})
    return part(x, c, Levels.around(grid_of(header, x.shape[1]), x), [])


def grid_of(header: dict[str, Any], tokens: int) -> tuple[int, int]:
    """The grid that the record's note tells, or the squarest one of that many tokens with even sides."""
    said = re.search(r"H\s*=\s*(\d+)\D+W\s*=\s*(\d+)", header.get("note", ""))
    if said and int(said[1]) * int(said[2]) == tokens:
        return int(said[1]), int(said[2])
    h = max(h for h in range(2, int(tokens**0.5) + 1, 2) if tokens % h == 0 and tokens // h % 2 == 0)
    return h, tokens // h


def to_theirs(state: State, model: Any) -> State:
    """BEiTComer2 calls some modules otherwise: they are renamed here, before the rules, whose first match is the other code's."""
    if not model.config.beit:
        return state

    def renamed(name: str) -> str:
        tried = (Rename(theirs, ours).apply(name, forward=False) for theirs, ours in BEIT)
        return next((new for new in tried if new is not None), name)

    return {renamed(name): value for name, value in state.items()}


def _attention(theirs: str, ours: str) -> list[tuple[str, str]]:
    pairs = [("sampling_offsets", "offsets"), ("attention_weights", "weights"), ("value_proj", "value"), ("output_proj", "out")]
    return [(f"{theirs}.attn.{a}", f"{ours}.attention.{b}") for a, b in pairs] + [
        (f"{theirs}.feat_norm", f"{ours}.value_norm"),
        (f"{theirs}.ffn.dwconv.dwconv", f"{ours}.ffn.local"),
    ]


def _chunk(mrfp: str, to_vit: str, to_conv: str, extra: str) -> list[tuple[str, str]]:
    i = "interactions.{i}."
    rules = []
    for level in range(3):
        ours = f"{i}mrfp.levels.{level}"
        rules += [
            (f"{i}{mrfp}.dwconv.dwconv{2 * level + 1}", f"{ours}.conv3"),
            (f"{i}{mrfp}.dwconv.dwconv{2 * level + 2}", f"{ours}.conv5"),
        ]
        rules += [(f"{i}{mrfp}.dwconv.bn{level + 1}", f"{ours}.norm")]
    for theirs, ours in ((to_vit, "to_vit"), (to_conv, "to_conv"), (extra + ".{j}", "extra.{j}")):
        if ours != "to_vit":
            rules += _attention(f"{i}{theirs}.cfinter", f"{i}{ours}.extractor")
            rules += [(f"{i}{theirs}.cfinter", f"{i}{ours}.extractor")]
        rules += _attention(f"{i}{theirs}", f"{i}{ours}")
        rules += [(f"{i}{theirs}", f"{i}{ours}")]
    return [*rules, (f"{i}{mrfp}", f"{i}mrfp")]


BEIT = [
    ("blocks.{i}.gamma_1", "blocks.{i}.scale1"),
    ("blocks.{i}.gamma_2", "blocks.{i}.scale2"),
    *_chunk("multiconv", "injector", "extractor", "extra_extractors"),
]

authors = Authors(
    names=[
        ("patch_embed.proj", "embed"),
        ("pos_embed", "positions"),
        ("level_embed", "convs.level_embed"),
        *((f"spm.stem.{3 * k + j}", f"convs.stem.{k}.{name}") for k in range(3) for j, name in enumerate(("conv", "norm"))),
        *((f"spm.conv{k + 2}.{j}", f"convs.down.{k}.{name}") for k in range(3) for j, name in enumerate(("conv", "norm"))),
        ("spm.fc{k+1}", "convs.project.{k}"),
        ("blocks.{i}.gamma1", "blocks.{i}.scale1"),
        ("blocks.{i}.gamma2", "blocks.{i}.scale2"),
        *BEIT[:2],
        ("blocks.{i}.attn.relative_position_bias_table", "blocks.{i}.attention.bias_table"),
        ("blocks.{i}.attn.proj", "blocks.{i}.attention.out"),
        ("blocks.{i}.attn", "blocks.{i}.attention"),
        ("blocks.{i}.residual.conv{j+1}", "blocks.{i}.bottleneck.convs.{j}"),
        ("blocks.{i}.residual.norm{j+1}", "blocks.{i}.bottleneck.norms.{j}"),
        *_chunk("mrfp", "cti_tov", "cti_toc", "extra_CTIs"),
        *BEIT[2:],
        ("norm{i+1}", "norms.{i}"),
    ],
    config=config,
    call=call,
    ignore=("*.relative_position_index",),
    to_theirs=to_theirs,
    parts={"*block*": block},
)
