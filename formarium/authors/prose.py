"""PROSE: github.com/felix-lyx/prose (prose_ode and prose_pde, symbolicregression/model)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors
from formarium.tasks.operator_learning.symbols import PAD, SPECIAL

State = dict[str, Tensor]


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    def positions(key: str) -> str:
        kind = theirs.get(key)
        return kind if kind in ("sinusoidal", "learnable") else ""

    dim = theirs["fusion_emb_dim"] if not theirs.get("no_text") else theirs["data_enc_emb_dim"]
    own: dict[str, Any] = {
        "vocabulary": (*SPECIAL, *(f"word{i}" for i in range(4, theirs["n_words"]))) if "n_words" in theirs else None,
        "dims": theirs["max_output_dimension"],
        "grid": theirs.get("x_grid_size") or theirs.get("x_patch_size") or theirs.get("x_num") or 0,
        "patch": theirs.get("x_patch_size") or 0,
        "dim": dim,
        "text_decoder_dim": theirs.get("text_dec_emb_dim", dim),
        "data_decoder_dim": theirs.get("data_dec_emb_dim", dim),
        "type_embeddings": theirs.get("fusion_type_embeddings", True),
        "fusion_positions": positions("fusion_positional_embeddings"),
        "split_text": theirs.get("split_fused_feature_text", True),
        "split_data": theirs.get("split_fused_feature_data", True),
        "residual_features": theirs.get("data_feature_resnet", False),
        "query_attention": theirs.get("data_decoder_attn", False),
        "shared_output": theirs.get("text_share_inout_emb", True),
        "fused_projections": theirs.get("use_library_attention", True),
        "cosine": theirs.get("norm_attention", False) and not theirs.get("use_library_attention", True),
        "text": not theirs.get("no_text", False),
        "write": not theirs.get("data_only", False),
        "solve": not theirs.get("text_only", False),
        "normalise": theirs.get("normalization", False),
        "dropout": theirs.get("dropout", 0.0),
        "attention_dropout": theirs.get("attention_dropout", 0.0),
    }
    for short, long in [
        ("text_enc", "text_encoder"),
        ("text_dec", "text_decoder"),
        ("data_enc", "data_encoder"),
        ("data_dec", "data_decoder"),
    ]:
        own[f"{long}_positions"] = positions(f"{short}_positional_embeddings")
    for short in ("text_enc", "text_dec", "data_enc", "data_dec", "fusion"):
        long = short.replace("enc", "encoder").replace("dec", "decoder")
        for what in ("layers", "heads"):
            if f"n_{short}_{what}" in theirs:
                own[f"{long}_{what}"] = theirs[f"n_{short}_{what}"]
        own[f"{long}_hidden"] = theirs.get(f"n_{short}_hidden_layers", 1)
    return {k: v for k, v in own.items() if v is not None}


def call(model: Any, inputs: State, header: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors are length first, with lengths."""

    def words(ids: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(ids.shape[0])[:, None] < lengths
        return ids.masked_fill(~there, PAD).T

    data = inputs["data"].transpose(0, 1)
    observed = torch.arange(data.shape[1]) < inputs["data_len"][:, None]
    b = len(data)
    skeleton = words(inputs["text"], inputs["text_len"]) if "text" in inputs else torch.full((b, 1), PAD)
    equation = words(inputs["target"], inputs["target_len"]) if "target" in inputs else torch.full((b, 1), PAD)
    query = inputs["query_times"]
    out = [*model(data, observed, skeleton, query.reshape(1, -1).expand(b, -1), equation)]
    normalised = data if model.normaliser is None else model.normaliser(data)[0]
    found = {"fused": model.fuse(normalised, observed, skeleton).transpose(0, 1)}
    if model.config.solve:
        found["data"] = out.pop(0).transpose(0, 1)
    if out:
        found["logits"] = out.pop(0).transpose(0, 1)
    return found


# names --------------------------------------------------------------------------------------------------------------

_OURS = [
    ("data_decoder.query_embedder", "query"),
    ("data_decoder.proj", "head"),
    ("data_decoder.data_embedder", "data_residual"),
    ("data_decoder.text_embedder", "text_residual"),
    ("text_decoder.proj.weight", "text_decoder.output_weight"),
    ("text_decoder.proj.bias", "text_decoder.output_bias"),
    ("fusion.type_embeddings.weight", "fusion_types"),
    ("fusion.position_embeddings_data.weight", "fusion_data_positions.table"),
    ("fusion.position_embeddings_text.weight", "fusion_text_positions.table"),
    ("normalizer.gamma", "normaliser.gain"),
    ("normalizer.beta", "normaliser.bias"),
]
_STACKS = ("text_encoder", "text_decoder", "data_encoder", "data_decoder", "fusion")
_IN_STACK = [
    ("embeddings", "embed"),
    ("layer_norm_emb", "norm"),
    ("position_embeddings.weight", "positions.table"),
    ("attentions.{i}.attn", "blocks.{i}.attentions.0"),
    ("attentions.{i}", "blocks.{i}.attentions.0"),
    ("encoder_attn.{i}.attn", "blocks.{i}.attentions.1"),
    ("encoder_attn.{i}", "blocks.{i}.attentions.1"),
    ("layer_norm1.{i}", "blocks.{i}.attention_norms.0"),
    ("layer_norm15.{i}", "blocks.{i}.attention_norms.1"),
    ("layer_norm2.{i}", "blocks.{i}.norm"),
    ("ffns.{i}.midlin", "blocks.{i}.ffn.mid"),
    ("ffns.{i}", "blocks.{i}.ffn"),
]


def to_ours(state: State, model: Any) -> State:
    """Projections as we fuse them; tables of sines and a shared output layer left out."""
    own, out = model.state_dict(), {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        where, _, leaf = name.partition(".attentions.")
        if leaf and (m := re.match(r"(\d)\.(.+)$", leaf)):
            parts.setdefault(f"{where}.attentions.{m[1]}", {})[m[2]] = value
        elif name not in own and (name.endswith("ositions.table") or name == "text_decoder.output_weight"):
            continue
        else:
            out[name] = value
    for at, theirs in parts.items():
        for kind in ("weight", "bias"):
            if f"in_proj_{kind}" in theirs:
                q, k, v = theirs.pop(f"in_proj_{kind}").chunk(3)
            elif f"q_lin.{kind}" in theirs:
                q, k, v = (theirs.pop(f"{p}_lin.{kind}") for p in "qkv")
            else:
                continue
            if f"{at}.qkv.{kind}" in own:
                out[f"{at}.qkv.{kind}"] = torch.cat([q, k, v])
            else:
                out[f"{at}.q.{kind}"], out[f"{at}.kv.{kind}"] = q, torch.cat([k, v])
        rest = {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias", "out_lin.weight": "out.weight", "out_lin.bias": "out.bias"}
        rest["attention_scale"] = "scale"
        out |= {f"{at}.{rest.get(leaf, leaf)}": value for leaf, value in theirs.items()}
    return out


def to_theirs(state: State, model: Any) -> State:
    """Attention under their names: one projection for q, k and v, or three; the shared output layer under both names."""
    library, out = model.config.fused_projections, {}
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in state.items():
        m = re.match(r"(\w+)\.blocks\.(\d+)\.attentions\.(\d)\.(.+?)(?:\.(weight|bias))?$", name)
        if not m:
            out[name] = value
            continue
        at = f"{m[1]}.{('attentions', 'encoder_attn')[int(m[3])]}.{m[2]}" + ".attn" * library
        if m[4] == "out":
            out[f"{at}.{'out_proj' if library else 'out_lin'}.{m[5]}"] = value
        elif m[4] == "scale":
            out[f"{at}.attention_scale"] = value
        else:
            grouped.setdefault((at, m[5]), {})[m[4]] = value
    for (at, kind), found in grouped.items():
        q, k, v = found["qkv"].chunk(3) if "qkv" in found else (found["q"], *found["kv"].chunk(2))
        if library:
            out[f"{at}.in_proj_{kind}"] = torch.cat([q, k, v])
        else:
            out |= {f"{at}.{p}_lin.{kind}": x for p, x in zip("qkv", (q, k, v), strict=True)}
    if "text_decoder.embed.weight" in out and "text_decoder.output_weight" not in out:
        out["text_decoder.output_weight"] = out["text_decoder.embed.weight"]
    return out


authors = Authors(
    names=[*_OURS, *((f"{s}.{a}", f"{s}.{b}") for s in _STACKS for a, b in _IN_STACK)],
    config=config,
    call=call,
    to_ours=to_ours,
    to_theirs=to_theirs,
)
