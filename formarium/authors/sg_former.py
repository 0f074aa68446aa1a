"""SG-Former: github.com/OliverRensu/SG-Former (sgformer.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.models.image.sg_former import HybridScaleAttention, SelfGuidedAttention

GROUPS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}  # that their code ties to the reduction


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    reductions = theirs.get("sr_ratios", (8, 4, 2, 1))
    return {
        "dims": theirs.get("embed_dims", (64, 128, 256, 512)),
        "depths": theirs.get("depths", (3, 4, 6, 3)),
        "heads": theirs.get("num_heads", (1, 2, 4, 8)),
        "reductions": reductions,
        "groups": tuple(GROUPS.get(r, ()) for r in reductions),
        "mlp_ratios": theirs.get("mlp_ratios", (4, 4, 4, 4)),
        "qkv_bias": theirs.get("qkv_bias", False),
        "qk_scale": theirs.get("qk_scale"),
        "norm_eps": theirs.get("norm_eps", 1e-5),
        "image_size": theirs.get("img_size", 224),
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
    }


ATTENTION = [  # the two attentions' parts, theirs and ours
    ("sr", "shrink"),
    ("norm", "shrink_norm"),
    ("f{k+1}", "merge.{k}"),
    ("lepe_linear", "positions.linear"),
    ("lepe_conv", "positions.conv"),
    ("proj", "out"),
]
_THEIRS, _OURS = "block{i+1}.{j}.attn", "stages.{i}.blocks.{j}.attention"


def fuse(state: State) -> State:
    """Hybrid: q1, q2 and kv2 become one projection; guided: kv1 and kv2 get their names; plain: q and kv become one projection."""
    out = dict(state)

    def take(*names: str) -> Tensor:
        return torch.cat([out.pop(name) for name in names])

    for name in state:
        stem, _, kind = name.rpartition(".")
        prefix, _, part = stem.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if part == "q1":
            out[f"{prefix}q_qkv.{kind}"] = take(*(f"{prefix}{p}.{kind}" for p in ("q1", "q2", "kv2")))
            out[f"{prefix}kv.{kind}"] = out.pop(f"{prefix}kv1.{kind}")
        elif part == "q" and f"{prefix}kv1.{kind}" in state:
            out[f"{prefix}kv_rows.{kind}"] = out.pop(f"{prefix}kv1.{kind}")
            out[f"{prefix}kv_columns.{kind}"] = out.pop(f"{prefix}kv2.{kind}")
        elif part == "q":
            out[f"{prefix}qkv.{kind}"] = take(f"{prefix}q.{kind}", f"{prefix}kv.{kind}")
    return out


def split(state: State) -> State:
    """The inverse of `fuse`."""
    out: State = {}
    for name, t in state.items():
        stem, _, kind = name.rpartition(".")
        prefix, _, part = stem.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if part == "q_qkv":
            n = len(t) // 4
            out |= {f"{prefix}{p}.{kind}": piece for p, piece in zip(("q1", "q2", "kv2"), t.split([n, n, 2 * n]), strict=True)}
        elif part == "qkv":
            n = len(t) // 3
            out |= {f"{prefix}{p}.{kind}": piece for p, piece in zip(("q", "kv"), t.split([n, 2 * n]), strict=True)}
        elif part == "kv" or part in ("kv_rows", "kv_columns"):
            out[f"{prefix}{'kv2' if part == 'kv_columns' else 'kv1'}.{kind}"] = t
        else:
            out[name] = t
    return out


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Tensor:
    """In float64, as recorded: tokens are grouped by a sort of nearly equal numbers."""
    return model.double()(inputs["x"].double())


def attention_pair(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """A hybrid attention of a square map, and a guided one of what it gives, under the significance it gives."""
    c, x = header["reference"]["constructor"], inputs["x"].double()
    bias, scale = c.get("qkv_bias", False), c.get("qk_scale")
    pair: tuple[Any, Any] = (
        HybridScaleAttention(c["dim"], c.get("num_heads", 8), c["sr_ratio"], 7, bias, scale),
        SelfGuidedAttention(c["dim"], c.get("num_heads", 8), GROUPS[c["sr_ratio"]], bias, scale),
    )
    rules = Authors(names=ATTENTION)
    for module, name in zip(pair, ("first.", "second."), strict=True):
        own = {rules.rename(k.removeprefix(name)): v for k, v in state.items() if k.startswith(name)}
        module.double().load_state_dict(fuse(own))
    side = round(x.shape[1] ** 0.5)
    first, significance = pair[0](x, (side, side))
    second = pair[1](first, (side, side), significance)
    by_columns = significance.transpose(1, 2).flatten(1)
    return {"first": first, "mask_rowmajor": significance.flatten(1), "mask_colmajor": by_columns, "second": second}


authors = Authors(
    names=[
        ("pos_embed", "stages.0.positions"),
        ("patch_embed1.conv.0.c", "stages.0.embed.0"),
        ("patch_embed1.conv.0.bn", "stages.0.embed.1"),
        ("patch_embed1.conv.2.c", "stages.0.embed.3"),
        ("patch_embed1.conv.2.bn", "stages.0.embed.4"),
        ("patch_embed1.conv.4.c", "stages.0.embed.6"),
        ("patch_embed1.conv.4.bn", "stages.0.embed.7"),
        ("patch_embed1.norm", "stages.0.embed_norm"),
        ("patch_embed{i+1}.conv1.c", "stages.{i}.embed.0"),
        ("patch_embed{i+1}.conv1.bn", "stages.{i}.embed.1"),
        ("patch_embed{i+1}.conv2.c", "stages.{i}.embed.3"),
        ("patch_embed{i+1}.conv2.bn", "stages.{i}.embed.4"),
        ("patch_embed{i+1}.conv3.c", "stages.{i}.embed.6"),
        ("patch_embed{i+1}.conv3.bn", "stages.{i}.embed.7"),
        *((f"{_THEIRS}.{theirs}", f"{_OURS}.{ours}") for theirs, ours in ATTENTION),
        (_THEIRS, _OURS),
        ("block{i+1}.{j}.mlp.dwconv.dwconv", "stages.{i}.blocks.{j}.mlp.local"),
        ("block{i+1}.{j}", "stages.{i}.blocks.{j}"),
        ("norm{i+1}", "stages.{i}.norm"),
    ],
    config=config,
    call=call,
    to_ours=lambda state, model: fuse(state),
    to_theirs=lambda state, model: split(state),
    parts={"sg_former_attention_pair*": attention_pair},
)
