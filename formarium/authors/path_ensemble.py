"""Path ensemble: no code of the paper is public; its base network goes by timm's names (timm/models/vision_transformer.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formarium.authors import Authors, vit_config
from formarium.errors import BadInput
from formarium.methods.path_ensemble import Ensemble

BLOCK, OURS = "blocks.{i}", "trunk.blocks.{i}"

# timm's options that change the network, and the only values that a DeiT has
FIXED = {
    "class_token": (True,), "no_embed_class": (False,), "reg_tokens": (0,), "pre_norm": (False,), "final_norm": (True,),
    "fc_norm": (None, False),
    "global_pool": ("token",), "qk_norm": (False,), "scale_attn_norm": (False,), "scale_mlp_norm": (False,), "proj_bias": (True,),
    "init_values": (None,), "pos_embed": ("learn",), "dynamic_img_pad": (False,), "distilled": (False,),
}  # fmt: skip


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Of timm's VisionTransformer, by its argument names."""
    for key, known in FIXED.items():
        if theirs.get(key, known[0]) not in known:
            raise BadInput(key, expected=f"{known[0]}, as in a DeiT", got=str(theirs[key]))
    return {
        "trunk": "vit",
        "trunk_config": vit_config(theirs),
        "branches": (),
        "num_classes": theirs.get("num_classes", 1000),
        "in_channels": theirs.get("in_chans", 3),
        "scale": theirs.get("ensemble_scale", False),
    }


def run(model: Ensemble, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, and the class token's value of every path."""
    out = model.paths(inputs["x"])
    cls = out.paths[:, :, 0].transpose(0, 1)  # b paths c
    return {
        "logits": out.logits,
        "embedding": cls[:, 0],
        "msa_paths": cls[:, 1::2],
        "ffn_paths": cls[:, 2::2],
        "ensemble": out.ensemble[:, 0],
    }


class _PathEnsemble(Authors):
    """Which paths are kept is ours: a base network has them all."""

    def import_state(self, state: Any, model: Any) -> dict[str, Tensor]:
        found = super().import_state(state, model)
        found.setdefault("keep", model.keep.new_ones(model.keep.shape))
        if model.scales is not None:
            found.setdefault("scales", model.scales.detach().new_ones(model.scales.shape))
        return found


authors = _PathEnsemble(
    names=[
        (f"{BLOCK}.attn.qkv", f"{OURS}.attention.qkv"),
        (f"{BLOCK}.attn.proj", f"{OURS}.attention.out"),
        (BLOCK, OURS),
        ("pos_embed", "trunk.positions"),
        ("cls_token", "trunk.cls_token"),
        ("patch_embed.proj", "trunk.embed"),
        ("norm", "trunk.norm"),
        ("head", "trunk.head"),
    ],
    config=config,
    call=run,
)
