"""MossFormer: github.com/modelscope/modelscope (modelscope/models/audio/separation/mossformer.py).

The released weights lie in three files, encoder.bin, decoder.bin and masknet.bin; put together with their folder's name in front
("encoder.", "decoder.", "mask_net.") they are this state dict.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formarium.authors import Authors, State
from formarium.errors import BadInput

_NORMS = ("norm_in.weight", "norm_in.bias", "norm_out.weight", "norm_out.bias")


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    dim = theirs["d_model"]
    if not theirs["in_channels"] == theirs["out_channels"] == dim:
        raise BadInput(
            "in_channels, out_channels, d_model", expected="one size", got=str((theirs["in_channels"], theirs["out_channels"], dim))
        )
    kind = theirs.get("norm", "ln")
    return {
        "dim": dim,
        "blocks": theirs["num_blocks"],
        "speakers": theirs["num_spks"],
        "kernel": theirs["kernel_size"],
        "stride": theirs["stride"],
        "group": theirs["group_size"],
        "qk_dim": theirs["query_key_dim"],
        "expansion": theirs["expansion_factor"],
        "dropout": theirs["attn_dropout"],
        "causal": theirs["causal"],
        "norm": kind if kind in ("ln", "gln", "cln") else "bn",
        "decoder_bias": theirs["bias"],
    }


def to_ours(state: State, model: Any) -> State:
    return {k: v.flatten() if k in _NORMS and v.ndim == 2 else v for k, v in state.items()}


def to_theirs(state: State, model: Any) -> State:
    column = model.config.norm == "gln"  # theirs keeps one column there
    return {k: v[:, None].contiguous() if column and k in _NORMS else v for k, v in state.items()}


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Tensor:
    return model(next(iter(inputs.values())))


_LAYER = "mask_net.mdl.att_mdl.mossformerM.layers.{i}"
_PROJECTION = (("mdl.0.g", "norm.weight"), ("mdl.1", "linear"), ("mdl.3.sequential.1.conv", "conv"))
authors = Authors(
    names=[
        ("encoder.conv1d", "encoder"),
        ("mask_net.norm", "norm_in"),
        ("mask_net.conv1d_encoder", "project"),
        ("mask_net.pos_enc.scale", "position_scale"),
        *(
            (f"{_LAYER}.{theirs}.{a}", f"blocks.{{i}}.{ours}.{b}")
            for theirs, ours in (("to_hidden", "hidden"), ("to_qk", "qk"), ("to_out", "out"))
            for a, b in _PROJECTION
        ),
        (f"{_LAYER}.qk_offset_scale.gamma", "blocks.{i}.gamma"),
        (f"{_LAYER}.qk_offset_scale.beta", "blocks.{i}.beta"),
        ("mask_net.mdl.att_mdl.norm.norm", "norm_blocks"),
        ("mask_net.mdl.att_norm", "norm_out"),
        ("mask_net.conv1d_out", "split"),
        ("mask_net.conv1_decoder", "mask"),
        ("mask_net.prelu", "prelu"),
        ("mask_net.output.0", "value"),
        ("mask_net.output_gate.0", "gate"),
    ],
    config=config,
    call=call,
    ignore=("*.inv_freq", "*.rotary_pos_emb.freqs"),
    to_ours=to_ours,
    to_theirs=to_theirs,
)
