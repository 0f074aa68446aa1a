"""PROSE-FD: github.com/felix-lyx/prose (prose_fd, models)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors
from formarium.tasks.operator_learning.symbols import PAD, SPECIAL

State = dict[str, Tensor]


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of their model's settings, with x_num, max_output_dimension and n_words beside them."""
    symbols = theirs.get("symbol_encoder")
    own: dict[str, Any] = {
        "dims": theirs["max_output_dimension"],
        "grid": theirs["x_num"] ** 2,
        "patches": theirs["patch_num"],
        "patches_out": theirs["patch_num_output"],
        "dim": theirs["dim_emb"],
        "hidden": theirs["dim_ffn"],
        "heads": theirs["n_head"],
        "data_encoder_layers": theirs["data_encoder"]["n_layer"],
        "decoder_layers": theirs["data_decoder"]["n_layer"],
        "conv_dim": theirs["embedder"]["conv_dim"],
        "text": symbols is not None,
        "continuous": theirs["time_embed"] == "continuous",
        "carry_last": bool(theirs.get("carry_last_frame", 0)),
        "dropout": theirs["dropout"],
    }
    if symbols is not None:
        own |= {"text_encoder_layers": symbols["n_layer"], "fusion_layers": theirs["fusion"]["n_layer"]}
        if "n_words" in theirs:
            own["vocabulary"] = (*SPECIAL, *(f"word{i}" for i in range(4, theirs["n_words"])))
    return own


def call(model: Any, inputs: State, header: dict[str, Any]) -> Tensor:
    """Times of what is asked for count from the last frame given; padded words are said by a mask."""
    fields, times, later = inputs["data_input"], inputs["input_times"][..., 0], inputs["output_times"][..., 0]
    b = len(fields)
    words = inputs["symbol_input"].masked_fill(inputs["symbol_padding_mask"], PAD) if "symbol_input" in inputs else torch.full((b, 1), PAD)
    times = times.expand(b, -1)
    return model(fields, times, words, later.expand(b, -1) + times[:, -1:])


_STACKS = {"data_encoder": "data_encoder", "symbol_encoder": "text_encoder", "fusion": "fusion"}
_IN_BLOCK = [
    ("self_attn.out_proj", "attention.out"),
    ("self_attn", "attention"),
    ("multihead_attn.out_proj", "attention.out"),
    ("multihead_attn", "attention"),
    ("norm1", "attention_norm"),
    ("norm2", "norm"),
    ("linear1", "lin1"),
    ("linear2", "lin2"),
]
_BLOCKS = [(f"{a}.transformer_encoder", b) for a, b in _STACKS.items()] + [("data_decoder.transformer_decoder", "decoder")]


def _names() -> list[tuple[str, str]]:
    names = [
        ("embedder.conv_proj", "patch"),
        ("embedder.patch_position_embeddings", "given.places"),
        ("embedder.time_embed", "given.order"),
        ("embedder.time_proj", "given.clock"),
        *((f"embedder.post_proj.{i + 1}", f"head.{i}") for i in (0, 2, 4)),
        ("symbol_encoder.word_embeddings", "embed"),
        ("fusion.type_embeddings.weight", "fusion_types"),
        ("data_decoder.patch_position_embeddings", "asked.places"),
        ("data_decoder.time_embed", "asked.order"),
        ("data_decoder.time_proj", "asked.clock"),
    ]
    for theirs, ours in _BLOCKS:
        kept = [(a, b) for a, b in _IN_BLOCK if a.startswith("self_attn") != (ours == "decoder") or "attn" not in a]
        names += [(f"{theirs}.layers.{{i}}.{a}", f"{ours}.blocks.{{i}}.{b}") for a, b in kept]
        names.append((f"{theirs}.norm", f"{ours}.norm"))
    return names


_PARTS = re.compile(r"(.+\.attention)\.linear_([qkv])\.(weight|bias)$")


def to_ours(state: State, model: Any) -> State:
    """Queries, keys and values in one projection, in the decoder queries apart."""
    out: State = {}
    parts: dict[tuple[str, str], State] = {}
    for name, value in state.items():
        if m := _PARTS.match(name):
            parts.setdefault((m[1], m[3]), {})[m[2]] = value
        else:
            out[name] = value
    for (at, kind), p in parts.items():
        if at.startswith("decoder."):
            out |= {f"{at}.q.{kind}": p["q"], f"{at}.kv.{kind}": torch.cat([p["k"], p["v"]])}
        else:
            out[f"{at}.qkv.{kind}"] = torch.cat([p["q"], p["k"], p["v"]])
    return out


def to_theirs(state: State, model: Any) -> State:
    out = {}
    for name, value in state.items():
        m = re.match(r"(.+\.attention)\.(q|kv|qkv)\.(weight|bias)$", name)
        if not m:
            out[name] = value
            continue
        out |= {f"{m[1]}.linear_{p}.{m[3]}": x for p, x in zip(m[2], value.chunk(len(m[2])), strict=True)}
    return out


authors = Authors(
    names=_names(), config=config, call=call, ignore=("symbol_encoder.positional_embedding.pe",), to_ours=to_ours, to_theirs=to_theirs
)
