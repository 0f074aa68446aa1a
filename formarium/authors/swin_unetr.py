"""Swin UNETR: github.com/Project-MONAI/MONAI (monai/networks/nets/swin_unetr.py); its pre-training: SwinUNETR/Pretrain of
github.com/Project-MONAI/research-contributions (models/ssl_head.py, losses/loss.py, utils/ops.py).

Encoders alone, as in the released model_swinvit.pt, go by names without `swinViT.`, with `fc1` and `fc2`, and hold a norm nothing uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, State
from formarium.errors import BadInput
from formarium.nn.volume_pretraining import Answers, fill, pretext_losses


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    t = theirs
    if "upsample" in t:  # their SSLHead
        shared = config({"out_channels": 0, **{k: v for k, v in t.items() if k not in ("upsample", "dim")}}, header)
        return {**shared, "pretraining": t["upsample"], "pretraining_share": 0.0}
    if t.get("use_hyena") or any(t.get("hyena_stages") or ()):
        raise BadInput("use_hyena", expected="window attention", got="the Hyena operator, which is another system")
    name = t.get("norm_name", "instance")
    kind, options = (name, {}) if isinstance(name, str) else (name[0], dict(name[1]) if len(name) > 1 else {})
    return {
        "in_channels": t["in_channels"],
        "out_channels": t["out_channels"],
        "regions": (),
        "spatial_dims": t.get("spatial_dims", 3),
        "feature_size": t.get("feature_size", 24),
        "depths": t.get("depths", (2, 2, 2, 2)),
        "heads": t.get("num_heads", (3, 6, 12, 24)),
        "window": t.get("window_size", 7),
        "mlp_ratio": t.get("mlp_ratio", 4.0),
        "qkv_bias": t.get("qkv_bias", True),
        "norm": kind.lower(),
        "norm_affine": options.get("affine", kind.lower() != "instance"),
        "norm_groups": options.get("num_groups", 8),
        "normalise": t.get("normalize", True),
        "embed_norm": t.get("patch_norm", False),
        "merging": t.get("downsample", "merging"),
        "v2": t.get("use_v2", False),
        "drop_path": t.get("dropout_path_rate", 0.0),
    }


BLOCK, THEIRS = "stages.{i}.blocks.{j}", "swinViT.layers{i+1}.0.blocks.{j}"
DECODERS = [("decoder5", 0), ("decoder4", 1), ("decoder3", 2), ("decoder2", 3), ("decoder1", 4)]
ENCODERS = [("encoder1", 0), ("encoder2", 1), ("encoder3", 2), ("encoder4", 3), ("encoder10", 4)]
WRAPPED = ("conv1", "conv2", "conv3")  # their convolutions sit in a module of one


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    out = model(inputs["x"].float())  # records hold it in half precision
    return tuple(out) if isinstance(out, Answers) else out


def losses(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Their Loss, on both views' answers."""
    i = inputs
    answers = Answers(i["turn"], torch.cat([i["one"], i["other"]]), i["rebuilt"])
    total, terms = pretext_losses(answers, i["turns"], i["image"])
    return {"total": total, **terms}


def swaps(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """Their patch_rand_drop from another sample, in given boxes [boxes, 3 axes, start and stop], after a number of quarter turns."""
    x = torch.rot90(inputs["x"], int(inputs["turn"]), (-2, -1)).clone()
    turned = x.clone()
    fill(x, [tuple(slice(*ends) for ends in box) for box in inputs["boxes"].tolist()], inputs["other"])
    return {"turned": turned, "damaged": x}


class _SwinUNETR(Authors):
    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        """An encoder's names first as those of the encoder in the whole network."""
        return super().import_state({_whole(k): v for k, v in state.items()}, model)


def _whole(name: str) -> str:
    name = re.sub(r"^(swin_vit\.|(?=patch_embed\.|layers\d))", "swinViT.", name)
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name) if name.startswith("swinViT.") else name


authors = _SwinUNETR(
    names=[
        ("swinViT.patch_embed.proj", "embed"),
        ("swinViT.patch_embed.norm", "embed_norm"),
        (f"{THEIRS}.attn.relative_position_bias_table", f"{BLOCK}.attention.table"),
        (f"{THEIRS}.attn.proj", f"{BLOCK}.attention.out"),
        (f"{THEIRS}.attn", f"{BLOCK}.attention"),
        (f"{THEIRS}.mlp.linear1", f"{BLOCK}.mlp.fc1"),
        (f"{THEIRS}.mlp.linear2", f"{BLOCK}.mlp.fc2"),
        (THEIRS, BLOCK),
        ("swinViT.layers{i+1}.0.downsample", "stages.{i}.merge"),
        *(("swinViT.layers{i+1}c.0.layer." + f"{conv}.conv", "stages.{i}.convs." + conv) for conv in WRAPPED),
        ("swinViT.layers{i+1}c.0.layer", "stages.{i}.convs"),
        *((f"{theirs}.layer.{conv}.conv", f"encoders.{i}.{conv}") for theirs, i in ENCODERS for conv in WRAPPED),
        *((f"{theirs}.layer", f"encoders.{i}") for theirs, i in ENCODERS),
        *((f"{theirs}.transp_conv.conv", f"decoders.{i}.up") for theirs, i in DECODERS),
        *((f"{theirs}.conv_block.{conv}.conv", f"decoders.{i}.convs.{conv}") for theirs, i in DECODERS for conv in WRAPPED),
        *((f"{theirs}.conv_block", f"decoders.{i}.convs") for theirs, i in DECODERS),
        ("out.conv.conv", "head"),
        ("rotation_head", "ssl.rotation"),
        ("contrastive_head", "ssl.contrast"),
        ("conv", "ssl.rebuild"),
    ],
    ignore=["*.relative_position_index", "norm.weight", "norm.bias"],
    config=config,
    call=call,
    to_ours=lambda state, model: model.fitted(state),
    parts={"swin_unetr_ssl_losses": losses, "swin_unetr_ssl_swaps": swaps},
)
