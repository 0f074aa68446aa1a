"""PosFormer: github.com/SJTU-DeepVisionLab/PosFormer (Pos_Former/model/posformer.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors
from formarium.models.text.posformer import Output, forest_loss, identifiers, levels_and_places
from formarium.tasks.formula_recognition.latex import CROHME

CROHME_IDS = {w: CROHME.index(w) + 3 for w in ("^", "_", "{", "}", "[", "]", r"\frac", r"\sqrt")}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    own = {
        "dim": theirs["d_model"],
        "growth": theirs["growth_rate"],
        "dense_layers": theirs["num_layers"],
        "heads": theirs["nhead"],
        "layers": theirs["num_decoder_layers"],
        "feed_forward": theirs["dim_feedforward"],
        "dropout": theirs["dropout"],
        "coverage_dim": theirs["dc"],
        "cross_coverage": theirs["cross_coverage"],
        "self_coverage": theirs["self_coverage"],
    }
    search = {
        "beam_size": "beams",
        "max_len": "max_len",
        "alpha": "alpha",
        "early_stopping": "early_stopping",
        "temperature": "temperature",
    }
    return own | {ours: theirs[key] for key, ours in search.items() if key in theirs}


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    if "tgt" not in inputs:  # beam search
        ids, scores = model.search(inputs["img"], inputs["img_mask"])
        sequences = {f"seq_{i}": torch.tensor(row, dtype=torch.int64) for i, row in enumerate(ids)}
        return sequences | {f"score_{i}": s for i, s in enumerate(scores)}
    rows = torch.stack(inputs["tgt"].chunk(2), 1)  # their rows: all left to right, then all right to left
    out = model(inputs["img"], inputs["img_mask"], rows, identifiers(rows, model.structure))
    symbols, levels, places = (torch.cat([x[:, 0], x[:, 1]]) for x in out)
    return {"vocab_logits": symbols, "nesting_logits": levels, "position_logits": places}


def forest(header: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    own = identifiers(inputs["tgt"], CROHME_IDS)
    level, place = levels_and_places(own.roll(-1, -2))
    return {"identifiers": own, "nesting_target": level, "position_target": place}


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = Output(inputs["symbol_logits"], inputs["level_logits"], inputs["position_logits"])
    losses = forest_loss(out, inputs["symbol_targets"], inputs["level_targets"], inputs["position_targets"])
    return {
        "symbols": losses.terms["symbols"],
        "levels": losses.terms["levels"],
        "positions": losses.terms["places"],
        "total": losses.total,
    }


def _decoder(theirs: str, ours: str) -> list[tuple[str, str]]:
    layer, block = f"{theirs}.model.layers.{{i}}", f"{ours}.blocks.{{i}}"
    attentions = [("self_attn", "self_attention"), ("multihead_attn", "cross_attention")]
    return [
        *[(f"{layer}.{a}.in_proj_{kind}", f"{block}.{b}.qkv.{kind}") for a, b in attentions for kind in ("weight", "bias")],
        *[(f"{layer}.{a}.out_proj", f"{block}.{b}.out") for a, b in attentions],
        (layer, block),
        (f"{theirs}.model.arm.post_norm.bn", f"{ours}.correction.norm"),
        (f"{theirs}.model.arm", f"{ours}.correction"),
        (f"{theirs}.norm", f"{ours}.norm"),
    ]


def out_of_lightning(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The trainer's checkpoints have it all under "model."."""
    return {authors.rename(k.removeprefix("model.")) if k.startswith("model.") else k: v for k, v in state.items()}


authors = Authors(
    names=[
        ("encoder.model.conv1", "encoder.stem"),
        ("encoder.model.norm1", "encoder.stem_norm"),
        *[(f"encoder.model.dense{s + 1}.{{i}}.bn{n}", f"encoder.blocks.{s}.{{i}}.norm{n}") for s in range(3) for n in (1, 2)],
        *[(f"encoder.model.dense{s + 1}.{{i}}", f"encoder.blocks.{s}.{{i}}") for s in range(3)],
        *[(f"encoder.model.trans{s + 1}.bn1", f"encoder.transitions.{s}.norm") for s in range(2)],
        *[(f"encoder.model.trans{s + 1}.conv1", f"encoder.transitions.{s}.conv") for s in range(2)],
        ("encoder.model.post_norm", "encoder.norm"),
        ("encoder.feature_proj", "project"),
        ("encoder.norm", "norm"),
        ("decoder.word_embed", "decoder.embed"),
        ("decoder.proj", "head"),
        ("posdecoder.pos_embed", "position_decoder.embed"),
        ("posdecoder.layernum_proj", "level_head"),
        ("posdecoder.pos_proj", "place_head"),
        *_decoder("decoder", "decoder"),
        *_decoder("posdecoder", "position_decoder"),
    ],
    ignore=("*.pos_enc.pe",),
    to_ours=out_of_lightning,
    config=config,
    call=call,
    parts={"posformer_forest*": forest, "posformer_loss*": loss},
)
