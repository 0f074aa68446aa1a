"""DSVT: github.com/Haiyang-W/DSVT (pcdet/models/backbones_3d/dsvt.py and the detector around it)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from formarium.authors import Authors, State
from formarium.model import Model
from formarium.nn.query_head import QueryHead

HEAD = "dense_head."
PREFIX = "backbone_3d."  # of the backbone in a whole detector's checkpoint; a record of the backbone alone goes without


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    first = theirs["INPUT_LAYER"]
    return {
        "num_classes": 0,
        "space": first["sparse_shape"],
        "windows": first["window_shape"],
        "hybrid_factor": first["hybrid_factor"],
        "shifts": first["shifts_list"],
        "normalise_positions": first["normalize_pos"],
        "pool_strides": first["downsample_stride"],
        "set_sizes": [tau for tau, _ in first["set_info"]],
        "depths": [blocks for _, blocks in theirs["set_info"]],
        "dims": theirs["d_model"],
        "heads": theirs["nhead"],
        "hidden": theirs["dim_feedforward"],
        "dropout": theirs["dropout"],
        "activation": theirs["activation"],
        "pool": theirs.get("reduction_type", "attention"),
    }


def call(model: Any, inputs: Mapping[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    at = inputs["voxel_coords"].long()
    features, coordinates = model.backbone(inputs["voxel_features"], at, int(at[:, 0].max()) + 1)
    return {"voxel_features": features, "pillar_features": features, "voxel_coords": coordinates}


def query_head(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """TransFusion's head alone, on a map [b, c, h, w]."""
    c = header["reference"]["constructor"]
    theirs = c["model_cfg"]
    head = QueryHead(
        c["input_channels"], c["num_class"], theirs["NUM_PROPOSALS"], theirs["HIDDEN_CHANNEL"], theirs["NUM_HEADS"],
        theirs["FFN_CHANNEL"], peak=theirs["NMS_KERNEL_SIZE"], point_classes=(8, 9),
    ).eval()  # fmt: skip
    counters = {k: v for k, v in head.state_dict().items() if k.endswith("num_batches_tracked")}
    head.load_state_dict({**counters, **{authors.rename(HEAD + k).removeprefix("head."): v for k, v in state.items()}})
    return dict(head(inputs["features"])._asdict())


class DSVTAuthors(Authors):
    """The backbone alone has the same names as in a detector, without the prefix."""

    def import_state(self, state: Mapping[str, Tensor], model: Model) -> State:
        if not any(k.startswith(PREFIX) for k in state):
            state = {PREFIX + k: v for k, v in state.items()}
        return super().import_state(state, model)

    def export_state(self, model: Model) -> State:
        state = super().export_state(model)
        return state if model.config.num_classes else {k.removeprefix(PREFIX): v for k, v in state.items()}


_LAYER = (PREFIX + "stage_{s}.{b}.encoder_list.{i}", "backbone.stages.{s}.blocks.{b}.layers.{i}")
_INNER = [
    ("win_attn.self_attn.in_proj_weight", "attention.qkv.weight"),
    ("win_attn.self_attn.in_proj_bias", "attention.qkv.bias"),
    ("win_attn.self_attn.out_proj", "attention.out"),
    ("win_attn.linear1", "up"),
    ("win_attn.linear2", "down"),
    ("win_attn.norm1", "norm1"),
    ("win_attn.norm2", "norm2"),
    ("norm", "norm"),
]
_HEADS = [
    ("hm", "heatmap"),
    ("center", "offset"),
    ("center_z", "height"),
    ("dim", "size"),
    ("rot", "turn"),
    ("iou", "iou"),
    ("vel", "speed"),
]
_QUERY_HEAD = [
    ("heatmap_head.0.conv", "heatmap.0"),
    ("heatmap_head.0.bn", "heatmap.1"),
    ("heatmap_head.1", "heatmap.3"),
    ("class_encoding", "class_embedding"),
    ("decoder.self_attn.in_proj_weight", "decoder.own.qkv.weight"),
    ("decoder.self_attn.in_proj_bias", "decoder.own.qkv.bias"),
    ("decoder.self_attn.out_proj", "decoder.own.out"),
    ("decoder.multihead_attn.in_proj_weight", "decoder.cross.qkv.weight"),
    ("decoder.multihead_attn.in_proj_bias", "decoder.cross.qkv.bias"),
    ("decoder.multihead_attn.out_proj", "decoder.cross.out"),
    ("decoder.linear1", "decoder.up"),
    ("decoder.linear2", "decoder.down"),
    ("decoder.norm{i}", "decoder.norm{i}"),
    ("decoder.self_posembed.position_embedding_head", "decoder.query_position.net"),
    ("decoder.cross_posembed.position_embedding_head", "decoder.key_position.net"),
]
_BRANCHES = [
    ("center", "center"),
    ("height", "height"),
    ("dim", "size"),
    ("rot", "turn"),
    ("vel", "speed"),
    ("iou", "iou"),
    ("heatmap", "heatmap"),
]

authors = DSVTAuthors(
    names=[
        *((f"{_LAYER[0]}.{a}", f"{_LAYER[1]}.{b}") for a, b in _INNER),
        (PREFIX + "residual_norm_stage_{s}.{b}", "backbone.stages.{s}.blocks.{b}.norm"),
        (PREFIX + "input_layer.posembed_layers.{s}.{b}.{i}.position_embedding_head", "backbone.stages.{s}.positions.{b}.{i}.net"),
        (PREFIX + "stage_{s}_reduction.self_attn.in_proj_weight", "backbone.pools.{s}.qkv.weight"),
        (PREFIX + "stage_{s}_reduction.self_attn.in_proj_bias", "backbone.pools.{s}.qkv.bias"),
        (PREFIX + "stage_{s}_reduction.self_attn.out_proj", "backbone.pools.{s}.out"),
        (PREFIX + "stage_{s}_reduction.pos_embedding", "backbone.pools.{s}.slots"),
        (PREFIX + "stage_{s}_reduction.linear1", "backbone.pools.{s}.linear"),
        (PREFIX + "stage_{s}_reduction.norm", "backbone.pools.{s}.norm"),
        ("vfe.pfn_layers.{i}", "vfe.layers.{i}"),
        ("backbone_2d.blocks.{i}.{j}.bn1", "bev.blocks.{i}.{j}.norm1"),
        ("backbone_2d.blocks.{i}.{j}.bn2", "bev.blocks.{i}.{j}.norm2"),
        ("backbone_2d.blocks.{i}.{j}.downsample_layer", "bev.blocks.{i}.{j}.shortcut"),
        ("backbone_2d", "bev"),
        ("dense_head.shared_conv", "head.shared"),
        *(("dense_head." + a, "head." + b) for a, b in _QUERY_HEAD),
        *((f"dense_head.prediction_head.{a}.0.0", f"head.branches.{b}.0") for a, b in _BRANCHES),
        *((f"dense_head.prediction_head.{a}.0.1", f"head.branches.{b}.1") for a, b in _BRANCHES),
        *((f"dense_head.prediction_head.{a}.1", f"head.branches.{b}.3") for a, b in _BRANCHES),
        *(("dense_head.heads_list.{i}." + a, "head.heads.{i}." + b) for a, b in _HEADS),
    ],
    config=config,
    call=call,
    ignore=["global_step"],
    parts={"dsvt_query_head*": query_head},
)
