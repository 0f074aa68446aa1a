"""ViDT: github.com/naver-ai/vidt (methods/vidt/detector.py)."""

from __future__ import annotations

from typing import Any

import torch

from formarium.authors import Authors, State
from formarium.errors import BadInput

BODIES = {  # width, blocks, heads, drop path of their backbones
    "swin_nano": (48, (2, 2, 6, 2), (3, 6, 12, 24), 0.0),
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24), 0.2),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24), 0.3),
    "swin_base_win7": (128, (2, 2, 18, 2), (4, 8, 16, 32), 0.3),
    "swin_large_win7": (192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3),
}
SHARED = ("class_heads", "box_heads", "iou_heads")


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    name = str(theirs.get("backbone", theirs.get("backbone_name", "swin_nano"))).removesuffix("_22k")
    if name not in BODIES:
        raise BadInput("backbone", expected=", ".join(BODIES), got=name)
    dim, depths, heads, drop_path = BODIES[name]
    return {
        "dim": dim,
        "depths": depths,
        "heads": heads,
        "drop_path": drop_path,
        "queries": theirs.get("det_token_num", 100),
        "hidden": theirs.get("pos_dim", theirs.get("reduced_dim", 256)),
        "cross_stages": tuple(theirs.get("cross_indices", (3,))),
        "decoder_layers": theirs.get("dec_layers", 6),
        "decoder_heads": theirs.get("nheads", 8),
        "decoder_hidden": theirs.get("dim_feedforward", 1024),
        "levels": theirs.get("num_feature_levels", 4),
        "points": theirs.get("dec_n_points", 4),
        "aux_loss": theirs.get("aux_loss", True),
        "refine": theirs.get("with_box_refine", True),
        "fusion": theirs.get("epff", False),
        "codes": theirs.get("with_vector", False),
        "code_hidden": theirs.get("vector_hidden_dim", 256),
        "keep": theirs.get("n_keep", 256),
        "mask_size": theirs.get("gt_mask_len", 128),
        "iou_aware": theirs.get("iou_aware", False),
        "token_label": theirs.get("token_label", False),
        "num_classes": theirs.get("num_classes", 91),
    }


def call(model: Any, inputs: dict[str, torch.Tensor], header: dict[str, Any]) -> dict[str, torch.Tensor]:
    image, padding = [*inputs.values()][:2]
    raw = model.raw(image.float(), padding.bool())
    out = {"pred_logits": raw.logits[:, -1], "pred_boxes": raw.boxes[:, -1]}
    for i in range(raw.logits.shape[1] - 1):
        out |= {f"aux{i}_logits": raw.logits[:, i], f"aux{i}_boxes": raw.boxes[:, i]}
        if raw.codes is not None:
            out[f"aux{i}_vectors"] = raw.codes[:, i]
        if raw.ious is not None:
            out[f"aux{i}_ious"] = raw.ious[:, i]
    if raw.codes is not None:
        out["pred_vectors"] = raw.codes[:, -1]
    if raw.ious is not None:
        out["pred_ious"] = raw.ious[:, -1]
    return out | {f"token{i}": t for i, t in enumerate(raw.tokens or ())}


def to_ours(state: State, model: Any) -> State:
    """One copy of the heads that their layers share."""
    out = {}
    for key, value in state.items():
        group, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        if group == "code_heads":
            if number == "0":
                out["code_head" + rest.removeprefix("0")] = value
        elif group not in SHARED or model.config.refine or number == "0":
            out[key] = value
    return out


def to_theirs(state: State, model: Any) -> State:
    """The shared heads once for every layer."""
    out, layers = {}, range(model.config.decoder_layers + 1)
    for key, value in state.items():
        group, _, rest = key.partition(".")
        if group == "code_head":
            out |= {f"code_heads.{i}.{rest}": value for i in layers}
        elif group in SHARED and not model.config.refine:
            out |= {f"{group}.{i}{rest.removeprefix('0')}": value for i in layers}
        else:
            out[key] = value
    return out


_LAYER, _OURS = "transformer.decoder.layers.{i}", "decoder.layers.{i}"
_BLOCK, _BODY = "backbone.layers.{i}.blocks.{j}", "body.stages.{i}.blocks.{j}"
_FUSE = "fusion.multi_scaler"

authors = Authors(
    names=[
        ("backbone.patch_embed.proj", "body.embed"),
        ("backbone.patch_embed.norm", "body.embed_norm"),
        ("backbone.det_token", "body.det_tokens"),
        ("backbone.det_pos_embed", "body.det_positions"),
        (f"{_BLOCK}.attn.relative_position_bias_table", f"{_BODY}.attention.bias_table"),
        (f"{_BLOCK}.attn.proj", f"{_BODY}.attention.out"),
        (f"{_BLOCK}.attn", f"{_BODY}.attention"),
        (f"{_BLOCK}.det_pos_linear", f"{_BODY}.det_position"),
        ("backbone.layers.{i}.downsample.expansion", "body.stages.{i}.merge.unused.expansion"),
        ("backbone.layers.{i}.downsample.norm2", "body.stages.{i}.merge.unused.norm2"),
        ("backbone.layers.{i}.downsample", "body.stages.{i}.merge"),
        ("backbone.layers", "body.stages"),
        *((f"backbone.norm{i + 1}", f"body.unused_norms.{i}") for i in range(3)),
        ("transformer.level_embed", "level_embedding"),
        ("transformer.reference_points", "decoder.reference"),
        ("transformer.enc_output", "token_project.0"),
        ("transformer.enc_output_norm", "token_project.1"),
        ("transformer.token_embed", "token_head"),
        (f"{_LAYER}.self_attn.in_proj_weight", f"{_OURS}.self_attention.qkv.weight"),
        (f"{_LAYER}.self_attn.in_proj_bias", f"{_OURS}.self_attention.qkv.bias"),
        (f"{_LAYER}.self_attn.out_proj", f"{_OURS}.self_attention.out"),
        (f"{_LAYER}.norm2", f"{_OURS}.self_norm"),
        (f"{_LAYER}.cross_attn.sampling_offsets", f"{_OURS}.cross_attention.offsets"),
        (f"{_LAYER}.cross_attn.attention_weights", f"{_OURS}.cross_attention.weights"),
        (f"{_LAYER}.cross_attn.value_proj", f"{_OURS}.cross_attention.value"),
        (f"{_LAYER}.cross_attn.output_proj", f"{_OURS}.cross_attention.out"),
        (f"{_LAYER}.norm1", f"{_OURS}.cross_norm"),
        (f"{_LAYER}.linear1", f"{_OURS}.fc1"),
        (f"{_LAYER}.linear2", f"{_OURS}.fc2"),
        (f"{_LAYER}.norm3", f"{_OURS}.norm"),
        *((f"{_FUSE}.layer_{i}_rn", f"fusion.project.{i}.0") for i in range(4)),
        *((f"{_FUSE}.p_norm_{i}", f"fusion.project.{i}.1") for i in range(4)),
        *((f"{_FUSE}.refinenet_{i}.smoothing", f"fusion.smooth.{i}") for i in range(4)),
        *((f"{_FUSE}.refinenet_{i}.resConfUnit1", f"fusion.before.{i}") for i in range(4)),
        *((f"{_FUSE}.refinenet_{i}.resConfUnit2", f"fusion.after.{i}") for i in range(4)),
        ("input_proj", "project"),
        ("tgt_proj", "det_project"),
        ("query_pos_proj", "position_project"),
        ("class_embed", "class_heads"),
        ("bbox_embed", "box_heads"),
        ("vector_embed", "code_heads"),
        ("iou_embed", "iou_heads"),
    ],
    config=config,
    call=call,
    ignore=["*relative_position_index", "transformer.decoder.bbox_embed.*"],
    to_ours=to_ours,
    to_theirs=to_theirs,
)
