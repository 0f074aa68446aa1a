"""Uni4Eye: github.com/Davidczy/Uni4Eye_pp (PatchEmbed23D.py, models_mymae23D.py), the successor's code; the first paper's isn't public.

Their position tables are constants that we compute. The second decoder, which the released code lacks, goes by `gradient_decoder_...`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.catalogue import create
from formarium.models.image.uni4eye import Uni4Eye, gradient_map, masked_error, patch_entropy, patchify


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Their MaskedAutoencoderViT_partial23D; where the record leaves the decoder out, ours has none."""
    names = [k.removeprefix("model.") for k in header.get("state", {})]
    decodes = not names or any(k.startswith("decoder_blocks") for k in names)
    classes = next((shape[0][0] for k, shape in header.get("state", {}).items() if k.removeprefix("model.") == "head.weight"), 0)
    return {
        "image_size": theirs.get("img_size", 224),
        "patch_size": theirs.get("patch_size", 16),
        "in_channels": theirs.get("in_chans", 3),
        "dim": theirs.get("embed_dim", 1024),
        "depth": theirs.get("depth", 24),
        "heads": theirs.get("num_heads", 16),
        "mlp_ratio": theirs.get("mlp_ratio", 4),
        "norm_eps": theirs.get("norm_eps", theirs.get("layer_norm_eps", 1e-6)),
        "decoder_dim": theirs.get("decoder_embed_dim", 512),
        "decoder_depth": theirs.get("decoder_depth", 8) if decodes else 0,
        "decoder_heads": theirs.get("decoder_num_heads", 16),
        "mask_ratio": theirs.get("mask_ratio", 0.75),
        "normalise_target": theirs.get("norm_pix_loss", False),
        "num_classes": classes,
        "gradient_branch": False,
        "dynamic_head": decodes,
        "volume_positions": "zero",
    }


def call(model: Uni4Eye, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    x, noise = inputs.get("x", inputs.get("imgs", inputs.get("image"))), inputs.get("noise")
    assert x is not None
    encoded = model.encode(x, noise)
    if header["reference"]["entry"].endswith("forward_encoder"):
        return encoded._asdict()
    (mixed,) = model.decode(encoded, model.grid(x), inputs.get("task_id"))
    target = patchify(x, model.config.patch_size)
    loss = masked_error(mixed, target, encoded.mask, model.config.normalise_target)
    return {"loss": loss, "logits": mixed, "mask": encoded.mask}


def patch_embed(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    own = {"dim": said.get("embed_dim", 768), "patch_size": said.get("patch_size", 16), "in_channels": said.get("in_chans", 3)}
    model: Any = create("uni4eye_vit_base", **own, heads=1, depth=0, decoder_depth=0, num_classes=0)
    with torch.no_grad():
        for rank, conv in ((2, model.embed2), (3, model.embed3)):
            for part in ("weight", "bias"):
                key = next(k for k in state if k.endswith(f"proj{rank}.{part}"))
                getattr(conv, part).copy_(state[key])
    ranks = {4: "tokens_2d", 5: "tokens_3d"}
    return {ranks[x.ndim]: model.embedded(x) for x in inputs.values() if x.ndim in ranks}


def masked_loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    patches = patchify(inputs["image"], said.get("patch_size", 16))
    return {"patches": patches, "loss": masked_error(inputs["pred"], patches, inputs["mask"], said.get("norm_pix_loss", False))}


def entropy(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    patches = patchify(inputs["image"], header["reference"]["constructor"].get("patch_size", 16))
    return {"out": patch_entropy(patches, inputs["image"].shape[1])}


def gradient(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    return {"out": gradient_map(inputs["image"])}


class _Uni4Eye(Authors):
    """Checkpoints hold the network, records a wrapper's `model.`."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        return super().import_state({k.removeprefix("model."): v for k, v in state.items()}, model)


def _blocks(theirs: str, ours: str) -> list[tuple[str, str]]:
    return [
        (f"{theirs}.{{i}}.attn.qkv", f"{ours}.{{i}}.attention.qkv"),
        (f"{theirs}.{{i}}.attn.proj", f"{ours}.{{i}}.attention.out"),
        (f"{theirs}.{{i}}", f"{ours}.{{i}}"),
    ]


def _decoder(prefix: str, place: int) -> list[tuple[str, str]]:
    return [
        *_blocks(f"{prefix}_blocks", f"decoders.{place}.blocks"),
        (f"{prefix}_norm", f"decoders.{place}.norm"),
        (f"{prefix}_pred2", f"decoders.{place}.predict2"),
        (f"{prefix}_pred3", f"decoders.{place}.predict3"),
    ]


authors = _Uni4Eye(
    names=[
        ("patch_embed.proj2", "embed2"),
        ("patch_embed.proj3", "embed3"),
        *_blocks("blocks", "blocks"),
        *_decoder("decoder", 0),
        *_decoder("gradient_decoder", 1),
        ("controller", "dynamic.controller"),
        ("mlp", "spare"),
    ],
    ignore=("*pos_embed2", "*pos_embed3"),
    config=config,
    call=call,
    parts={
        "uni4eye_patch_embed*": patch_embed,
        "uni4eye_masked_loss*": masked_loss,
        "uni4eye_entropy*": entropy,
        "uni4eye_gradient*": gradient,
    },
)
