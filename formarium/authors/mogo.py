"""Mogo: github.com/MiRECoFu/Mogo (models/vq/model.py, models/transformers/transformotion.py), whose two stages are two checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    if "RVQVAE" in header["reference"]["entry"]:
        return {
            "part": "tokeniser",
            "motion_dim": theirs.get("input_width", 263),
            "codes": theirs.get("nb_code", 1024),
            "code_dim": theirs.get("code_dim", 512),
            "down": theirs.get("down_t", 1),
            "stride": theirs.get("stride_t", 1),
            "width": theirs.get("width", 512),
            "conv_depth": theirs.get("depth", 3),
            "dilation_growth": theirs.get("dilation_growth_rate", 3),
            "activation": theirs.get("activation", "relu"),
            "norm": theirs.get("norm") or "",
            "quantisers": theirs.get("num_quantizers", 6),
            "shared_codebook": theirs.get("shared_codebook", False),
        }
    dim, levels = theirs.get("decoder_xl_dim", 1024), theirs.get("num_quantizers", 6)
    return {
        "part": "transformer",
        "dim": dim,
        "layers": tuple(theirs.get("layer_list", (18, 10, 6, 4, 2, 2)))[:levels],
        "heads": theirs.get("num_heads", 16),
        "inner": theirs.get("d_inner", 4 * dim),
        "codes": theirs.get("num_tokens", 512),
        "quantisers": levels,
        "text_dim": theirs.get("clip_dim", 512),
        "pre_norm": theirs.get("pre_lnorm", False),
    }


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    if model.config.part == "transformer":
        return model(inputs["text_feature"], inputs["motion_ids"].long())
    motion = inputs["motion"]
    codes = model.tokeniser.codes(motion)
    return {
        "codes": codes,
        "recon_from_codes": model.tokeniser.decode(model.tokeniser.quantiser.lookup(codes)),
        "forward": model(motion),
    }


def to_ours(state: State, model: Any) -> State:
    """The convolutions around the stages by name, and what their checkpoints leave out: feature statistics, and the running sums behind
    each codebook (as just after it was filled)."""
    state = {"mean": model.mean, "std": model.std, **_moved(state, _around(model))}
    for name in [k for k in state if k.endswith(".codebook")]:
        stem, book = name.removesuffix("codebook"), state[name]
        state[f"{stem}total"] = book.clone()
        state[f"{stem}count"] = torch.full((len(book),), float(bool(book.any())), dtype=book.dtype, device=book.device)
    return state


def to_theirs(state: State, model: Any) -> State:
    ours = ("mean", "std", "total", "count")
    kept = {k: v for k, v in state.items() if k.rsplit(".", 1)[-1] not in ours}
    return _moved(kept, {b: a for a, b in _around(model).items()})


def _around(model: Any) -> dict[str, str]:
    """Their names of the first and last convolutions -> ours."""
    down = model.config.down
    return {
        "encoder.model.0": "tokeniser.embed",
        f"encoder.model.{2 + down}": "tokeniser.to_code",
        "decoder.model.0": "tokeniser.from_code",
        f"decoder.model.{2 + down}": "tokeniser.last",
        f"decoder.model.{4 + down}": "tokeniser.out",
    }


def _moved(state: State, names: dict[str, str]) -> State:
    return {
        f"{names[stem]}.{leaf}" if (stem := k.rpartition(".")[0]) in names else k: v
        for k, v in state.items()
        for leaf in [k.rpartition(".")[2]]
    }


_RESIDUAL = (("conv1", "conv1"), ("conv2", "conv2"), ("norm1", "norm1.norm"), ("norm2", "norm2.norm"))
_XL, _BLOCK = "xls.{i}", "xls.{i}.layers.{j}"

authors = Authors(
    names=[
        # the tokeniser; which place in the sequences is the last convolution depends on how many stages there are (see to_ours)
        ("encoder.model.{i+2}.0", "tokeniser.downs.{i}.0"),
        *[(f"encoder.model.{{i+2}}.1.model.{{j}}.{a}", f"tokeniser.downs.{{i}}.1.{{j}}.{b}") for a, b in _RESIDUAL],
        ("decoder.model.{i+2}.2", "tokeniser.ups.{i}.1"),
        *[(f"decoder.model.{{i+2}}.0.model.{{j}}.{a}", f"tokeniser.ups.{{i}}.0.{{j}}.{b}") for a, b in _RESIDUAL],
        ("quantizer.layers.{i}", "tokeniser.quantiser.levels.{i}"),
        # the transformer
        ("cond_emb", "text_embed"),
        ("quant_emb", "level_embed"),
        ("tok_emb", "code_embed"),
        (f"{_XL}.r_w_bias", "levels.{i}.u"),
        (f"{_XL}.r_r_bias", "levels.{i}.v"),
        (f"{_XL}.word_emb.emb_layers.0.weight", "levels.{i}.unused_table"),
        (f"{_XL}.crit.out_layers.0.bias", "levels.{i}.unused_bias"),
        (f"{_BLOCK}.dec_attn.qkv_net", "levels.{i}.blocks.{j}.attention.qkv"),
        (f"{_BLOCK}.dec_attn.o_net", "levels.{i}.blocks.{j}.attention.out"),
        (f"{_BLOCK}.dec_attn.r_net", "levels.{i}.blocks.{j}.attention.distance"),
        (f"{_BLOCK}.dec_attn.layer_norm", "levels.{i}.blocks.{j}.norm1"),
        (f"{_BLOCK}.pos_ff.CoreNet.0", "levels.{i}.blocks.{j}.fc1"),
        (f"{_BLOCK}.pos_ff.CoreNet.3", "levels.{i}.blocks.{j}.fc2"),
        (f"{_BLOCK}.pos_ff.layer_norm", "levels.{i}.blocks.{j}.norm2"),
    ],
    config=config,
    call=call,
    ignore=("xls.*.pos_emb.inv_freq", "xls.*.crit.out_layers.0.weight", "clip_model.*", "vq_model.*"),
    to_ours=to_ours,
    to_theirs=to_theirs,
)
