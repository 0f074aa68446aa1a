"""SiT: github.com/Sara-Ahmed/SiT (main.py:FullPipline with vision_transformer.py). Their checkpoints' "student" is the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from formarium.authors import Authors, State, vit_config
from formarium.methods.sit_ssl import SelfSupervised, contrastive_loss, masked_difference

BLOCK, OURS = "backbone.blocks.{i}", "trunk.blocks.{i}"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    names = header.get("state", {})
    pretext = any(k.startswith("head_recons.") for k in names) if names else "FullPipline" in header["reference"]["entry"]
    size = theirs.get("img_size", 224)
    own = {**theirs, "img_size": size[0] if isinstance(size, (list, tuple)) else size}
    trunk = {**vit_config(own), "drop_path": theirs.get("drop_path_rate", 0.0), "resize_offset": 0.1}
    return {
        "trunk": "vit",
        "trunk_config": trunk,
        "in_channels": theirs.get("in_chans", 3),
        "num_classes": 0 if pretext else theirs.get("num_classes", 0),
        "pretext": pretext,
        "out_dim": theirs.get("out_dim", 256),
        "head_hidden": theirs.get("head_hidden", theirs.get("hidden_dim", 4096)),
        "head_layers": theirs.get("head_layers", theirs.get("nlayers", 3)),
    }


def loss(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    contrast = contrastive_loss(inputs["student"], inputs["teacher"], said.get("temperature", said.get("simclr_temp", 0.2)))
    rebuilt = masked_difference(inputs["recon"], inputs["clean"], inputs["mask"])
    return {"contrastive": contrast, "reconstruction": rebuilt, "total": contrast + said.get("lmbda", 1) * rebuilt}


class _SiT(Authors):
    """The pretext network has `backbone.`, the classifier its keys bare; the teacher, which they save apart, starts as the student."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        if not any(k.startswith("backbone.") for k in state):
            state = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in state.items()}
            ours = {self.rename(k) if k.startswith("backbone.") else k: v for k, v in state.items()}
        else:
            ours = super().import_state(state, model)
        mine = model.state_dict()
        for name in mine:
            student = name.removeprefix("teacher.")
            if name.startswith("teacher.") and (student in ours or student in mine):
                ours[name] = ours.get(student, mine[student])
        return ours

    def export_state(self, model: SelfSupervised) -> State:  # type: ignore[override]
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("teacher.")}
        own = {k: self.rename(k, forward=False) for k in state}
        if model.config.pretext:
            return {theirs: state[k] for k, theirs in own.items() if not k.startswith("head.")}
        return {(k if k.startswith("head.") else theirs.removeprefix("backbone.")): state[k] for k, theirs in own.items()}


authors = _SiT(
    names=[
        ("backbone.patch_embed.proj", "trunk.embed"),
        ("backbone.pos_embed", "trunk.positions"),
        (f"{BLOCK}.attn.qkv", f"{OURS}.attention.qkv"),
        (f"{BLOCK}.attn.proj", f"{OURS}.attention.out"),
        ("backbone", "trunk"),
        ("head.mlp", "project"),
        ("head_recons.mlp", "rebuild.mlp"),
        ("head_recons.convTrans", "rebuild.paint"),
    ],
    config=config,
    parts={"sit_ssl_loss*": loss},
)
