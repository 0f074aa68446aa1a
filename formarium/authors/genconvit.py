"""GenConViT: github.com/erprogs/GenConViT (model/genconvit_ed.py, model/genconvit_vae.py, model/genconvit.py).

The two networks call their encoders and decoders alike, so a checkpoint says by its backbone's name whose it is. One of both networks
has "model_ed." and "model_vae." before the names; a model of both takes the two released files one after the other, each with the other's
names in `skip` ("vae.*" or "ed.*").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from formarium.authors import Authors, Rename, State
from formarium.nn.convnext import upsampled

CONVNEXT = {
    "convnext_tiny": {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3)},
    "convnext_small": {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)},
    "convnext_base": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)},
    "convnext_large": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3)},
    "convnext_xlarge": {"dims": (256, 512, 1024, 2048), "depths": (3, 3, 27, 3)},
}
SWIN = {
    "swin_tiny": {"swin_dim": 96, "swin_depths": (2, 2, 6, 2), "swin_heads": (3, 6, 12, 24)},
    "swin_small": {"swin_dim": 96, "swin_depths": (2, 2, 18, 2), "swin_heads": (3, 6, 12, 24)},
    "swin_base": {"swin_dim": 128, "swin_depths": (2, 2, 18, 2), "swin_heads": (4, 8, 16, 32)},
    "swin_large": {"swin_dim": 192, "swin_depths": (2, 2, 18, 2), "swin_heads": (6, 12, 24, 48)},
}


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    entry = header["reference"]["entry"]
    settings = theirs.get("config", theirs)
    sizes = settings.get("model", settings)
    both = {"ed": "ed", "vae": "vae"}.get(theirs.get("net", ""), "both")
    embedder = sizes.get("embedder")
    out = {
        "networks": "ed" if "genconvit_ed" in entry else "vae" if "genconvit_vae" in entry else both,
        "image_size": settings.get("img_size", 224),
        "embedder": embedder is not None,
        **CONVNEXT[sizes.get("backbone", "convnext_tiny").split(".")[0]],
    }
    if embedder is not None:
        name, _, rest = embedder.split(".")[0].partition("_patch4_window")
        out |= {**SWIN[name], "swin_window": int(rest.split("_")[0] or 7)}
    return out


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> Any:
    x = inputs["x"] if "x" in inputs else next(iter(inputs.values()))
    a = model.ed(x) if model.ed is not None else None
    if model.vae is None:
        return a
    eps = inputs.get("eps")
    eps = torch.randn(len(x), model.vae.mu.out_features) if eps is None else eps
    logits, reconstruction, divergence = model.vae(x, eps)
    if a is not None:
        return torch.cat([a, logits])
    resized = upsampled(reconstruction, x.shape[2:])
    if any(o["path"] == "logits" for o in header["outputs"]):
        return {"logits": logits, "recon": resized, "kl": 0.5 * divergence.mean()}
    return logits, resized


def _backbone(theirs: str) -> list[tuple[str, str]]:
    net, swin = "backbone.convnext", "backbone.swin"
    inner = f"{theirs}.patch_embed.backbone"
    return [
        (f"{inner}.patch_embed.proj", f"{swin}.embed"),
        (f"{inner}.patch_embed.norm", f"{swin}.embed_norm"),
        (f"{inner}.layers.{{i}}.blocks.{{j}}.attn.relative_position_bias_table", f"{swin}.stages.{{i}}.blocks.{{j}}.attention.table"),
        (f"{inner}.layers.{{i}}.blocks.{{j}}.attn.proj", f"{swin}.stages.{{i}}.blocks.{{j}}.attention.out"),
        (f"{inner}.layers.{{i}}.blocks.{{j}}.attn", f"{swin}.stages.{{i}}.blocks.{{j}}.attention"),
        (f"{inner}.layers.{{i+1}}.downsample.reduction", f"{swin}.stages.{{i}}.merge.reduce"),
        (f"{inner}.layers.{{i+1}}.downsample", f"{swin}.stages.{{i}}.merge"),
        (f"{inner}.layers", f"{swin}.stages"),
        (f"{inner}.head.fc", f"{swin}.head"),
        (f"{inner}", f"{swin}"),
        (f"{theirs}.patch_embed.proj", "backbone.embed"),
        (f"{theirs}.stages.{{i}}.downsample", f"{net}.stages.{{i}}.down"),
        (f"{theirs}.stages.{{i}}.blocks.{{j}}.conv_dw", f"{net}.stages.{{i}}.blocks.{{j}}.conv"),
        (f"{theirs}.head.norm", f"{net}.norm"),
        (f"{theirs}.head.fc", f"{net}.head"),
        (f"{theirs}", f"{net}"),
    ]


RULES: dict[str, list[tuple[str, str]]] = {
    "ed": [
        *((f"encoder.features.{3 * i}", f"encoder.{i}") for i in range(5)),
        *((f"decoder.features.{2 * i}", f"decoder.{i}") for i in range(5)),
        *_backbone("backbone"),
    ],
    "vae": [
        *((f"encoder.features.{3 * i}", f"encoder.{i}") for i in range(4)),
        *((f"encoder.features.{3 * i + 1}", f"norms.{i}") for i in range(4)),
        *((f"decoder.features.{2 * i}", f"decoder.{i}") for i in range(4)),
        *_backbone("convnext_backbone"),
        ("encoder.fc1", "unused.fc1"),
        ("encoder.fc2", "unused.fc2"),
        ("fc3", "unused.fc3"),
        ("encoder.mu", "mu"),
        ("encoder.var", "variance"),
    ],
}
EMBEDDER = {"ed": "backbone.patch_embed.backbone.", "vae": "convnext_backbone.patch_embed.backbone."}


def _rename(name: str, network: str, forward: bool) -> str:
    tried = (Rename(theirs, ours).apply(name, forward) for theirs, ours in RULES[network])
    return next((new for new in tried if new is not None), name)


def to_ours(state: State, model: Any) -> State:
    """Names of one network, or of both with the prefixes that the ensemble has. Older timm puts Swin's merging at a layer's end."""
    out: State = {}
    for network in ("ed", "vae"):
        prefix = f"model_{network}."
        mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not any(k.startswith(("model_ed.", "model_vae.")) for k in state):
            mine = dict(state) if network == ("vae" if any(k.startswith("convnext_backbone.") for k in state) else "ed") else {}
        renamed = {_rename(k, network, True): v for k, v in mine.items()}
        if any(".stages.-1.merge" in k for k in renamed):
            renamed = {_merge_later(k): v for k, v in renamed.items()}
        out |= {f"{network}.{k}": v for k, v in renamed.items()}
    return out


def _merge_later(name: str) -> str:
    for i in reversed(range(-1, 3)):
        if f".stages.{i}.merge." in name:
            return name.replace(f".stages.{i}.merge.", f".stages.{i + 1}.merge.")
    return name


def to_theirs(state: State, model: Any) -> State:
    out: State = {}
    for name, value in state.items():
        network, _, rest = name.partition(".")
        prefix = f"model_{network}." if model.config.networks == "both" else ""
        theirs = _rename(rest, network, False)
        out[prefix + theirs] = value
        if theirs.startswith(EMBEDDER[network]):  # their state dict has Swin twice
            out[f"{prefix}embedder.{theirs.removeprefix(EMBEDDER[network])}"] = value
    return out


authors = Authors(
    config=config,
    call=call,
    ignore=("*embedder.*", "*.attn_mask", "*.relative_position_index"),
    to_ours=to_ours,
    to_theirs=to_theirs,
)
