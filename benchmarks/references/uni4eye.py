"""Uni4Eye's encoder beside github.com/Davidczy/Uni4Eye_pp, whose blocks are timm's and which added its own patch embedding to timm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from formarium import create
from references import TIMM, TO_TWO, Pair, importing, recorded, squares, step
from references.timm_blocks import Block

REPOSITORY = "Davidczy/Uni4Eye_pp"


class Encoder(nn.Module):
    """Theirs, the encoder alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_encoder(x, 0.75)[:3]


def pairs(clone: Path) -> Iterator[Pair]:
    with importing(clone, helpers={**TO_TWO, "to_3tuple": lambda n: (n, n, n)}):
        source = (clone / "PatchEmbed23D.py").read_text(encoding="utf-8").replace("from .helpers", "from helpers")
        patches: dict[str, type[nn.Module]] = {}
        exec(compile(source, "PatchEmbed23D.py", "exec"), patches)
    blocks = {"PatchEmbed": nn.Module, "Block": Block, "PatchEmbed23D": patches["PatchEmbed23D"]}
    with importing(clone, **{**TIMM, "timm__models__vision_transformer": blocks}):
        from models_mymae23D import MaskedAutoencoderViT_partial23D
    norm = partial(nn.LayerNorm, eps=1e-6)

    def make(**sizes: Any) -> Encoder:
        with mock.patch.object(np, "float", float, create=True):
            return Encoder(MaskedAutoencoderViT_partial23D(**sizes, norm_layer=norm))

    for record in ("uni4eye_encoder_2d", "uni4eye_encoder_3d"):
        r = recorded("uni4eye", record)
        theirs, (x, noise) = make(**r.constructor), r.inputs
        with mock.patch("torch.rand", lambda *a, noise=noise, **k: noise):
            r.same(theirs, lambda r=r: r.ours.encode(*r.inputs), lambda x=x, theirs=theirs: theirs(x))
    small = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}
    theirs = make(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, **small)
    ours = create("uni4eye_vit_base", decoder_depth=0, decoder_dim=64, decoder_heads=2, gradient_branch=False, dynamic_head=False)
    for name, x in (("224x224", torch.rand(2, 3, 224, 224)), ("volume of 224x224x112", torch.rand(1, 3, 224, 224, 112))):
        yield Pair(
            f"vit_base's encoder, {name}",
            "train",
            step(ours, lambda x=x: squares(ours.encode(x).latent)),
            step(theirs, lambda x=x: squares(theirs(x)[0])),
        )
