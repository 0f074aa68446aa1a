"""SpectFormer: github.com/badripatro/SpectFormers (vanilla_architecture/ and hierarchical_architecture/)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, Rename, State
from formarium.nn.token_labelling import blend_truth, token_label_loss


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    shared = {
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": theirs.get("num_classes", 1000),
        "hierarchical": header["reference"]["entry"].startswith("hierarchical"),
    }
    if shared["hierarchical"]:
        depths = theirs.get("depths", (3, 4, 6, 3))
        return {
            **shared,
            "dims": theirs.get("embed_dims", (64, 128, 320, 448)),
            "depths": depths,
            "heads": theirs.get("num_heads", (2, 4, 10, 14)),
            "mlp_ratios": theirs.get("mlp_ratios", (8, 8, 4, 4)),
            "spectral": tuple(depth if i < 2 else 0 for i, depth in enumerate(depths)),
            "stem_dim": theirs.get("stem_hidden_dim", 32),
            "token_label": bool(theirs.get("token_label", True)),
            "norm_eps": theirs.get("layer_norm_eps", 1e-5),
            "image_size": 224,  # the filters are made for it, whatever the images
        }
    return {
        **shared,
        "dims": (theirs.get("embed_dim", 768),),
        "depths": (theirs.get("depth", 12),),
        "heads": (theirs.get("num_heads", 6),),
        "mlp_ratios": (theirs.get("mlp_ratio", 4.0),),
        "spectral": (theirs.get("alpha", 4),),
        "patch_size": theirs.get("patch_size", 16),
        "token_label": False,
        "norm_eps": theirs.get("layer_norm_eps", 1e-6),
        "image_size": theirs.get("img_size", 224),
    }


PLAIN = [
    ("patch_embed.proj", "stages.0.embed"),
    ("pos_embed", "stages.0.positions"),
    ("blocks.{j}.filter.complex_weight", "stages.0.blocks.{j}.mixer.weight"),
    ("blocks.{j}.attn.proj", "stages.0.blocks.{j}.mixer.out"),
    ("blocks.{j}.attn", "stages.0.blocks.{j}.mixer"),
    ("blocks.{j}", "stages.0.blocks.{j}"),
    ("norm", "stages.0.norm"),
]
HIERARCHICAL = [
    ("patch_embed1.proj", "stages.0.embed.9"),
    ("patch_embed1.conv.{k}", "stages.0.embed.{k}"),
    ("patch_embed{i+1}.proj", "stages.{i}.embed"),
    ("patch_embed{i+1}.norm", "stages.{i}.embed_norm"),
    ("block{i+1}.{j}.attn.complex_weight", "stages.{i}.blocks.{j}.mixer.weight"),
    ("block{i+1}.{j}.attn.proj", "stages.{i}.blocks.{j}.mixer.out"),
    ("block{i+1}.{j}.attn", "stages.{i}.blocks.{j}.mixer"),
    ("block{i+1}.{j}.mlp.dwconv.dwconv", "stages.{i}.blocks.{j}.mlp.local"),
    ("block{i+1}.{j}", "stages.{i}.blocks.{j}"),
    ("norm{i+1}", "stages.{i}.norm"),
    ("post_network.{k}.attn.proj", "class_blocks.{k}.out"),
    ("post_network.{k}.attn.q", "class_blocks.{k}.q"),
    ("post_network.{k}.attn.kv", "class_blocks.{k}.kv"),
    ("post_network.{k}", "class_blocks.{k}"),
    ("aux_head", "token_head"),
]


def to_ours(state: State, model: Any) -> State:
    """Their pyramid's attention has q apart from k and v; ours is one projection."""
    out = dict(state)
    for name, q in state.items():
        stem, _, kind = name.rpartition(".q.")
        if stem.endswith(".mixer"):
            out[f"{stem}.qkv.{kind}"] = torch.cat([q, out.pop(f"{stem}.kv.{kind}")])
            del out[name]
    return out


def to_theirs(state: State, model: Any) -> State:
    if not model.config.hierarchical:
        rules = [Rename(*pair) for pair in PLAIN]
        return {next((n for r in rules if (n := r.apply(name, forward=False))), name): t for name, t in state.items()}
    out: State = {}
    for name, t in state.items():
        stem, _, kind = name.rpartition(".qkv.")
        if stem:
            q, kv = t.split([len(t) // 3, 2 * (len(t) // 3)])
            out |= {f"{stem}.q.{kind}": q, f"{stem}.kv.{kind}": kv}
        else:
            out[name] = t
    return out


def token_label(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Targets [b, classes, 2 + tokens]: ground truth, the annotator's class label, its token labels; or [b, classes] alone."""
    theirs, kind = header["reference"]["constructor"], header["reference"]["entry"].rpartition(":")[2]
    targets = inputs["targets"]
    target, tokens = (targets, None) if targets.ndim == 2 else (targets[:, :, 1], targets[:, :, 2:])
    if kind == "TokenLabelGTCrossEntropy" and targets.ndim == 3:
        target = blend_truth(target, targets[:, :, 0])
    top, left, bottom, right = theirs.get("mix_box", (0, 0, 0, 0))
    weights = theirs.get("dense_weight", 1.0), theirs.get("cls_weight", 1.0)
    total, _, _ = token_label_loss(inputs["cls_logits"], inputs["token_logits"], target, tokens, (top, left, bottom, right), *weights)
    return {"loss": total}


authors = Authors(
    names=[*HIERARCHICAL, *PLAIN],
    config=config,
    ignore=("pre_logits.*",),  # the plain code can build this layer, and never applies it
    to_ours=to_ours,
    to_theirs=to_theirs,
    parts={"spectformer_token_label*": token_label},
)
