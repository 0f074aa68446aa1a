"""BrainScore-CrossViT: github.com/williamberrios/BrainScore-Transformers, whose networks are timm's (timm/models/crossvit.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.authors import Authors, State, authors_of
from formarium.nn.attacks import fgsm_step, gradient_of

# timm's names count the image as the small-patch branch sees it, IBM's as the large-patch branch does
SIZES = {"240": "224", "408": "384", "224": "224", "384": "384"}


def trunk_of(arch: str) -> str:
    """Our variant of timm's crossvit_15_dagger_240, say."""
    name, _, size = arch.rpartition("_")
    return f"{name}_{SIZES.get(size, size)}"


def config(theirs: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    said = {
        "eps": theirs.get("clip_eps", 2 / 255),
        "step": theirs.get("fgsm_step", 2.5 / 255),
        "adversarial": theirs.get("enable", theirs.get("adversarial", True)),
        "rotations": theirs.get("rot_inv", True),
        "grey": 0.25 if theirs.get("grayscale", False) else 0.0,
    }
    return {**said, "trunk": trunk_of(theirs["arch"]), "trunk_config": {}, "num_classes": theirs.get("num_classes", 1000)}


def call(model: Any, inputs: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Tensor]:
    """One step of fast adversarial training from the given noise; noise comes in and goes out in 1/255 where it was kept so."""
    said, c = header["reference"]["constructor"], model.config
    model.set_preprocessing({k: said[k] for k in ("mean", "std") if k in said})
    x, noise, target = inputs["x"], inputs["noise"], inputs["target"].long()
    if noise.abs().max() > c.eps * 1.001:
        noise = noise / 255
    logits: list[Tensor] = []

    def loss_of(image: Tensor) -> Tensor:
        logits.append(model(model.normalise(image)))
        return F.cross_entropy(logits[-1], target)

    first, gradient = gradient_of(loss_of, x, noise)
    after = fgsm_step(noise, gradient, c.step, c.eps)
    with torch.no_grad():
        second = loss_of((x + after).clamp(0, 1))
        clean = model(model.normalise(x))
    return {
        "clean_logits": clean, "logits_first": logits[0].detach(), "loss_first": first, "grad_1e4": gradient * 1e4,
        "noise_after": after * 255, "logits_second": logits[1], "loss_second": second,
    }  # fmt: skip


class _Robust(Authors):
    """The trunk's own authors' names; a CrossViT's as timm has them (or IBM's, which are read as well)."""

    def import_state(self, state: Mapping[str, Tensor], model: Any) -> State:
        names = authors_of(model.trunk.card.slug if model.trunk.card is not None else "crossvit")
        if type(model.trunk).__name__ == "CrossViT":
            state = {re.sub(r"^(pos_embed|cls_token)_(\d+)$", r"\1.\2", k): v for k, v in state.items()}
        if model.trunk.card is None:  # a plain trunk without authors of its own
            out = {k if k.startswith("trunk.") else f"trunk.{k}": v for k, v in state.items() if k != "progress"}
        else:
            out = {f"trunk.{k}": v for k, v in names.import_state({k: v for k, v in state.items() if k != "progress"}, model.trunk).items()}
        return {**out, "progress": state.get("progress", model.progress)}

    def export_state(self, model: Any) -> State:
        out = dict(model.trunk.state_dict())
        if model.trunk.card is not None:
            out = authors_of(model.trunk.card.slug).export_state(model.trunk)
        if type(model.trunk).__name__ == "CrossViT":
            out = {re.sub(r"^(pos_embed|cls_token)\.(\d+)$", r"\1_\2", k): v for k, v in out.items()}
        return {**out, "progress": model.progress}


authors = _Robust(config=config, call=call)
