"""RoITr: github.com/haoyu94/RoITr (model/RIGA_v2.py, lib/loss.py)."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State

_INNER = [
    ("embedding.proj", "embed"),
    ("in_proj", "inner"),
    *((f"transformer.attention.proj_{n}", n) for n in ("q", "k", "v", "p", "vp")),
    ("transformer.linear", "out"),
    ("transformer.norm", "norm"),
    ("out_proj", "outer"),
]
_PLACES = [
    ("backbone.enc{i+1}.0.transformer", "encoder.{i}.down"),
    ("backbone.enc{i+1}.{j+1}.transformer.transformer", "encoder.{i}.blocks.{j}.attention"),
    ("backbone.dec{i+1}.{j+1}.transformer.transformer", "decoder.{i}.blocks.{j}.attention"),
]
_LAYER = ("backbone.global_transformer.transformer.layers.{i}.", "transformer.blocks.{i}.")


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    rigid = theirs["benchmark"] in ("3DMatch", "3DLoMatch")
    factor = 1 if rigid else 2
    return {
        "planes": [factor * p for p in (64, 128, 256, 256)],
        "width": 256 * factor,
        "layers": theirs["transformer_architecture"],
        "node_matches": theirs["num_est_coarse_corr"],
        "adaptive": None if rigid else 0.75,
        "patch_points": theirs["point_per_patch"],
        "matching_radius": theirs["matching_radius"],
        "train_matches": theirs["num_gt_coarse_corr"],
        "positive_overlap": theirs["coarse_overlap_threshold"],
        "top_k": theirs["fine_matching_topk"],
        "mutual": theirs["fine_matching_mutual"],
        "confidence": theirs["fine_matching_confidence_threshold"],
        "use_node_scores": theirs["fine_matching_use_global_score"],
    }


def call(model: Any, inputs: Mapping[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for ours, theirs in (("source", "src"), ("target", "tgt")):
        batch[ours], batch[f"{ours}_normals"] = inputs[f"{theirs}_points"][None], inputs[f"{theirs}_normals"][None]
        batch[f"{ours}_count"] = torch.tensor([batch[ours].shape[1]])
    out = model.forward_batch(batch)
    (pair,) = model.pairs(batch)
    t, s, _, plan = model.match(pair)
    found = {"matching": plan.exp(), "matching_scores": plan, "src_node_corr_indices": s, "tgt_node_corr_indices": t}
    for ours, theirs in (("source", "src"), ("target", "tgt")):
        found[f"{theirs}_points"] = batch[ours][0]
        found[f"{theirs}_nodes"] = getattr(out, f"{ours}_nodes")[0]
        found[f"{theirs}_node_feats"] = getattr(out, f"{ours}_node_features")[0]
        found[f"{theirs}_point_feats"] = getattr(out, f"{ours}_features")[0]
    return found


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    from formarium.models.points.roitr import circle_loss, fine_loss

    theirs = header["reference"]["constructor"]
    names = {"positive_margin": "positive_margin", "negative_margin": "negative_margin"}
    names |= {"positive_optimum": "positive_optimal", "negative_optimum": "negative_optimal"}
    names |= {"log_scale": "log_scale", "positive_overlap": "positive_overlap"}
    c = SimpleNamespace(**{ours: theirs[f"coarse_loss_{name}"] for ours, name in names.items()})
    pairs, overlap = inputs["gt_node_corr_indices"].long(), inputs["gt_node_corr_overlaps"]
    coarse = circle_loss(inputs["tgt_node_feats"], inputs["src_node_feats"], pairs, overlap, c)
    points = inputs["tgt_node_corr_knn_points"], inputs["src_node_corr_knn_points"]
    masks = inputs["tgt_node_corr_knn_masks"].bool(), inputs["src_node_corr_knn_masks"].bool()
    fine = fine_loss(inputs["matching_scores"], *points, *masks, theirs["fine_loss_positive_radius"])
    total = theirs["coarse_loss_weight"] * coarse + theirs["fine_loss_weight"] * fine
    return {"loss": total, "c_loss": coarse, "f_loss": fine, "o_loss": 0 * fine}


authors = Authors(
    names=[
        *((f"{theirs}.{a}", f"{ours}.{b}") for theirs, ours in _PLACES for a, b in _INNER),
        ("backbone.enc{i+1}.{j+1}.bn2", "encoder.{i}.blocks.{j}.norm"),
        ("backbone.dec{i+1}.{j+1}.bn2", "decoder.{i}.blocks.{j}.norm"),
        ("backbone.dec{i+1}.0.linear1", "decoder.{i}.same"),
        ("backbone.dec{i+1}.0.linear2", "decoder.{i}.coarse"),
        ("backbone.global_transformer.embedding.proj_d", "transformer.embedding.distance"),
        ("backbone.global_transformer.embedding.proj_a", "transformer.embedding.angle"),
        ("backbone.global_transformer.in_proj", "transformer.inner"),
        ("backbone.global_transformer.out_proj", "transformer.outer"),
        *((f"{_LAYER[0]}attention.attention.proj_{n}", f"{_LAYER[1]}{n}") for n in ("q", "k", "v", "p", "vp")),
        (_LAYER[0] + "attention.linear", _LAYER[1] + "out"),
        (_LAYER[0] + "attention.norm", _LAYER[1] + "norm"),
        (_LAYER[0] + "attention.pos_linear", _LAYER[1] + "position_out"),
        (_LAYER[0] + "attention.pos_norm", _LAYER[1] + "position_norm"),
        (_LAYER[0] + "output", _LAYER[1] + "ffn"),
        (_LAYER[0] + "pos_proj", _LAYER[1] + "position_ffn"),
        ("backbone.occ_proj", "unused_overlap"),
        ("coarse_proj", "coarse_head"),
        ("fine_proj", "fine_head"),
        ("optimal_transport.alpha", "bin_score"),
        ("OT.alpha", "unused_bin_score"),
    ],
    config=config,
    call=call,
    ignore=["*.div_term"],
    parts={"roitr_loss*": loss},
)
